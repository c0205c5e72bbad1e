"""Which transactions run again, which are refused as a whole, and what of an error is told to others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from ztmtls import transactions
from ztmtls.reasons import NoDatabase, Reason, Refusal
from ztmtls.transactions import ATTEMPTS, Database

SECRET = "who ordered what"


class DriverError(Exception):
    """What a driver raises: it has a state when a server gave one."""

    def __init__(self, sqlstate: str | None = None) -> None:
        super().__init__(SECRET)
        self.sqlstate = sqlstate


def error(state: str | None, kind: type[DBAPIError] = OperationalError, **more: Any) -> DBAPIError:
    return kind(SECRET, {}, DriverError(state), **more)


@pytest.fixture
async def database() -> AsyncIterator[Database]:
    # Nothing listens there: a transaction that issues no statement needs no connection.
    engine = create_async_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    yield Database(engine)
    await engine.dispose()


class Work:
    """Raises what it was given, one a run, then returns the number of runs."""

    def __init__(self, *raised: Exception) -> None:
        self.raised = list(raised)
        self.runs = 0

    async def __call__(self, session: AsyncSession) -> int:
        assert session.in_transaction()
        self.runs += 1
        if self.raised:
            raise self.raised.pop(0)
        return self.runs


AGAIN = {
    "serialization failure": error("40001"),
    "deadlock": error("40P01"),
    "connection failure": error("08006"),
    "server shutting down": error("57P01"),
    "server crashed": error("57P02"),
    "server starting up": error("57P03"),
    "server never reached": error(None),
    "driver lost the connection": error(None, InterfaceError),
    "connection found dead": error(None, ProgrammingError, connection_invalidated=True),
    "no login at the moment": NoDatabase(Reason.DATABASE_UNAVAILABLE, "away"),
}


@pytest.mark.parametrize("case", AGAIN)
async def test_what_may_pass_runs_again_as_a_whole(database: Database, case: str) -> None:
    work = Work(AGAIN[case], AGAIN[case])

    assert await database.run(work) == 3


@pytest.mark.parametrize("case", AGAIN)
async def test_what_does_not_pass_is_refused_after_a_few_runs(database: Database, case: str) -> None:
    work = Work(*[AGAIN[case]] * 9)

    with pytest.raises(NoDatabase) as caught:
        await database.run(work)

    assert work.runs == ATTEMPTS
    assert caught.value.reason is Reason.DATABASE_UNAVAILABLE
    assert caught.value.__cause__ is AGAIN[case]
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "reason", "detail"),
    [
        (error("55P03"), Reason.DATABASE_UNAVAILABLE, "DriverError 55P03"),
        (error("57014"), Reason.DATABASE_UNAVAILABLE, "DriverError 57014"),
        (error("53300"), Reason.DATABASE_UNAVAILABLE, "DriverError 53300"),
        (PoolTimeout(SECRET), Reason.DATABASE_UNAVAILABLE, "TimeoutError"),
        (NoDatabase(Reason.DATABASE_DENIED, "no login"), Reason.DATABASE_DENIED, "no login"),
        (Refusal(Reason.SECRET_DENIED, "no secret"), Reason.SECRET_DENIED, "no secret"),
    ],
)
async def test_busy_or_denied_is_refused_at_once(
    database: Database, raised: Exception, reason: Reason, detail: str
) -> None:
    work = Work(raised)

    with pytest.raises(NoDatabase) as caught:
        await database.run(work)

    assert (work.runs, caught.value.reason, caught.value.detail) == (1, reason, detail)


@pytest.mark.parametrize(
    "raised",
    [
        error("23505", IntegrityError),
        error("42501", ProgrammingError),
        error("0A000"),
        error(None, ProgrammingError),
        ValueError("ours"),
    ],
)
async def test_our_own_fault_is_raised_as_it_is(database: Database, raised: Exception) -> None:
    work = Work(raised)

    with pytest.raises(type(raised)) as caught:
        await database.run(work)

    assert caught.value is raised
    assert work.runs == 1


async def test_no_run_begins_after_the_time_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "NO_NEW_ATTEMPT_AFTER_SECONDS", -1.0)
    work = Work(error("40001"))

    with pytest.raises(NoDatabase):
        await database.run(work)

    assert work.runs == 1
