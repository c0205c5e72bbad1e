"""Tokens and keys in JOSE's forms (RFC 7515, RFC 7517), also ones that a validator has to refuse."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def sign_jwt(
    header: Mapping[str, Any],
    claims: Mapping[str, Any],
    key: SigningKey | bytes | None,
    *,
    algorithm: str | None = None,
) -> str:
    """A token in compact serialization with exactly this header and these claims, signed with `key`.

    `algorithm` signs, by default the one that the header names; they may differ. Bytes are a key for HMAC.
    Without a key the signature is empty.
    """
    parts = ".".join(base64url(json.dumps(dict(part)).encode()) for part in (header, claims))
    if key is None:
        return f"{parts}."
    signer = jwt.get_algorithm_by_name(algorithm or header["alg"])
    return f"{parts}.{base64url(signer.sign(parts.encode(), key))}"


def public_jwk(key: SigningKey, key_id: str | None = None, **more: Any) -> dict[str, Any]:
    """The public part of `key` as a JWK; `more` are members such as ``use`` and ``alg``."""
    public = key.public_key()
    if isinstance(public, ec.EllipticCurvePublicKey):
        members = ECAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(public, rsa.RSAPublicKey):
        members = RSAAlgorithm.to_jwk(public, as_dict=True)
    else:
        members = OKPAlgorithm.to_jwk(public, as_dict=True)
    members.pop("key_ops", None)
    return {**members, **({} if key_id is None else {"kid": key_id}), **more}


def jwks(*keys: Mapping[str, Any]) -> bytes:
    """A JWK Set with these keys."""
    return json.dumps({"keys": [dict(key) for key in keys]}, separators=(",", ":")).encode()


def base64url(data: bytes) -> str:
    """base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
