"""A service asks where only SPIRE's registrar may: at the server's private socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.containers.container_lab import ContainerLab, at
from tests.attacks.lab import Answer, Attack, Layer, LeftOut, Target

ASK = """
import socket
def deed(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
    return "connected to " + path
"""


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """The agent's socket is there for all."""
    return await _ask(lab, target, "/run/spire/agent.sock")


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    """Who reaches this one registers whom he likes."""
    return await _ask(lab, target, "/srv/spire/socket/api.sock")


async def _ask(lab: ContainerLab, target: Target, path: str) -> Answer:
    return await lab.do(ASK, {"path": path}, target.place, "zt-demo/orders:local")


@contextlib.asynccontextmanager
async def door(lab: ContainerLab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With the volumes that orders mounts; with something left out, also with that of the server's socket."""
    more = ("--volume", f"{lab.project.name}_spire-socket:/srv/spire/socket") if left_out else ()
    yield at((*await lab.held_as("orders"), *more))


ATTACK = Attack(
    id="another-containers-socket",
    title="Another container's socket",
    story="Orders was broken into, and looks for the socket at which identities are registered.",
    target="identity",
    door=door,
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("own-volumes", "ENOENT", None),),
)
