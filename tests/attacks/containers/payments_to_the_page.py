"""Payments goes to the network that people are on."""

from __future__ import annotations

from tests.attacks.containers.container_lab import ContainerLab, in_the_network_of
from tests.attacks.lab import Answer, Attack, Layer, Target


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """Orders has business there, and connects."""
    return await lab.connect(await lab.network_of("orders"), "frontend", 8080)


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    return await lab.connect(target.place, "frontend", 8080)


ATTACK = Attack(
    id="payments-to-the-page",
    title="Payments calls the page",
    story="Payments was broken into, and talks to people through the page, from behind.",
    target="frontend",
    door=lambda lab, left_out: in_the_network_of(lab, left_out, "payments", "frontend-orders"),
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("network-segments", "no_route", None),),
)
