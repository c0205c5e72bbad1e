"""Bring the schema to the revision that this code needs, and tell which one that is."""

from __future__ import annotations

import logging

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

logger = logging.getLogger(__name__)

OWNER_ROLE = "orders_owner"

# One number for this program: two migrations that start together run one after the other.
_ADVISORY_LOCK = 7_061_002


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "orders:migrations")
    return config


def revisions() -> tuple[str, ...]:
    """All revisions this code knows, newest first."""
    script = ScriptDirectory.from_config(_config())
    return tuple(step.revision for step in script.walk_revisions())


def upgrade(engine: Engine) -> None:
    """Apply the missing steps, all in one transaction.

    Objects are made by the owner role whoever logged in, so that it stays the owner when the login
    alternates between two users.
    """
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _ADVISORY_LOCK})
        connection.execute(text(f'SET LOCAL ROLE "{OWNER_ROLE}"'))
        before = current_revision(connection)
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        logger.info("schema is at revision %s (was: %s)", current_revision(connection), before)


def current_revision(connection: Connection) -> str | None:
    """The revision the database is at, or None when it holds no schema yet."""
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
