"""Verification of web identity tokens: what AWS does before it looks at a role's trust policy.

AssumeRoleWithWebIdentity takes a JSON Web Token (RFC 7519) signed by the issuer's key (RFC 7515). The issuer
must be registered in the account (an IAM OIDC provider), its keys are found by OpenID Connect Discovery over
TLS, and the audience must be one of the provider's client IDs. Whether the subject may assume the role is the
trust policy's business, not decided here.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, RSAKey

#: Signature algorithms that IAM accepts of an OIDC provider. Never "none", never a shared secret.
ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512")

#: Length limit of the WebIdentityToken parameter (STS API reference).
MAX_TOKEN = 20_000

#: Clock difference that is forgiven, in seconds.
LEEWAY = 5

#: Keys older than this (seconds) are fetched again before use, so that a withdrawn key stops working.
KEYS_MAX_AGE = 60.0

#: An unknown key ID makes us ask the issuer again, but not more often than this (seconds).
KEYS_MIN_INTERVAL = 1.0

FETCH_TIMEOUT = 3.0
_MAX_DOCUMENT = 256 * 1024


class TokenRefused(Exception):
    """The token gets no credentials. `code` is the STS error code; the message never holds the token."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Provider:
    """An OIDC provider as it is registered in IAM."""

    url: str
    client_ids: tuple[str, ...]


@dataclass(frozen=True)
class VerifiedToken:
    """The claims that a trust policy may use, after every check has passed."""

    issuer: str
    subject: str
    audience: str


def issuer_of(token: str) -> tuple[str, str]:
    """The issuer and key ID that a token claims, NOT verified: only to find out whom to ask for keys.

    Raises:
        TokenRefused: it is not a signed JSON Web Token at all.
    """
    invalid = TokenRefused("InvalidIdentityToken", "The ID Token provided is not a valid JWT.")
    if len(token) > MAX_TOKEN:
        raise invalid
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        raise invalid
    header, claims = _json_part(parts[0]), _json_part(parts[1])
    if header is None or claims is None:
        raise invalid
    issuer, key_id = claims.get("iss"), header.get("kid")
    if not isinstance(issuer, str) or not isinstance(key_id, str) or not issuer or not key_id:
        raise invalid
    return issuer, key_id


def _json_part(part: str) -> dict[str, Any] | None:
    try:
        data = json.loads(base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True))
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def verify_token(token: str, provider: Provider, keys: KeySet, now: float) -> VerifiedToken:
    """Check signature, issuer, times and audience of `token` (RFC 7519 §4.1 and §7.2).

    Raises:
        TokenRefused: with the code that AWS STS gives for the same fault.
    """
    issuer, key_id = issuer_of(token)
    if issuer != provider.url:
        raise TokenRefused("InvalidIdentityToken", "The issuer of the token is not the registered provider.")
    key = next((key for key in keys if key.kid == key_id and isinstance(key, RSAKey | ECKey)), None)
    if key is None:
        raise TokenRefused("InvalidIdentityToken", "No key of the issuer has the key ID of the token.")
    try:
        claims = jwt.decode(token, key, algorithms=ALGORITHMS).claims
    except (JoseError, ValueError, TypeError) as error:
        raise TokenRefused(
            "InvalidIdentityToken", f"The signature cannot be verified ({type(error).__name__})."
        ) from None
    return _check_claims(claims, provider, now)


def _check_claims(claims: Mapping[str, Any], provider: Provider, now: float) -> VerifiedToken:
    if claims.get("iss") != provider.url:
        raise TokenRefused("InvalidIdentityToken", "The issuer of the token is not the registered provider.")
    expires, issued = _time(claims, "exp"), _time(claims, "iat")
    if expires <= now - LEEWAY:
        raise TokenRefused("ExpiredTokenException", "Token expired.")
    not_before = _time(claims, "nbf") if "nbf" in claims else issued
    if max(issued, not_before) > now + LEEWAY:
        raise TokenRefused("InvalidIdentityToken", "Token is not yet valid.")
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 1 <= len(subject) <= 255:
        raise TokenRefused("InvalidIdentityToken", "Missing a required claim: sub.")
    audience = claims.get("aud")
    # Kubernetes writes one audience as an array; two would leave open which one the trust policy means.
    audiences = audience if isinstance(audience, list) else [audience]
    if len(audiences) != 1 or audiences[0] not in provider.client_ids:
        raise TokenRefused("InvalidIdentityToken", "Incorrect token audience.")
    return VerifiedToken(provider.url, subject, str(audiences[0]))


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    # RFC 7519 §2: a number. Python's JSON also knows NaN, which no time is later than, and Infinity.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TokenRefused("InvalidIdentityToken", f"Missing a required claim: {name}.")
    return value


