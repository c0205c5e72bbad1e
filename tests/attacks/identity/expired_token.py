"""A token that has run out."""

from __future__ import annotations

import time

from tests.attacks.clouds import stand_in
from tests.attacks.deeds import TAKE_ROLE, claims, read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """A real token of orders, of two hours ago."""
    then = int(time.time()) - 7200
    token = lab.stack.issuer.sign(claims(lab, iat=then, nbf=then, exp=then + 3600))
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


ATTACK = Attack(
    id="expired-token",
    title="Expired web identity",
    story="A token of orders was found in a backup; it ran out an hour ago.",
    target="cloud",
    rightful=read_own_secret,
    attempt=attempt,
    door=stand_in,
    layers=(Layer("token-lifetime", "ExpiredTokenException", TAKE_ROLE),),
)
