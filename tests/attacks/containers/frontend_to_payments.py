"""Frontend goes to payments by itself."""

from __future__ import annotations

from tests.attacks.containers.container_lab import ContainerLab, in_the_network_of
from tests.attacks.lab import Answer, Attack, Layer, Target


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """Orders has business there, and connects."""
    return await lab.connect(await lab.network_of("orders"), "payments", 8443)


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    return await lab.connect(target.place, "payments", 8443)


ATTACK = Attack(
    id="frontend-to-payments",
    title="Frontend calls payments",
    story="Frontend was broken into, and calls payments, without orders in between.",
    target="payments",
    door=lambda lab, left_out: in_the_network_of(lab, left_out, "frontend", "orders-payments"),
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("network-segments", "no_route", None),),
)
