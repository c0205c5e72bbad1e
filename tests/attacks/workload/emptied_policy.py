"""A policy file that is emptied while the service runs."""

from __future__ import annotations

from tests.attacks.deeds import rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target
from tests.attacks.policies import payments_with_a_file, replace_policy
from ztdev.options import spiffe_id


async def attempt(lab: Lab, target: Target) -> Answer:
    return await replace_policy(lab, target, "")


ATTACK = Attack(
    id="emptied-policy",
    title="Emptied policy file",
    story="Payments' policy file is emptied: where no rule is left, many programs let everybody in.",
    target="payments",
    door=payments_with_a_file,
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer("whole-policy", "invalid_policy", {"event": "policy"}),
        Layer("route-policy", "caller_not_allowed", {"event": "request", "peer_id": spiffe_id("rogue")}),
    ),
)
