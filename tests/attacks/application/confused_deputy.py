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
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target
from ztdev.options import spiffe_id

POLICY = ROOT / "services" / "orders" / "src" / "orders" / "policy.yaml"


async def rightful(lab: Lab, target: Target) -> Answer:
    """Frontend places an order, and reads it."""
    return await _read(lab, target, "frontend")


async def attempt(lab: Lab, target: Target) -> Answer:
    """A second shop, which may use orders as frontend does, reads frontend's order with its payment."""
    return await _read(lab, target, "partner")


async def _read(lab: Lab, target: Target, reader: str) -> Answer:
    placed = json.loads((await place_order(lab, target)).body)
    return await lab.attack(target, {"path": f"/orders/{placed['order']['id']}"}, svid=lab.svid(reader))


@contextlib.asynccontextmanager
async def with_two_shops(lab: Lab, control: str | None) -> AsyncIterator[Target]:
    """An `orders` whose policy lets the second shop do all that it lets frontend do."""
    policy = yaml.safe_load(POLICY.read_text())
    for rule in policy["rules"]:
        rule["callers"].append(spiffe_id("partner"))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(policy, file)
        file.flush()
        async with lab.variant(control, "orders", {"POLICY_FILE": str(Path(file.name))}) as target:
            yield target


ATTACK = Attack(
    id="confused-deputy",
    title="Confused deputy",
    story="A second shop, a rightful caller of orders, has orders tell it of an order that it did not place.",
    target="orders",
    against=lambda lab: with_two_shops(lab, None),
    without=lambda lab: with_two_shops(lab, "callers-own"),
    rightful=rightful,
    attempt=attempt,
    first=Layer(
        "callers-own",
        "not_found",
        {"event": "application", "status": 404, "peer_id": spiffe_id("partner")},
    ),
)
