"""Somebody else's server answers where the database should be."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.deeds import rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    """The same, where the database is the database."""
    return await rightful_charge(lab, lab.target("payments"))


async def attempt(lab: Lab, target: Target) -> Answer:
    """Payments logs in by itself as it starts. Succeeds when the impostor gets the password."""
    line = await target.find(0, timeout=30.0, event="database")
    if "thank you for the password" in line["detail"]:
        return Answer(status=200, body=line["detail"])
    return Answer(reason=line["reason"], error=line["detail"])


@contextlib.asynccontextmanager
async def misled(lab: Lab, control: str | None) -> AsyncIterator[Target]:
    """A `payments` whose way to the database ends at the impostor."""
    async with (
        lab.impostor(lab.svid("rogue"), "impostor_database.py") as port,
        lab.variant(control, "payments", {"DB_PORT": str(port)}, ready=False) as target,
    ):
        yield target


ATTACK = Attack(
    id="impostor-database",
    title="Impostor database",
    story="Another server answers at the database's address, and asks payments for its password.",
    target="payments",
    against=lambda lab: misled(lab, None),
    without=lambda lab: misled(lab, "database-identity"),
    rightful=rightful,
    attempt=attempt,
    first=Layer("database-identity", "database_untrusted", {"event": "database"}, told="certificate verify"),
    second=Layer("database-proof", "database_untrusted", {"event": "database"}, told="authentication method"),
)
