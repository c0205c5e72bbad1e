"""The database goes to the server that identities come from."""

from __future__ import annotations

from tests.attacks.containers.container_lab import ContainerLab, in_the_network_of
from tests.attacks.lab import Answer, Attack, Layer, Target


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """Spire-agent has business there, and connects."""
    return await lab.connect(await lab.network_of("spire-agent"), "spire-server", 8081)


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    return await lab.connect(target.place, "spire-server", 8081)


ATTACK = Attack(
    id="database-to-identity",
    title="The database calls SPIRE",
    story="The database was broken into, and calls SPIRE's server, to be somebody there.",
    target="identity",
    door=lambda lab, left_out: in_the_network_of(lab, left_out, "postgres", "identity"),
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("network-segments", "no_route", None),),
)
