"""Another workload of the same trust domain."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target
from ztdev.options import spiffe_id


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, charge(), svid=lab.svid("rogue"))


ATTACK = Attack(
    id="rogue-workload",
    title="Rogue workload of the same domain",
    story="A workload with an SVID as good as any, which no rule names, asks payments for money.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer("route-policy", "caller_not_allowed", {"event": "request", "peer_id": spiffe_id("rogue")}),
    ),
)