class IssuerKeys:
    """The public keys of the issuers, found by OpenID Connect Discovery 1.0 §4 over verified TLS.

    Args:
        ca_file: PEM file of the only authorities trusted for the issuers' certificates. resolve: `host:port`
        of an issuer to the `host:port` where it is reached. Like an entry in a hosts file, it
            changes where we connect, not whom we expect: the certificate must still name the issuer's host.
            An issuer that is not listed is not asked at all: the stand-in makes no other connection.
    """

    def __init__(self, ca_file: str, resolve: Mapping[str, str]) -> None:
        self._ca_file = ca_file
        self._resolve = {name.lower(): _address(target) for name, target in resolve.items()}
        self._keys: dict[str, tuple[float, KeySet]] = {}
        self._asked: dict[str, float] = {}
        self._lock = threading.Lock()

    def known(self, issuer: str) -> KeySet:
        """The keys fetched last, which `refresh` has just found fresh enough.

        Raises:
            TokenRefused: there are none, or they are too old.
        """
        found = self._keys.get(issuer)
        if found is None or time.monotonic() - found[0] > KEYS_MAX_AGE:
            raise TokenRefused("IDPCommunicationError", "The keys of the issuer cannot be fetched.")
        return found[1]

    async def refresh(self, issuer: str, key_id: str) -> None:
        """Fetch the issuer's keys when they are old, or when `key_id` is not among them.

        Runs off the event loop. Never raises for an issuer that does not answer: then `known` refuses.
        """
        await asyncio.to_thread(self._refresh, issuer, key_id)

    def _refresh(self, issuer: str, key_id: str) -> None:
        with self._lock:
            now = time.monotonic()
            found = self._keys.get(issuer)
            fresh = found is not None and now - found[0] < KEYS_MAX_AGE / 2
            if fresh and found is not None and any(key.kid == key_id for key in found[1]):
                return
            if now - self._asked.get(issuer, float("-inf")) < KEYS_MIN_INTERVAL:
                return
            self._asked[issuer] = now
            try:
                self._keys[issuer] = (time.monotonic(), self._fetch_keys(issuer))
            except (OSError, ValueError, JoseError, http.client.HTTPException) as error:
                print(f"gate: keys of {issuer!r}: {type(error).__name__}: {error}", flush=True)

    def _fetch_keys(self, issuer: str) -> KeySet:
        document = self._get(issuer + "/.well-known/openid-configuration")
        if document.get("issuer") != issuer:  # OpenID Connect Discovery 1.0 §4.3
            raise ValueError("the discovery document names another issuer")
        address = document.get("jwks_uri")
        if not isinstance(address, str):
            raise ValueError("the discovery document has no jwks_uri")
        listed = self._get(address).get("keys")
        if not isinstance(listed, list):
            raise ValueError("the key set has no keys")
        usable = [
            entry
            for entry in listed
            if isinstance(entry, dict)
            and entry.get("kty") in ("RSA", "EC")
            and entry.get("use", "sig") == "sig"
        ]
        return KeySet.import_key_set({"keys": usable})

    def _get(self, url: str) -> dict[str, Any]:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username is not None:
            raise ValueError("an issuer must be an https URL")
        target = self._resolve.get(f"{parts.hostname}:{parts.port or 443}")
        if target is None:
            raise ValueError("the gate was not told where this issuer is")
        # Made anew each time: the authority may have been replaced since.
        context = ssl.create_default_context(cafile=self._ca_file)
        connection = _ConnectionTo(target, parts.hostname, context)
        try:
            connection.request(
                "GET", parts.path or "/", headers={"Accept": "application/json, application/jwk-set+json"}
            )
            answer = connection.getresponse()
            body = answer.read(_MAX_DOCUMENT + 1)
        finally:
            connection.close()
        if answer.status != 200 or len(body) > _MAX_DOCUMENT:
            raise ValueError(f"the issuer answered {answer.status}")
        data = json.loads(body)
        if not isinstance(data, dict):
            raise ValueError("the issuer answered something else than an object")
        return data


class _ConnectionTo(http.client.HTTPSConnection):
    """HTTPS to a fixed address, with the certificate checked against the name in the URL."""

    def __init__(self, target: tuple[str, int], host: str, context: ssl.SSLContext) -> None:
        super().__init__(host, context=context, timeout=FETCH_TIMEOUT)
        self._target = target
        self._tls = context

    def connect(self) -> None:
        plain = socket.create_connection(self._target, timeout=FETCH_TIMEOUT)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"not an address host:port: {text!r}")
    return host, int(port)
