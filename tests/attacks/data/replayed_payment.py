"""A charge that is sent twice as it was."""

from __future__ import annotations

import uuid

from tests.attacks.deeds import booked_once, charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """Succeeds when the second request makes a payment of its own."""
    request = charge(key=uuid.uuid4().hex, order=uuid.uuid4())
    answers = [await lab.attack(target, request, svid=lab.svid("orders")) for _ in range(2)]
    return await booked_once(lab, request, answers)


ATTACK = Attack(
    id="replayed-payment",
    title="Replayed payment",
    story="Somebody recorded a charge that orders made, and sends it to payments once more.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer(
            "exactly-once",
            "replayed",
            {"event": "application", "decision": "allow", "reason": None, "replayed": True},
        ),
    ),
)
