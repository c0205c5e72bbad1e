"""The same charge, many times at once."""

from __future__ import annotations

import asyncio
import json
import uuid

from tests.attacks.deeds import charge, once, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

AT_ONCE = 8


async def attempt(lab: Lab, target: Target) -> Answer:
    """Succeeds when more than one payment comes of it."""
    request, svid = charge(key=uuid.uuid4().hex), lab.svid("orders")
    answers = await asyncio.gather(*(lab.attack(target, request, svid=svid) for _ in range(AT_ONCE)))
    return once([json.loads(answer.body)["payment"]["id"] for answer in answers])


ATTACK = Attack(
    id="raced-payment",
    title="Raced payment",
    story=f"Orders was broken into, and sends one charge {AT_ONCE} times at once, to slip past the check.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    first=Layer(
        "exactly-once",
        "replayed",
        {"event": "application", "decision": "allow", "reason": None, "replayed": True},
    ),
)
