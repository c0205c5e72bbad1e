"""An SVID that has run out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    now = datetime.now(UTC)
    old = lab.svid("orders", not_before=now - timedelta(minutes=2), not_after=now - timedelta(seconds=2))
    return await lab.attack(target, charge(), svid=old)


ATTACK = Attack(
    id="expired-svid",
    title="Expired SVID",
    story="The attacker found a certificate of orders with its key, which ran out two seconds ago.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer("certificate-validity", "expired", {"event": "handshake", "detail": "certificate has expired"}),
        Layer("peer-verification", "expired", {"event": "handshake"}),
    ),
)
