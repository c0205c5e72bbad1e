"""The database login of orders in the database of payments."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from psycopg import sql

from tests.attacks.deeds import query
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target

LOGIN, GROUP, ROWS = "orders_app", "payments", "payments_rw"

#: What the administrator would have to grant for each control to be left out.
GRANTED = {"database-entry": GROUP, "table-rights": ROWS}


async def rightful(lab: Lab, target: Target) -> Answer:
    return await query(lab, "orders", "orders", "SELECT count(*) FROM orders")


async def attempt(lab: Lab, target: Target) -> Answer:
    return await query(lab, "orders", "payments", "SELECT * FROM public.charges")


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """The login of orders may connect to the database of payments; and use its rows."""
    login = sql.Identifier(LOGIN)
    async with lab.stack.postgres.administrator() as connection:
        try:
            for control in left_out:
                group = sql.Identifier(GRANTED[control])
                await connection.execute(sql.SQL("GRANT {} TO {}").format(group, login))
            yield lab.target("postgres")
        finally:
            for control in left_out:
                group = sql.Identifier(GRANTED[control])
                await connection.execute(sql.SQL("REVOKE {} FROM {}").format(group, login))


ATTACK = Attack(
    id="other-services-tables",
    title="SQL from another service's role",
    story="Orders was broken into, and reads the charges of payments with its own database login.",
    target="postgres",
    rightful=rightful,
    attempt=attempt,
    door=door,
    layers=(
        Layer("database-entry", "28000", {"severity": "FATAL"}, told="no pg_hba.conf entry"),
        Layer("table-rights", "42501", {"message": "permission denied for schema public at character 15"}),
    ),
)
