"""A charge that is sent once more, with another amount."""

from __future__ import annotations

import uuid

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

ASKED, TAMPERED = 1999, 1


async def attempt(lab: Lab, target: Target) -> Answer:
    """Succeeds when payments confirms the second request, whatever it has booked."""
    key = uuid.uuid4().hex
    requests = charge(ASKED, key), charge(TAMPERED, key)
    return await lab.attack(target, *requests, svid=lab.svid("orders"))


ATTACK = Attack(
    id="tampered-replay",
    title="Replayed payment with another amount",
    story="Orders was broken into, and repeats a charge under its key for a cent, and wants it confirmed.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("idempotency-keys", "idempotency_key_reused", {"event": "application", "status": 422}),),
)
