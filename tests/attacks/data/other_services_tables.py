"""The database login of orders in the database of payments."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from psycopg import sql

from tests.attacks.deeds import query
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

LOGIN, GROUP = "orders_app", "payments"


async def rightful(lab: Lab, target: Target) -> Answer:
    return await query(lab, "orders", "orders", "SELECT count(*) FROM orders")


async def attempt(lab: Lab, target: Target) -> Answer:
    return await query(lab, "orders", "payments", "SELECT * FROM public.charges")


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The login of orders may connect to the database of payments."""
    login, group = sql.Identifier(LOGIN), sql.Identifier(GROUP)
    async with lab.stack.postgres.administrator() as connection:
        await connection.execute(sql.SQL("GRANT {} TO {}").format(group, login))
        try:
            yield lab.target("postgres")
        finally:
            await connection.execute(sql.SQL("REVOKE {} FROM {}").format(group, login))


ATTACK = Attack(
    id="other-services-tables",
    title="SQL from another service's role",
    story="Orders was broken into, and reads the charges of payments with its own database login.",
    target="postgres",
    rightful=rightful,
    attempt=attempt,
    without=without,
    first=Layer("database-entry", "28000", {"severity": "FATAL"}, told="no pg_hba.conf entry"),
    second=Layer("table-rights", "42501", {"message": "permission denied for schema public at character 15"}),
)
