"""A container goes to the machine that it runs on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from tests.attacks.containers.container_lab import ContainerLab, Place, at
from tests.attacks.lab import Answer, Attack, Layer, LeftOut, Target
from tests.compose.project import gateways

#: The network that the engine itself brings.
ORDINARY: Place = ("--network", "bridge")


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """An ordinary container, on the engine's own network, reaches it: somebody listens there."""
    return await _connect(ORDINARY, lab)


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    return await _connect(target.place, lab)


async def _connect(place: Place, lab: ContainerLab) -> Answer:
    """Call each address that the machine has towards containers; somebody listens there."""
    with contextlib.ExitStack() as stack:
        addresses = await asyncio.to_thread(gateways, lab.project.name)
        servers = [stack.enter_context(socket.create_server((address, 0))) for address in addresses]
        return await lab.call(place, [server.getsockname() for server in servers])


@contextlib.asynccontextmanager
async def door(lab: ContainerLab, left_out: LeftOut) -> AsyncIterator[Target]:
    """In the place of orders; with something left out, on a network that is like any other."""
    yield at(ORDINARY if left_out else await lab.network_of("orders"))


ATTACK = Attack(
    id="inside-to-the-machine",
    title="A service calls the machine",
    story="Orders was broken into, and calls what listens on the machine that runs the containers.",
    target="orders",
    door=door,
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("no-way-out", "no_route", None),),
)
