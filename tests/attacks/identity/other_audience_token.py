"""A token that was made for another audience."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.clouds import wider_trust
from tests.attacks.deeds import TAKE_ROLE, read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """A real token of orders, made for the Kubernetes API."""
    token = lab.stack.issuer.token("zt-demo", "orders", audience="https://kubernetes.default.svc")
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """The stand-in; one that does not look at the audience; and there a role that does not, either."""
    if not left_out:
        yield lab.target("cloud")
        return
    async with lab.weak_cloud("token-audience") as (cloud, target), contextlib.AsyncExitStack() as stack:
        if "role-trust" in left_out:
            await stack.enter_async_context(wider_trust(cloud, "zt-demo-orders", "aud"))
        yield target


ATTACK = Attack(
    id="other-audience-token",
    title="Web identity for somebody else",
    story="Orders showed a token to another service, which now takes orders' role in AWS with it.",
    target="cloud",
    rightful=read_own_secret,
    attempt=attempt,
    door=door,
    layers=(
        Layer("token-audience", "InvalidIdentityToken", TAKE_ROLE, told="Incorrect token audience"),
        Layer("role-trust", "AccessDenied", TAKE_ROLE),
    ),
)
