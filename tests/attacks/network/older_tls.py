"""A caller that can only speak an older TLS."""

from __future__ import annotations

from tests.attacks.deeds import STATUS, rightful_status
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, STATUS, svid=lab.svid("orders"), maximum="1.2")


ATTACK = Attack(
    id="older-tls",
    title="Downgraded TLS",
    story="Somebody on the way makes both sides speak TLS 1.2, which shows certificates in the clear.",
    target="payments",
    rightful=rightful_status,
    attempt=attempt,
    layers=(Layer("tls-version", "tls_failure", {"event": "handshake"}),),
)
