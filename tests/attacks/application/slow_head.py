"""Headers that are sent as slowly as can be (slowloris)."""

from __future__ import annotations

from tests.attacks.application.slow_request import IMPATIENT
from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

#: Seconds between the first half of the headers and the second; open connections are looked at each second.
TAKEN = 3.5


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, charge() | {"pause_in_head": TAKEN}, svid=lab.svid("orders"))


ATTACK = Attack(
    id="slow-head",
    title="Slow headers",
    story="Orders was broken into, and begins many requests at payments whose headers do not come to an end.",
    target="payments",
    door=lambda lab, left_out: lab.variant(left_out, "payments", IMPATIENT),
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("request-deadline", "request_timeout", {"event": "connection"}),),
)
