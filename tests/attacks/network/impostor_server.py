"""Another workload answers where payments should be."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    """The same order, where payments is payments."""
    return await lab.attack(lab.target("orders"), await _order(lab), svid=lab.svid("frontend"))


async def attempt(lab: Lab, target: Target) -> Answer:
    """An order through an `orders` whose way to payments ends at the impostor."""
    return await lab.attack(target, await _order(lab), svid=lab.svid("frontend"))


async def _order(lab: Lab) -> dict[str, Any]:
    answer = await lab.attack(lab.target("orders"), {"path": "/products"}, svid=lab.svid("frontend"))
    sku = json.loads(answer.body)["products"][0]["sku"]
    return {
        "method": "POST",
        "path": "/orders",
        "headers": [("Content-Type", "application/json"), ("Idempotency-Key", uuid.uuid4().hex)],
        "body": json.dumps({"items": [{"sku": sku, "quantity": 1}]}),
    }


@contextlib.asynccontextmanager
async def misled(lab: Lab) -> AsyncIterator[Target]:
    """Nothing is left out; the address of payments leads to the impostor."""
    async with (
        lab.impostor(lab.svid("rogue")) as url,
        lab.variant(None, "orders", {"PAYMENTS_URL": url}) as target,
    ):
        yield target


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The same, and orders takes any workload for payments."""
    async with (
        lab.impostor(lab.svid("rogue")) as url,
        lab.variant("server-identity", "orders", {"PAYMENTS_URL": url}) as target,
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
