"""Another workload answers where payments should be."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.deeds import place_order
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    """The same order, where payments is payments."""
    return await place_order(lab, lab.target("orders"))


async def attempt(lab: Lab, target: Target) -> Answer:
    """An order through an `orders` whose way to payments ends at the impostor."""
    return await place_order(lab, target)


@contextlib.asynccontextmanager
async def misled(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """An `orders` for which the address of payments leads to the impostor."""
    async with (
        lab.impostor(lab.svid("rogue")) as port,
        lab.variant(left_out, "orders", {"PAYMENTS_URL": f"https://127.0.0.1:{port}"}) as target,
    ):
        yield target


ATTACK = Attack(
    id="impostor-server",
    title="Impostor server",
    story="Another workload, with an SVID as good as any, answers where payments should be: 'it is paid'.",
    target="orders",
    door=misled,
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("server-identity", "wrong_server_identity", {"event": "handshake", "side": "caller"}),),
)
