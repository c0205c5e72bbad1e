"""A caller that speaks no TLS at all."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import NOBODY, Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    """Orders takes money over mutual TLS; where that was left out, from payments as it is."""
    return await rightful_charge(lab, lab.target("payments"))


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, charge(), tls=False)


ATTACK = Attack(
    id="plain-http",
    title="Plain HTTP to the application port",
    story="Somebody in the network speaks plain HTTP to payments, as many services inside a cluster allow.",
    target="payments",
    rightful=rightful,
    attempt=attempt,
    layers=(
        Layer("mutual-tls", "not_tls", {"event": "handshake"}),
        Layer("request-guard", "no_peer", {"event": "request"}),
        Layer("route-policy", "caller_not_allowed", {"event": "request", "peer_id": NOBODY}),
    ),
)
