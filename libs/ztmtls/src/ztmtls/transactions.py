"""Transactions: run as a whole, again as a whole when PostgreSQL asks for it, or refused as a whole."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from .reasons import NoDatabase, Reason, Refusal

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 4
NO_NEW_ATTEMPT_AFTER_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.05

# Limits that the server keeps for us. A process that dies in the middle, or a host that vanishes, leaves
# its transaction behind: the last one ends it, and that is how soon an idempotency key is free again.
SESSION_LIMITS = {
    "lock_timeout": "4s",
    "statement_timeout": "8s",
    "idle_in_transaction_session_timeout": "10s",
}

# SQLSTATEs (PostgreSQL, appendix A) after which the same transaction may succeed.
_SERIALIZATION = frozenset({"40001", "40P01"})
_CONNECTION_GONE = frozenset({"57P01", "57P02", "57P03"})
_BUSY = frozenset({"55P03", "57014", "53300"})


class Database:
    """Runs whole transactions on an engine of `ztmtls.database.create_engine`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        event.listen(engine.sync_engine, "connect", _set_session_limits)

    async def run(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Run `work` in one transaction and commit it.

        After a serialization failure, a deadlock or a lost connection the whole of `work` runs again, a
        few times. That is safe only because `work` touches nothing but the database, and each of its
        writes is guarded by a unique key: a commit whose answer was lost is found by the next run.

        Raises `NoDatabase` when the database can't be reached or stays busy. Then nothing is lost: the
        same may be asked for again.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + NO_NEW_ATTEMPT_AFTER_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with AsyncSession(self.engine, expire_on_commit=False) as session, session.begin():
                    return await work(session)
            except (DBAPIError, PoolTimeout, Refusal) as error:
                if not _is_unavailability(error):
                    raise
                if attempt == ATTEMPTS or clock() > end or not _worth_repeating(error):
                    logger.warning("the database can't be used: %s", _name(error))
                    raise _no_database(error) from error
                logger.info("transaction runs again (attempt %d): %s", attempt + 1, _name(error))
            await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1))  # noqa: S311
        raise AssertionError("unreachable")


def _set_session_limits(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for name, value in SESSION_LIMITS.items():
        cursor.execute(f"SET {name} = '{value}'")
    cursor.close()
    connection.commit()


def _sqlstate(error: BaseException) -> str | None:
    return getattr(getattr(error, "orig", None), "sqlstate", None)


def _is_unavailability(error: Exception) -> bool:
    """Whether it is the database's state, not our statement, that is at fault."""
    return not isinstance(error, DBAPIError) or _worth_repeating(error) or _sqlstate(error) in _BUSY


def _worth_repeating(error: Exception) -> bool:
    """Whether the next attempt may well succeed at once."""
    if isinstance(error, Refusal):
        return error.reason is Reason.DATABASE_UNAVAILABLE
    if not isinstance(error, DBAPIError):  # the pool is empty: it was waited for already
        return False
    state = _sqlstate(error)
    if state is None:  # it never reached a server that could give one
        return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    return state.startswith("08") or state in _SERIALIZATION | _CONNECTION_GONE


def _name(error: Exception) -> str:
    if isinstance(error, Refusal):
        return str(error)
    # Never the text: it may quote what people ordered.
    return f"{type(getattr(error, 'orig', error)).__name__} {_sqlstate(error) or ''}".strip()


def _no_database(error: Exception) -> NoDatabase:
    if isinstance(error, Refusal):  # of the database, or of the secret: no login, so no database either
        return NoDatabase(error.reason, error.detail)
    return NoDatabase(Reason.DATABASE_UNAVAILABLE, _name(error))
