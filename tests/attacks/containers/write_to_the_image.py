"""A service that was broken into changes its own program."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.containers.container_lab import ContainerLab, at
from tests.attacks.lab import Answer, Attack, Layer, LeftOut, Target

WRITE = """
def deed(path):
    open(path, "w").close()
    return path + " is written"
"""


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """What is for the moment is written."""
    return await _write(lab, target, "/tmp/scratch")


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    return await _write(lab, target, "/opt/zt/lib/python3.13/site-packages/sitecustomize.py")


async def _write(lab: ContainerLab, target: Target, path: str) -> Answer:
    return await lab.do(WRITE, {"path": path}, target.place, "zt-demo/orders:local")


@contextlib.asynccontextmanager
async def door(lab: ContainerLab, left_out: LeftOut) -> AsyncIterator[Target]:
    """A container of orders' image, held as orders is; then one that may be written to; then by root."""
    user = "0:0" if "ordinary-user" in left_out else ""
    yield at(await lab.held_as("orders", read_only="read-only-root" not in left_out, user=user))


ATTACK = Attack(
    id="write-to-the-image",
    title="A changed program",
    story="Orders was broken into, and leaves something behind that runs with it the next time.",
    target="orders",
    door=door,
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("read-only-root", "EROFS", None), Layer("ordinary-user", "EACCES", None)),
)
