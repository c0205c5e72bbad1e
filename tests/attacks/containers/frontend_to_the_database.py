"""Frontend goes to a database."""

from __future__ import annotations

from tests.attacks.containers.container_lab import ContainerLab, in_the_network_of
from tests.attacks.lab import Answer, Attack, Layer, Target


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """Orders has business there, and connects."""
    return await lab.connect(await lab.network_of("orders"), "postgres", 5432)


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    return await lab.connect(target.place, "postgres", 5432)


ATTACK = Attack(
    id="frontend-to-the-database",
    title="Frontend calls the database",
    story="Frontend was broken into, and looks for the database where orders finds it.",
    target="postgres",
    door=lambda lab, left_out: in_the_network_of(lab, left_out, "frontend", "orders-db"),
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("network-segments", "no_route", None),),
)
