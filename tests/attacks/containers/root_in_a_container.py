"""Who has become root in a container makes use of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.containers.container_lab import ContainerLab, at
from tests.attacks.lab import Answer, Attack, Layer, LeftOut, Target

USE = """
import os
def deed(own):
    assert os.getuid() == 0
    if own:
        open("/tmp/own", "w").close()
    else:  # be somebody else, whose files one then has
        os.setgid(999)
        os.setuid(999)
    return f"user {os.getuid()}"
"""


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """Root's own files are its own."""
    return await _use(lab, target, own=True)


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    """Root takes on the user of the database."""
    return await _use(lab, target, own=False)


async def _use(lab: ContainerLab, target: Target, *, own: bool) -> Answer:
    return await lab.do(USE, {"own": own}, target.place, "zt-demo/payments:local")


@contextlib.asynccontextmanager
async def door(lab: ContainerLab, left_out: LeftOut) -> AsyncIterator[Target]:
    """Root, held as payments is; with something left out, with the capabilities that Docker gives."""
    yield at(await lab.held_as("payments", capless=not left_out, user="0:0"))


ATTACK = Attack(
    id="root-in-a-container",
    title="Root without rights",
    story="Somebody has found a way to be root in payments' container, and takes on another user.",
    target="payments",
    door=door,
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("no-capabilities", "EPERM", None),),
)
