"""A token whose algorithm is none (RFC 7519 section 6)."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode

from tests.attacks.clouds import stand_in
from tests.attacks.deeds import TAKE_ROLE, claims, key_id, read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """`alg` is none; where the signature belongs stands something, since nothing is refused at once."""
    parts = {"alg": "none", "kid": key_id(lab)}, claims(lab)
    token = ".".join(
        [*(urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), "AA"]
    )
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


ATTACK = Attack(
    id="unsigned-token",
    title="Unsigned web identity",
    story="The attacker writes a token that says of itself that it needs no signature.",
    target="cloud",
    rightful=read_own_secret,
    attempt=attempt,
    door=stand_in,
    layers=(
        Layer("token-signature", "InvalidIdentityToken", TAKE_ROLE, told="The signature cannot be verified"),
    ),
)
