"""Whether the database lets this process do its work: for readiness, and to wait for at the start."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import AsyncSession

from ztmtls.fastapi import Problem
from ztmtls.reasons import Reason, Refusal

from .database import Database
from .migrate import current_revision, revisions

logger = logging.getLogger(__name__)

FRESH_SECONDS = 2.0
"""An answer of the database counts for so long."""


class StartupTimeout(Refusal):
    """What the service needs was not there in time. Reason: `dependency_unavailable`."""


class DatabaseHealth:
    """Whether the database answered recently, and holds the schema that this code needs."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known = revisions()
        self._asking = asyncio.Lock()
        self._asked_at = float("-inf")
        self._fault: str | None = None

    async def check(self) -> str | None:
        """None when all is well, else what is wrong."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= FRESH_SECONDS:
                self._fault = await self._ask()
                self._asked_at = time.monotonic()
            return self._fault

    async def _ask(self) -> str | None:
        try:
            revision = await self._database.run(_revision)
        except Problem as problem:
            return str(problem.reason)
        # A revision unknown to us is a newer one, and steps are made so that the code before them goes on.
        if revision is None or revision in self._known[1:]:
            return f"migrations are pending: the schema is at {revision}, this code needs {self._known[0]}"
        return None


async def _revision(session: AsyncSession) -> str | None:
    return await (await session.connection()).run_sync(current_revision)


async def wait_for(check: Callable[[], Awaitable[str | None]], timeout: float | None) -> None:
    """Return when `check` finds nothing wrong. Each new fault is one line in the log.

    Raises `StartupTimeout` with the last fault after `timeout` seconds; None waits for ever.
    """
    said, pause = None, 0.25
    try:
        async with asyncio.timeout(timeout):
            while (fault := await check()) is not None:
                if fault != said:
                    logger.warning("waiting: %s", fault)
                said = fault
                await asyncio.sleep(pause)
                pause = min(pause * 2, FRESH_SECONDS)
    except TimeoutError:
        raise StartupTimeout(Reason.DEPENDENCY_UNAVAILABLE, f"after {timeout:g} s: {said}") from None
