"""The schema of a database: brought to the revision that the code needs, and whether it is there.

The steps are Alembic's, in a package of the service: `env.py`, which runs them on
``context.config.attributes["connection"]``, and `versions/`. That package names them once:

    MIGRATIONS = Migrations(__name__, owner="orders_owner")
"""

from __future__ import annotations

import asyncio
import logging
import time

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.ext.asyncio import AsyncSession

from .lifecycle import wait_for
from .reasons import NoDatabase, Refusal
from .transactions import Database

logger = logging.getLogger(__name__)

FRESH_SECONDS = 2.0
"""An answer of the database counts for so long."""

# One number for all programs, within one database: migrations that start together run one after the other.
_ADVISORY_LOCK = 7_061_001


class Migrations:
    """The steps in `package`, run as the role `owner`."""

    def __init__(self, package: str, owner: str) -> None:
        self._package = package
        self._owner = owner

    def revisions(self) -> tuple[str, ...]:
        """All revisions this code knows, newest first."""
        script = ScriptDirectory.from_config(self._config())
        return tuple(step.revision for step in script.walk_revisions())

    def upgrade(self, engine: Engine) -> None:
        """Apply the missing steps, all in one transaction.

        Objects are made by the owner role whoever logged in, so that it stays the owner when the login
        alternates between two users.
        """
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _ADVISORY_LOCK})
            connection.execute(text(f'SET LOCAL ROLE "{self._owner}"'))
            before = current_revision(connection)
            config = self._config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            logger.info("schema is at revision %s (was: %s)", current_revision(connection), before)

    async def upgrade_when_possible(self, engine: Engine, timeout: float | None) -> None:
        """Like `upgrade`, as soon as the database can be used.

        Raises `ztmtls.lifecycle.StartupTimeout` after `timeout` seconds; None waits for ever.
        """

        async def attempt() -> str | None:
            try:
                await asyncio.to_thread(self.upgrade, engine)
            except Refusal as refusal:
                return str(refusal)
            return None

        await wait_for(attempt, timeout)

    def _config(self) -> Config:
        config = Config()
        config.set_main_option("script_location", self._package.replace(".", ":"))
        return config


def current_revision(connection: Connection) -> str | None:
    """The revision the database is at, or None when it holds no schema yet."""
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


class DatabaseHealth:
    """Whether the database answered recently, and holds the schema that this code needs."""

    def __init__(self, database: Database, migrations: Migrations) -> None:
        self._database = database
        self._known = migrations.revisions()
        self._asking = asyncio.Lock()
        self._asked_at = float("-inf")
        self._fault: str | None = None

    async def check(self) -> str | None:
        """None when all is well, else what is wrong. A check for `ztmtls.probes`."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= FRESH_SECONDS:
                self._fault = await self._ask()
                self._asked_at = time.monotonic()
            return self._fault

    async def _ask(self) -> str | None:
        try:
            revision = await self._database.run(_revision)
        except NoDatabase as missing:
            return str(missing.reason)
        # A revision unknown to us is a newer one, and steps are made so that the code before them goes on.
        if revision is None or revision in self._known[1:]:
            return f"migrations are pending: the schema is at {revision}, this code needs {self._known[0]}"
        return None


async def _revision(session: AsyncSession) -> str | None:
    return await (await session.connection()).run_sync(current_revision)
