"""Headers that say who is calling."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target
from ztdev.options import spiffe_id

FORGED = [
    ("X-SPIFFE-ID", spiffe_id("orders")),
    ("X-Forwarded-Client-Cert", f"URI={spiffe_id('orders')}"),
    ("X-Client-Verify", "SUCCESS"),
    ("X-Forwarded-For", "127.0.0.1"),
]


async def attempt(lab: Lab, target: Target) -> Answer:
    request = charge()
    return await lab.attack(
        target, request | {"headers": [*request["headers"], *FORGED]}, svid=lab.svid("frontend")
    )


ATTACK = Attack(
    id="forged-identity-headers",
    title="Forged identity headers",
    story="Frontend was broken into, and calls payments with headers that say it is orders.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer(
            "identity-from-certificate",
            "caller_not_allowed",
            {"event": "request", "peer_id": spiffe_id("frontend")},
        ),
    ),
)
