"""A name that somebody else points at our address (DNS rebinding)."""

from __future__ import annotations

from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, {"path": "/"}, tls=False)


async def attempt(lab: Lab, target: Target) -> Answer:
    request = {"path": "/", "headers": [("Host", f"evil.example:{target.port}")]}
    return await lab.attack(target, request, tls=False)


ATTACK = Attack(
    id="other-host-name",
    title="Host name pointing elsewhere",
    story="The attacker's name is pointed at this address, so that its page may read our answers.",
    target="frontend",
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("own-host-name", "host_not_allowed", {"event": "door"}),),
)
