"""A token that somebody else has signed."""

from __future__ import annotations

from joserfc import jwt
from joserfc.jwk import RSAKey

from tests.attacks.clouds import stand_in
from tests.attacks.deeds import TAKE_ROLE, claims, key_id, read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """Every claim is right, and so is the ID of the key; the key is not."""
    token = jwt.encode({"alg": "RS256", "kid": key_id(lab)}, claims(lab), RSAKey.generate_key(2048))
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


ATTACK = Attack(
    id="forged-token",
    title="Forged web identity",
    story="The attacker writes orders' token itself, names the issuer's key in it, and signs with its own.",
    target="cloud",
    rightful=read_own_secret,
    attempt=attempt,
    door=stand_in,
    layers=(
        Layer("token-signature", "InvalidIdentityToken", TAKE_ROLE, told="The signature cannot be verified"),
    ),
)
