"""A database password that was rotated away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from tests.attacks.deeds import query
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target

UNROTATED = "postgres-unrotated"


async def rightful(lab: Lab, target: Target) -> Answer:
    return await query(lab, "payments", "payments", "SELECT 1")


async def attempt(lab: Lab, target: Target) -> Answer:
    """The login is stolen now and used later. Two logins take turns: the second rotation renews this one."""
    stolen = await lab.stack.cloud.secret_value("zt-demo/payments/db")
    if target.name != UNROTATED:
        for _ in range(2):
            await lab.stack.rotations.rotate("payments")
    return await query(lab, "payments", "payments", "SELECT 1", login=stolen)


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With something left out, nothing is rotated between the theft and the use."""
    postgres = lab.target("postgres")
    yield replace(postgres, name=UNROTATED) if left_out else postgres


ATTACK = Attack(
    id="old-password",
    title="Old database password after rotation",
    story="Somebody copied payments' database login from a backup, and tries it two rotations later.",
    target="postgres",
    rightful=rightful,
    attempt=attempt,
    door=door,
    layers=(Layer("secret-rotation", "28P01", {"severity": "FATAL"}, told="password authentication failed"),),
)
