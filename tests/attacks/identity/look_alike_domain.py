"""An ID of a trust domain that looks like ours."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

LOOK_ALIKE = "spiffe://zt.examp1e/ns/zt-demo/sa/orders"


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, charge(), svid=lab.stack.ca.issue(LOOK_ALIKE))


ATTACK = Attack(
    id="look-alike-domain",
    title="Look-alike trust domain",
    story="Our authority was tricked into signing for zt.examp1e, which a tired eye reads as zt.example.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer("peer-verification", "unknown_trust_domain", {"event": "handshake"}),
        Layer("route-policy", "caller_not_allowed", {"event": "request", "peer_id": LOOK_ALIKE}),
    ),
)
