"""A connection that is kept open until the SVID it was made with has run out."""

from __future__ import annotations

from tests.attacks.deeds import STATUS, charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    svid = lab.svid("orders", ttl=2.0)
    late = charge() | {"not_before": svid.not_after.timestamp() + 0.05}
    return await lab.attack(target, STATUS, late, svid=svid)


ATTACK = Attack(
    id="connection-held-open",
    title="Connection held open past expiry",
    story="The attacker had orders' SVID for two seconds, made a connection with it, and holds on to that.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("live-recheck", "expired"),),
)
