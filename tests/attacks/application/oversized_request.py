"""A request that is larger than any should be."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    request = charge()
    return await lab.attack(
        target, request | {"body": request["body"] + " " * (2 << 20)}, svid=lab.svid("orders")
    )


ATTACK = Attack(
    id="oversized-request",
    title="Oversized request",
    story="Orders was broken into, and sends payments a charge of two megabytes to use up its memory.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("body-limit", "too_large", {"event": "request"}),),
)
