"""A policy file that is replaced by one with a fault, which would let somebody in."""

from __future__ import annotations

from tests.attacks.deeds import rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target
from tests.attacks.policies import POLICY, payments_with_a_file, replace_policy
from ztdev.options import spiffe_id

#: What is added. `comment` is no key of a rule: whoever wrote that was not understood, so nothing is.
RULE = f"""
  - name: rogue-charges
    comment: only for a day
    callers: ["{spiffe_id("rogue")}"]
    methods: [POST]
    paths: ["/payments"]
"""


async def attempt(lab: Lab, target: Target) -> Answer:
    return await replace_policy(lab, target, POLICY.read_text() + RULE)


ATTACK = Attack(
    id="broken-policy",
    title="Broken policy file",
    story="Payments' policy file is replaced by one that is not quite right, with a rule for the rogue.",
    target="payments",
    door=payments_with_a_file,
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("whole-policy", "invalid_policy", {"event": "policy"}),),
)
