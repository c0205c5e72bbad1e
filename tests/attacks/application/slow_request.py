"""A request that is sent as slowly as can be (slowloris)."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

#: Seconds that a request may take here, and that this one does.
ALLOWED, TAKEN = 1.0, 2.5
IMPATIENT = {"REQUEST_TIMEOUT_SECONDS": str(ALLOWED)}


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, charge() | {"pause": TAKEN}, svid=lab.svid("orders"))


ATTACK = Attack(
    id="slow-request",
    title="Slow request",
    story="Orders was broken into, and keeps payments waiting for the rest of many requests.",
    target="payments",
    door=lambda lab, left_out: lab.variant(left_out, "payments", IMPATIENT),
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("request-deadline", "request_timeout", {"event": "request"}),),
)
