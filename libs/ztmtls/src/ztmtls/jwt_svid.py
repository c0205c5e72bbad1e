"""JWT-SVIDs and the keys they are verified with (JWT-SVID; SPIFFE Trust Domain and Bundle section 4).

A JWT-SVID says who sent a request where the connection can't: behind a proxy that ends TLS, or to a cloud
provider that takes a web identity. It is a bearer token, so whoever sees it can use it: it never stands in
a `repr`, a log or an exception text.

`validate` is the one function that decides whether a token is good. The library underneath does the
cryptography and nothing else; every rule of the standard is applied here, in the open.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from .ids import InvalidSpiffeId, SpiffeId, TrustDomain
from .reasons import JwtRefused, Reason, printable
from .svid import InvalidSvid, rfc3339

PublicKey = ec.EllipticCurvePublicKey | RSAPublicKey

MAX_TOKEN = 16 << 10
"""Characters a token may have: servers and proxies cut headers off well before that."""

MAX_KEYS = 64
"""Keys a bundle may have: a token without a key ID is tried against each that fits."""

NOT_BEFORE_LEEWAY = timedelta(seconds=10)
"""How far the issuer's clock may be ahead of ours, for ``nbf``. ``exp`` has no leeway at all."""

_MIN_RSA_BITS = 2048  # RFC 7518 sections 3.3 and 3.5

# JWT-SVID 2.1, with the curve that RFC 7518 section 3.4 binds each ECDSA algorithm to.
_CURVES: Mapping[str, type[ec.EllipticCurve]] = {
    "ES256": ec.SECP256R1,
    "ES384": ec.SECP384R1,
    "ES512": ec.SECP521R1,
}
_ALGORITHMS = frozenset(_CURVES) | {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
_HEADERS = frozenset({"alg", "kid", "typ"})
_TYPES = frozenset({"JWT", "JOSE"})

_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]*)")


@dataclass(frozen=True)
class JwtAuthority:
    """A key that verifies JWT-SVIDs of one trust domain. `algorithm` is set when the key is bound to one."""

    key_id: str
    key: PublicKey
    algorithm: str | None = None

    def fits(self, algorithm: str) -> bool:
        """True when a signature by `algorithm` can be this key's: its type, its curve, its own ``alg``."""
        if self.algorithm not in (None, algorithm):
            return False
        curve = _CURVES.get(algorithm)
        if curve is None:
            return isinstance(self.key, RSAPublicKey)
        return isinstance(self.key, ec.EllipticCurvePublicKey) and isinstance(self.key.curve, curve)


@dataclass(frozen=True)
class JwtBundle:
    """The JWT authorities of one trust domain. An empty bundle trusts nothing there."""

    trust_domain: TrustDomain
    authorities: tuple[JwtAuthority, ...]

    @classmethod
    def from_jwks(cls, trust_domain: TrustDomain, document: bytes) -> JwtBundle:
        """Read what the Workload API delivers: a standard JWK Set (Workload API section 6.2.2).

        It holds JWT-SVID keys only, and SPIRE sends them without ``use``: an absent one is taken. A ``use``
        that is there must be ``jwt-svid``. Keys that can't be used are ignored (RFC 7517 section 5):
        unknown types and curves, RSA below 2048 bits, without a key ID, malformed. No bytes at all make an
        empty bundle. Raises `svid.InvalidSvid` when the document is no JWK Set, or holds too many keys.
        """
        return cls._parse(trust_domain, document, use_required=False) if document else cls(trust_domain, ())

    @classmethod
    def from_spiffe_bundle(cls, trust_domain: TrustDomain, document: bytes) -> JwtBundle:
        """Read a SPIFFE bundle, as a bundle endpoint serves it (Trust Domain and Bundle section 4).

        There `use` is required, and only keys with ``jwt-svid`` are taken (JWT-SVID section 6.2). For the
        rest as `from_jwks`.
        """
        return cls._parse(trust_domain, document, use_required=True)

    @classmethod
    def _parse(cls, trust_domain: TrustDomain, document: bytes, *, use_required: bool) -> JwtBundle:
        try:
            keys = _json_object(document).get("keys")
        except ValueError:
            keys = None
        if not isinstance(keys, list):
            raise InvalidSvid(Reason.INVALID_UPDATE, f"the JWT bundle of {trust_domain} is no JWK Set")
        read = (_authority(key, use_required=use_required) for key in keys)
        authorities = tuple(authority for authority in read if authority is not None)
        if len(authorities) > MAX_KEYS:
            raise InvalidSvid(
                Reason.INVALID_UPDATE, f"the JWT bundle of {trust_domain} holds more than {MAX_KEYS} keys"
            )
        return cls(trust_domain, authorities)


