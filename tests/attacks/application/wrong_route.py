"""The right caller on a route that no rule names."""

from __future__ import annotations

from tests.attacks.deeds import rightful_status
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

PAYMENT = "/payments/6f9f7c0e-3a53-4c55-9a7c-1c64a8d1f0aa"


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, {"method": "DELETE", "path": PAYMENT}, svid=lab.svid("orders"))


ATTACK = Attack(
    id="wrong-route",
    title="Right caller, wrong route",
    story="Orders, which may charge, was broken into and tries to delete a payment.",
    target="payments",
    rightful=rightful_status,
    attempt=attempt,
    layers=(
        Layer("route-policy", "route_not_allowed", {"event": "request", "method": "DELETE"}),
        Layer("served-routes", "method_not_allowed", {"event": "application", "status": 405}),
    ),
)
