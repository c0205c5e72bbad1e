"""Temporary credentials of the one role of a workload: asked of STS, or of the EKS Pod Identity Agent."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

from . import aws_clients
from .aws_clients import NO_ANSWER, Clients, error_code, no_answer
from .aws_identity import (
    CredentialsRefused,
    Identity,
    JwtSvidIdentity,
    PodIdentity,
    SecretError,
    WebIdentity,
)
from .reasons import Reason, printable

#: Credentials are renewed when this part of their life is over, give or take 5 %.
RENEW_AT = 0.8

#: While they cannot be renewed and are still good, the next try comes after this many seconds.
RENEW_RETRY = 10.0

_MAX_ANSWER = 64 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Credentials:
    """What AWS issued. Its end is on the monotonic clock."""

    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    token: str = field(repr=False)
    asked_at: float
    expires_at: float


class RoleCredentials:
    """The credentials of one identity, renewed in time. For one thread."""

    def __init__(self, identity: Identity, clients: Clients) -> None:
        self._identity = identity
        self._issue: Callable[[], Credentials]
        if isinstance(identity, PodIdentity):
            self._issue = _Agent(identity).ask
        else:
            self._issue = _Sts(identity, clients).assume_role
        self._credentials: Credentials | None = None
        self._renew_at = 0.0

    def get(self) -> Credentials:
        """Credentials that have not expired.

        Raises:
            SecretError: there are none, and there is no getting new ones now.
        """
        held, now = self._credentials, time.monotonic()
        if held is not None and now < self._renew_at:
            return held
        try:
            issued = self._issue()
        except SecretError as error:
            # Through an outage, what was issued before is good until it expires.
            if held is None or time.monotonic() >= held.expires_at:
                raise
            self._renew_at = time.monotonic() + RENEW_RETRY * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
            _log.warning("the credentials of %s are not renewed yet: %s", self._identity, error)
            return held
        lifetime = issued.expires_at - issued.asked_at
        part = random.uniform(RENEW_AT - 0.05, RENEW_AT + 0.05)  # noqa: S311 - spreads load
        self._credentials, self._renew_at = issued, issued.asked_at + lifetime * part
        return issued

    def forget(self) -> None:
        """AWS does not take them (any more): the next `get` asks for others."""
        self._credentials = None


class _Sts:
    """AssumeRoleWithWebIdentity, at the regional endpoint. The token is the credential: nothing is signed."""

    def __init__(self, identity: WebIdentity | JwtSvidIdentity, clients: Clients) -> None:
        self._identity = identity
        self._clients = clients
        self._client: Any = None

    def assume_role(self) -> Credentials:
        identity = self._identity
        token = identity.read_token()
        if self._client is None:
            self._client = self._clients.make("sts", identity.sts_endpoint)
        asked_at = time.monotonic()
        try:
            answer = self._client.assume_role_with_web_identity(
                RoleArn=identity.role_arn, RoleSessionName=identity.session_name, WebIdentityToken=token
            )
            issued = answer["Credentials"]
            return Credentials(
                access_key=issued["AccessKeyId"],
                secret_key=issued["SecretAccessKey"],
                token=issued["SessionToken"],
                asked_at=asked_at,
                expires_at=asked_at + _lifetime(issued["Expiration"]),
            )
        except ClientError as error:
            raise self._explain(error_code(error), token) from None
        except NO_ANSWER as error:
            raise no_answer("STS", type(error).__name__) from None

    def _explain(self, code: str, token: str) -> SecretError:
        role = self._identity.role_arn
        if code.startswith("AccessDenied"):
            return CredentialsRefused(
                Reason.WEB_IDENTITY_REFUSED,
                f"STS does not let this workload assume {role}. The trust policy must name the issuer, and "
                "under StringEquals exactly the sub and aud of the token. "
                f"The token says: {_claims_hint(token)}",
            )
        if code in ("InvalidIdentityToken", "ExpiredTokenException", "ExpiredToken"):
            return CredentialsRefused(
                Reason.WEB_IDENTITY_REFUSED,
                f"STS does not accept the token of {self._identity.token_origin} for {role} ({code}). "
                f"It says: {_claims_hint(token)}",
            )
        return no_answer("STS", code)


class _Agent:
    """The EKS Pod Identity Agent: one GET, with the token of the service account."""

    def __init__(self, identity: PodIdentity) -> None:
        self._identity = identity

    def ask(self) -> Credentials:
        asked_at = time.monotonic()
        answer = self._get(self._identity.read_token())
        try:
            expires = datetime.fromisoformat(answer["Expiration"])
            access_key, secret_key, token = (
                answer[name] for name in ("AccessKeyId", "SecretAccessKey", "Token")
            )
            if not all(isinstance(text, str) and text for text in (access_key, secret_key, token)):
                raise ValueError
            lifetime = _lifetime(expires)
        except (KeyError, TypeError, ValueError):
            raise no_answer("the EKS Pod Identity Agent", "no credentials in it") from None
        return Credentials(access_key, secret_key, token, asked_at, asked_at + lifetime)

    def _get(self, token: str) -> Mapping[str, Any]:
        # No library: those for HTTP heed proxy variables and follow redirects, each of which would take the
        # token elsewhere.
        connection = http.client.HTTPConnection(
            self._identity.host, self._identity.port, timeout=aws_clients.READ_TIMEOUT
        )
        try:
            connection.request("GET", self._identity.path, headers={"Authorization": token})
            answer = connection.getresponse()
            body = answer.read(_MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            raise no_answer("the EKS Pod Identity Agent", type(error).__name__) from None
        finally:
            connection.close()
        if 400 <= answer.status < 500 and answer.status != 429:
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_REFUSED,
                f"the EKS Pod Identity Agent refuses the token in {self._identity.token_file} "
                f"({answer.status}). Check that the service account has an association whose role trusts "
                f"pods.eks.amazonaws.com. The token says: {_claims_hint(token)}",
            )
        if answer.status != 200 or len(body) > _MAX_ANSWER:
            raise no_answer("the EKS Pod Identity Agent", str(answer.status))
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        return document if isinstance(document, dict) else {}


def _lifetime(expires: datetime) -> float:
    return max(0.0, (expires - datetime.now(UTC)).total_seconds())


def _claims_hint(token: str) -> str:
    """What the token claims, for a person who compares it with a trust policy."""
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        shown = {name: claims.get(name) for name in ("iss", "sub", "aud")}
        expires = claims.get("exp")
        if isinstance(expires, int | float):
            shown["exp"] = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (AttributeError, IndexError, OSError, OverflowError, RecursionError, TypeError, ValueError):
        return "nothing readable"
    return printable(", ".join(f"{name}={value}" for name, value in shown.items()), 512)