@dataclass(frozen=True)
class JwtSvid:
    """One JWT-SVID (JWT-SVID section 3). `expiry` is aware, UTC; `claims` are all of the payload.

    `token` is the secret: send it in an ``Authorization`` header to the audience, and nowhere else.
    """

    id: SpiffeId
    audience: tuple[str, ...]
    expiry: datetime
    token: str = field(repr=False)
    claims: Mapping[str, Any] = field(repr=False, compare=False)


def validate(token: str, audience: str, bundles: Mapping[TrustDomain, JwtBundle], now: datetime) -> JwtSvid:
    """Validate `token` for us, who answer to `audience`, at `now` (aware). Raises `JwtRefused`.

    Only the bundle of the subject's own trust domain counts (Workload API section 6.3). A ``kid`` is
    optional in a token (JWT-SVID section 2.2): without one each key that fits the algorithm is tried, with
    one only the keys of that ID are.
    """
    if not audience:
        raise ValueError("an empty audience would be anybody's")
    jws = _Jws.parse(token)
    algorithm, key_id = _check_header(jws.header)
    subject = _subject(jws.claims)
    bundle = bundles.get(subject.trust_domain)
    if bundle is None:
        raise JwtRefused(
            Reason.UNKNOWN_TRUST_DOMAIN, f"no JWT bundle is known for trust domain {subject.trust_domain}"
        )
    _check_signature(jws, algorithm, _candidates(bundle, algorithm, key_id))
    svid = _svid(jws, token, subject, now)
    if audience not in svid.audience:
        raise JwtRefused(Reason.JWT_AUDIENCE, f"the token of {subject} is not for '{printable(audience)}'")
    return svid


def issued_to_us(token: str, spiffe_id: str, audience: Collection[str], now: datetime) -> JwtSvid:
    """Read a token that the Workload API issued to us as `spiffe_id`, for every one of `audience`.

    The signature is the receiver's to check. Never use this on a token that came from elsewhere. Raises
    `JwtRefused` when the token is not what was asked for, or has expired.
    """
    jws = _Jws.parse(token)
    _check_header(jws.header)
    subject = _subject(jws.claims)
    if str(subject) != spiffe_id:
        raise JwtRefused(Reason.JWT_SUBJECT, f"the token names {subject}, not '{printable(spiffe_id)}'")
    svid = _svid(jws, token, subject, now)
    missing = set(audience).difference(svid.audience)
    if missing:
        raise JwtRefused(
            Reason.JWT_AUDIENCE, f"the token is not for {', '.join(printable(m) for m in sorted(missing))}"
        )
    return svid


@dataclass(frozen=True)
class _Jws:
    """The parts of a JWS in compact serialization (RFC 7515 section 3.1), nothing checked yet."""

    header: dict[str, Any]
    claims: dict[str, Any]
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def parse(cls, token: str) -> _Jws:
        if len(token) > MAX_TOKEN:
            raise JwtRefused(Reason.JWT_MALFORMED, f"the token is longer than {MAX_TOKEN} characters")
        parts = _COMPACT.fullmatch(token)
        if parts is None:
            raise JwtRefused(Reason.JWT_MALFORMED, "the token is not a JWS in compact serialization")
        header, claims, signature = parts.groups()
        try:
            return cls(
                _json_object(_base64url(header)),
                _json_object(_base64url(claims)),
                f"{header}.{claims}".encode(),
                _base64url(signature),
            )
        except ValueError:
            # Not `from`: the cause's text would hold what stands in the token.
            raise JwtRefused(
                Reason.JWT_MALFORMED, "a part of the token is not base64url, or not a JSON object"
            ) from None


def _check_header(header: Mapping[str, Any]) -> tuple[str, str | None]:
    """The algorithm and the key ID, if any (JWT-SVID section 2)."""
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        raise JwtRefused(
            Reason.JWT_ALGORITHM, f"algorithm '{printable(str(algorithm), 32)}' is not one of JWT-SVID 2.1"
        )
    if "typ" in header and header["typ"] not in _TYPES:
        raise JwtRefused(Reason.JWT_TYPE, "the token's type is neither JWT nor JOSE")
    # Section 2: no other header may be there. This covers `crit`, and the ones that bring a key along
    # (`jwk`, `jku`, `x5c`, `x5u`).
    others = header.keys() - _HEADERS
    if others:
        raise JwtRefused(
            Reason.JWT_HEADER, f"header '{printable(min(others), 32)}' may not stand in a JWT-SVID"
        )
    key_id = header.get("kid")
    if "kid" in header and not isinstance(key_id, str):
        raise JwtRefused(Reason.JWT_HEADER, "the key ID is not a string")
    return algorithm, key_id


