"""The same charge, many times at once."""

from __future__ import annotations

import asyncio
import time
import uuid

from tests.attacks.deeds import booked_once, charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

AT_ONCE = 10

#: Seconds in which all of them are connected: then they send in the same moment.
UNTIL_ALL_ARE_READY = 3.0


async def attempt(lab: Lab, target: Target) -> Answer:
    """Succeeds when more than one payment is booked."""
    request = charge(key=uuid.uuid4().hex, order=uuid.uuid4())
    at_once = request | {"not_before": time.time() + UNTIL_ALL_ARE_READY}
    svid = lab.svid("orders")
    answers = await asyncio.gather(*(lab.attack(target, at_once, svid=svid) for _ in range(AT_ONCE)))
    return await booked_once(lab, request, answers)


ATTACK = Attack(
    id="raced-payment",
    title="Raced payment",
    story=f"Orders was broken into, and sends one charge {AT_ONCE} times at once, to slip past the check.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer(
            "key-in-transaction",
            "replayed",
            {"event": "application", "decision": "allow", "reason": None, "replayed": True},
        ),
    ),
)
