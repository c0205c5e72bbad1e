"""A web-identity token of another service account."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.clouds import wider_trust
from tests.attacks.deeds import TAKE_ROLE, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target

ROLE = "zt-demo-orders"


async def rightful(lab: Lab, target: Target) -> Answer:
    return await read_secret(lab, target, "orders", "zt-demo/orders/db")


async def attempt(lab: Lab, target: Target) -> Answer:
    token = lab.stack.issuer.token("zt-demo", "rogue")
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With something left out, the trust policy of the role does not look at the subject."""
    async with wider_trust(lab.stack.cloud, ROLE, "sub") if left_out else contextlib.nullcontext():
        yield lab.target("cloud")


ATTACK = Attack(
    id="other-accounts-token",
    title="Web identity of another account",
    story="A pod of the same cluster takes the role of orders with its own service account's token.",
    target="cloud",
    rightful=rightful,
    attempt=attempt,
    door=door,
    layers=(Layer("role-trust", "AccessDenied", TAKE_ROLE),),
)
