"""Somebody else's server answers where the database should be."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from tests.attacks.deeds import rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    """The same, where the database is the database."""
    return await rightful_charge(lab, lab.target("payments"))


async def attempt(lab: Lab, target: Target) -> Answer:
    """Payments logs in by itself as it starts. Succeeds when the impostor gets the password."""
    assert target.file is not None
    refused = asyncio.create_task(target.find(0, timeout=30.0, event="database"))
    while not refused.done():
        await asyncio.wait({refused}, timeout=0.05)
        if target.file.exists():
            refused.cancel()
            secret = await lab.stack.cloud.secret_value("zt-demo/payments/db")
            assert target.file.read_text() == secret["password"]
            return Answer(status=200, body="the password of payments")
    line = refused.result()
    return Answer(reason=line["reason"], error=line["detail"])


@contextlib.asynccontextmanager
async def misled(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """A `payments` whose way to the database ends at the impostor, which writes a password into the file."""
    with tempfile.TemporaryDirectory(prefix="zt-loot-") as folder:
        loot = Path(folder) / "password"
        async with (
            lab.impostor(lab.svid("rogue"), "impostor_database.py", loot=str(loot)) as port,
            lab.variant(left_out, "payments", {"DB_PORT": str(port)}, ready=False) as target,
        ):
            yield replace(target, file=loot)


ATTACK = Attack(
    id="impostor-database",
    title="Impostor database",
    story="Another server answers at the database's address, and asks payments for its password.",
    target="payments",
    door=misled,
    rightful=rightful,
    attempt=attempt,
    layers=(
        Layer("database-identity", "database_untrusted", {"event": "database"}, told="certificate verify"),
        Layer("database-proof", "database_untrusted", {"event": "database"}, told="authentication method"),
    ),
)
