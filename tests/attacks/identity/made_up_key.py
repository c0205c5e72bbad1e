"""A token that brings the key along that it is signed with."""

from __future__ import annotations

from joserfc import jwt
from joserfc.jwk import ECKey

from tests.attacks.clouds import stand_in
from tests.attacks.deeds import TAKE_ROLE, claims, read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """The header holds the public key (RFC 7515 section 4.1.3), under an ID that the issuer does not know."""
    key = ECKey.generate_key("P-256")
    header = {"alg": "ES256", "kid": "attacker", "jwk": key.as_dict(private=False) | {"kid": "attacker"}}
    token = jwt.encode(header, claims(lab), key)
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


ATTACK = Attack(
    id="made-up-key",
    title="Web identity with a key of its own",
    story="The attacker signs a token with its own key, and sends the key along in the token.",
    target="cloud",
    rightful=read_own_secret,
    attempt=attempt,
    door=stand_in,
    layers=(
        Layer("token-key", "InvalidIdentityToken", TAKE_ROLE, told="No key of the issuer has the key ID"),
    ),
)
