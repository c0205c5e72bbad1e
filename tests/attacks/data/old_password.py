"""A database password that was rotated away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.deeds import query
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

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
async def without(lab: Lab) -> AsyncIterator[Target]:
    """Nothing is rotated between the theft and the use."""
    postgres = lab.target("postgres")
    yield Target(UNROTATED, postgres.port, postgres.lines, postgres.tells_reason)


ATTACK = Attack(
    id="old-password",
    title="Old database password after rotation",
    story="Somebody copied payments' database login from a backup, and tries it two rotations later.",
    target="postgres",
    rightful=rightful,
    attempt=attempt,
    without=without,
    first=Layer("secret-rotation", "28P01", {"severity": "FATAL"}, told="password authentication failed"),
)
