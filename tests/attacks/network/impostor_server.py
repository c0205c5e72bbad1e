"""Another workload answers where payments should be."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.deeds import place_order
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    """The same order, where payments is payments."""
    return await place_order(lab, lab.target("orders"))


async def attempt(lab: Lab, target: Target) -> Answer:
    """An order through an `orders` whose way to payments ends at the impostor."""
    return await place_order(lab, target)


@contextlib.asynccontextmanager
async def misled(lab: Lab) -> AsyncIterator[Target]:
    """Nothing is left out; the address of payments leads to the impostor."""
    async with (
        lab.impostor(lab.svid("rogue")) as port,
        lab.variant(None, "orders", {"PAYMENTS_URL": f"https://127.0.0.1:{port}"}) as target,
    ):
        yield target


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The same, and orders takes any workload for payments."""
    async with (
        lab.impostor(lab.svid("rogue")) as port,
        lab.variant("server-identity", "orders", {"PAYMENTS_URL": f"https://127.0.0.1:{port}"}) as target,
    ):
        yield target


ATTACK = Attack(
    id="impostor-server",
    title="Impostor server",
    story="Another workload, with an SVID as good as any, answers where payments should be: 'it is paid'.",
    target="orders",
    against=misled,
    rightful=rightful,
    attempt=attempt,
    without=without,
    first=Layer("server-identity", "wrong_server_identity", {"event": "handshake", "side": "caller"}),
)
