"""A caller that shows no certificate."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import NOBODY, Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, charge())


ATTACK = Attack(
    id="no-certificate",
    title="No certificate",
    story="Somebody who reached the network, and has no identity, asks payments for money.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer("client-certificate", "no_certificate", {"event": "handshake"}),
        Layer("peer-verification", "no_certificate", {"detail": "the peer presented no certificate"}),
        Layer("route-policy", "caller_not_allowed", {"event": "request", "peer_id": NOBODY}),
    ),
)
