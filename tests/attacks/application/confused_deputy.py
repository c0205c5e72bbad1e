"""Somebody else's order, by way of a service that may read it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import yaml

from tests.attacks.controls import ROOT
from tests.attacks.deeds import place_order
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, NotProved, Target
from ztdev.options import spiffe_id

POLICY = ROOT / "services" / "orders" / "src" / "orders" / "policy.yaml"


async def rightful(lab: Lab, target: Target) -> Answer:
    """Frontend places an order, and reads it."""
    return await lab.attack(target, await _order(lab, target), svid=lab.svid("frontend"))


async def attempt(lab: Lab, target: Target) -> Answer:
    """A second shop, which may use orders as frontend does, reads frontend's order with its payment, or finds
    it among its own."""
    order, partner = await _order(lab, target), lab.svid("partner")
    listed = await lab.attack(target, {"path": "/orders"}, svid=partner)
    if listed.refused:
        raise NotProved(f"the second shop may not list its own orders: {listed}")
    if order["path"].removeprefix("/orders/") in listed.body:
        return listed
    return await lab.attack(target, order, svid=partner)


async def _order(lab: Lab, target: Target) -> dict[str, str]:
    """The request for an order that frontend has placed."""
    placed = json.loads((await place_order(lab, target)).body)
    return {"path": f"/orders/{placed['order']['id']}"}


@contextlib.asynccontextmanager
async def with_two_shops(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """An `orders` whose policy lets the second shop do all that it lets frontend do."""
    policy = yaml.safe_load(POLICY.read_text())
    for rule in policy["rules"]:
        rule["callers"].append(spiffe_id("partner"))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(policy, file)
        file.flush()
        async with lab.variant(left_out, "orders", {"POLICY_FILE": str(Path(file.name))}) as target:
            yield target


ATTACK = Attack(
    id="confused-deputy",
    title="Confused deputy",
    story="A second shop, a rightful caller of orders, has orders tell it of an order that it did not place.",
    target="orders",
    door=with_two_shops,
    rightful=rightful,
    attempt=attempt,
    layers=(
        Layer(
            "callers-own",
            "not_found",
            {"event": "application", "status": 404, "peer_id": spiffe_id("partner")},
        ),
    ),
)
