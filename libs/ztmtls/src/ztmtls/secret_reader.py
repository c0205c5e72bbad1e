"""Reads one secret of Secrets Manager with the role of this workload."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

from .aws_clients import NO_ANSWER, Clients, error_code, no_answer
from .aws_credentials import Credentials, RoleCredentials
from .aws_identity import CredentialsRefused, Identity, SecretError
from .reasons import Reason
from .secret_value import SecretValue, parse

#: Codes of AWS for credentials that were good once.
_STALE_CODES = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "InvalidToken",
        "RequestExpired",
        "UnrecognizedClientException",
    }
)


@dataclass(frozen=True)
class RotationSchedule:
    """What Secrets Manager says about the rotation of a secret. None: it does not say."""

    enabled: bool
    last_rotated_at: datetime | None
    next_rotation_at: datetime | None
    """On this day or earlier (DescribeSecret, NextRotationDate)."""

    def is_over(self) -> bool:
        """True when the next rotation should have been: whether it failed or not, there is news."""
        return self.next_rotation_at is not None and self.next_rotation_at <= datetime.now(UTC)


class SecretReader:
    """The AWS side of a `RotatingSecret`. For one thread."""

    def __init__(
        self,
        secret_id: str,
        identity: Identity,
        endpoint_url: str | None,
        required: tuple[str, ...],
    ) -> None:
        self._secret_id = secret_id
        self._identity = identity
        self._endpoint_url = endpoint_url
        self._required = required
        self._clients = Clients(identity.region)
        self._credentials = RoleCredentials(identity, self._clients)
        self._signs_with: Credentials | None = None
        self._client: Any = None

    def read(self) -> SecretValue:
        """The version that is AWSCURRENT. Raises SecretError."""
        answer = self._call("GetSecretValue", VersionStage="AWSCURRENT")
        if not answer.keys() & {"SecretString", "SecretBinary"}:  # cut off, and botocore took it for whole
            raise no_answer("Secrets Manager", "no secret in it")
        return parse(answer, self._required, self._secret_id)

    def schedule(self) -> RotationSchedule:
        """When it is rotated. Raises SecretError, ``secret_denied`` when the role may not ask."""
        answer = self._call("DescribeSecret")
        return RotationSchedule(
            bool(answer.get("RotationEnabled")), answer.get("LastRotatedDate"), answer.get("NextRotationDate")
        )

    def _call(self, action: str, **parameters: str) -> dict[str, Any]:
        try:
            return self._call_once(action, parameters)
        except _Stale:
            self._credentials.forget()
        try:
            return self._call_once(action, parameters)
        except _Stale as error:
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_REFUSED,
                f"AWS refuses the credentials that were just issued for {self._identity} ({error})",
            ) from None

    def _call_once(self, action: str, parameters: dict[str, str]) -> dict[str, Any]:
        client = self._signing_client()
        operation = {"GetSecretValue": client.get_secret_value, "DescribeSecret": client.describe_secret}
        try:
            answer: dict[str, Any] = operation[action](SecretId=self._secret_id, **parameters)
        except ClientError as error:
            raise self._explain(action, error_code(error)) from None
        except NO_ANSWER as error:
            raise no_answer("Secrets Manager", type(error).__name__) from None
        return answer

    def _signing_client(self) -> Any:
        credentials = self._credentials.get()
        if credentials is not self._signs_with:
            self._client = self._clients.make(
                "secretsmanager",
                self._endpoint_url,
                aws_access_key_id=credentials.access_key,
                aws_secret_access_key=credentials.secret_key,
                aws_session_token=credentials.token,
            )
            self._signs_with = credentials
        return self._client

    def _explain(self, action: str, code: str) -> Exception:
        if code in _STALE_CODES:
            return _Stale(code)
        if code.startswith("AccessDenied"):
            key = " and kms:Decrypt on its key" if action == "GetSecretValue" else ""
            return SecretError(
                Reason.SECRET_DENIED,
                f"{self._identity} may not read {self._secret_id}: check that its policy allows "
                f"secretsmanager:{action} on this secret{key}",
            )
        if code == "ResourceNotFoundException":
            return SecretError(
                Reason.SECRET_UNAVAILABLE,
                f"there is no secret {self._secret_id} with a current version in {self._identity.region}",
            )
        return no_answer("Secrets Manager", code)


class _Stale(Exception):
    """AWS does not know our temporary credentials (any more): others are needed."""