def _subject(claims: Mapping[str, Any]) -> SpiffeId:
    text = claims.get("sub")
    if not isinstance(text, str):
        raise JwtRefused(Reason.JWT_SUBJECT, "the token has no subject")
    try:
        subject = SpiffeId.parse(text)
    except InvalidSpiffeId as error:
        raise JwtRefused(Reason.JWT_SUBJECT, f"the subject is no SPIFFE ID: {error.detail}") from None
    if subject.is_root:
        raise JwtRefused(Reason.JWT_SUBJECT, f"{subject} names a trust domain, not a workload")
    return subject


def _candidates(bundle: JwtBundle, algorithm: str, key_id: str | None) -> list[JwtAuthority]:
    named = [a for a in bundle.authorities if key_id is None or a.key_id == key_id]
    if not named:
        raise JwtRefused(
            Reason.JWT_UNKNOWN_KEY, f"the token's key is not in the JWT bundle of {bundle.trust_domain}"
        )
    fitting = [authority for authority in named if authority.fits(algorithm)]
    if not fitting:
        raise JwtRefused(Reason.JWT_ALGORITHM, f"{algorithm} does not go with the key")
    return fitting


def _check_signature(jws: _Jws, algorithm: str, candidates: list[JwtAuthority]) -> None:
    verifier = jwt.get_algorithm_by_name(algorithm)
    if not any(verifier.verify(jws.signed, authority.key, jws.signature) for authority in candidates):
        raise JwtRefused(Reason.JWT_SIGNATURE, "the token's signature is not by a key of its trust domain")


def _svid(jws: _Jws, token: str, subject: SpiffeId, now: datetime) -> JwtSvid:
    """Check the times, read the audience (JWT-SVID sections 3.2 and 3.3; RFC 7519 4.1.3 to 4.1.5)."""
    expiry = _moment(jws.claims, "exp")
    if expiry is None:
        raise JwtRefused(Reason.JWT_CLAIM, "the token does not say when it expires")
    if now >= expiry:
        raise JwtRefused(Reason.JWT_EXPIRED, f"the token of {subject} expired at {rfc3339(expiry)}")
    not_before = _moment(jws.claims, "nbf")
    if not_before is not None and now + NOT_BEFORE_LEEWAY < not_before:
        raise JwtRefused(
            Reason.JWT_NOT_YET_VALID, f"the token of {subject} is valid only from {rfc3339(not_before)}"
        )
    audience = jws.claims.get("aud")
    values = [audience] if isinstance(audience, str) else audience
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise JwtRefused(Reason.JWT_AUDIENCE, "the token does not say whom it is for")
    return JwtSvid(subject, tuple(values), expiry, token, MappingProxyType(jws.claims))


def _moment(claims: Mapping[str, Any], name: str) -> datetime | None:
    if name not in claims:
        return None
    value = claims[name]
    try:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        raise JwtRefused(Reason.JWT_CLAIM, f"claim {name} is not a moment in time") from None


def _authority(jwk: object, *, use_required: bool) -> JwtAuthority | None:
    """Read one JWK, or None when it is not for us (Trust Domain and Bundle section 4.2)."""
    if not isinstance(jwk, dict) or (use_required and "use" not in jwk):
        return None
    key_id, algorithm = jwk.get("kid"), jwk.get("alg")
    if jwk.get("use", "jwt-svid") != "jwt-svid" or not isinstance(key_id, str) or not key_id:
        return None  # JWT-SVID 6.1: `kid` must be set
    if algorithm is not None and not isinstance(algorithm, str):
        return None
    key = _public_key(jwk)
    return None if key is None else JwtAuthority(key_id, key, algorithm)


def _public_key(jwk: Mapping[str, Any]) -> PublicKey | None:
    # Public members only, so that a key published by mistake with its private part stays a public key.
    try:
        if jwk.get("kty") == "EC":
            key: object = ECAlgorithm.from_jwk({name: jwk[name] for name in ("kty", "crv", "x", "y")})
            if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, tuple(_CURVES.values())):
                return key
        elif jwk.get("kty") == "RSA":
            key = RSAAlgorithm.from_jwk({name: jwk[name] for name in ("kty", "n", "e")})
            if isinstance(key, RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
                return key
    except (jwt.PyJWTError, UnsupportedAlgorithm, KeyError, TypeError, ValueError, AttributeError):
        return None
    return None


def _base64url(text: str) -> bytes:
    """Decode without padding, one spelling only (RFC 7515 section 2). Raises `ValueError`."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError from error
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != text:
        raise ValueError
    return data


def _json_object(data: bytes) -> dict[str, Any]:
    """Read a JSON object with one meaning only: UTF-8, no name twice, no NaN. Raises `ValueError`."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ValueError from error
    if not isinstance(value, dict):
        raise ValueError
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError


__all__ = [
    "MAX_KEYS",
    "MAX_TOKEN",
    "NOT_BEFORE_LEEWAY",
    "JwtAuthority",
    "JwtBundle",
    "JwtRefused",
    "JwtSvid",
    "issued_to_us",
    "validate",
]
