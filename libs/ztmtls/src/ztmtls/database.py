"""SQLAlchemy engines for PostgreSQL whose login follows a rotating secret.

    engine = create_engine(secret, DatabaseTarget("db.example", 5432, "orders", "/etc/ztmtls/rds-ca.pem"))

- The password is asked of the secret at each new connection, and handed to the driver as a keyword: it is
  never part of a URL, of an exception or of a log line.
- TLS 1.3 with `sslmode=verify-full` is the only way. The server has to prove that it knows the password's
  verifier (SCRAM) on this very TLS channel (channel binding): RFC 5802, RFC 5929 section 4.
- A refused login asks the secret for a newer version once and tries again. When there is none yet, as in the
  middle of a rotation, it goes on trying at a pace of one login a second for `patience` seconds.
- Connections that an older version of the secret has opened are closed when they come back to the pool, or
  before they leave it. No transaction is cut. None gets older than `max_age` plus one transaction.

What fails while connecting is a `NoDatabase`, with one of the reasons

    database_untrusted    the server did not prove who it is (or there is no CA file to check it by)
    database_denied       the server is the right one and refuses the login
    database_unavailable  it is not there, not ready, or has no room

or a `Refusal` of the secret itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import Any, NoReturn, Protocol, TypeVar

import psycopg
import sqlalchemy
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from .audit import AuditLog
from .reasons import NoDatabase, Reason, Refusal, printable

__all__ = [
    "DatabaseTarget",
    "NoDatabase",
    "Secret",
    "SecretVersion",
    "check",
    "create_engine",
    "database_use",
    "keep_fresh",
    "renew_idle",
    "sync_engine",
]

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5
"""Seconds for one try at one address, name resolution excluded."""

MAX_AGE = 900.0
"""Seconds after which a pooled connection is opened anew, whatever the secret says."""

PATIENCE = 5.0
"""Seconds to go on with a refused login, as the password may be ahead of the secret."""

READ_TIMEOUT = 5.0
"""Seconds that a refused login waits for a newer version of the secret, when its patience is shorter."""

PACE = 1.0
"""Seconds between two tries with a login that was refused, and between two forced reads of the secret."""

_URL = "postgresql+psycopg://"

_C = TypeVar("_C")
_T = TypeVar("_T")


class SecretVersion(Protocol):
    """One version of a secret. `fields` holds at least `username` and `password`, of this same version."""

    @property
    def version_id(self) -> str: ...
    @property
    def fields(self) -> Mapping[str, str]: ...


class Secret(Protocol):
    """What is needed of `ztmtls.secrets.RotatingSecret`."""

    @property
    def secret_id(self) -> str: ...
    @property
    def current(self) -> SecretVersion | None: ...
    async def get(self) -> SecretVersion:
        """The version to log in with: from memory while it is fresh, or while there is no other."""
        ...

    async def refresh(self, *, force: bool = ...) -> object:
        """Ask for the newest version now; without `force` only when what is in memory is not fresh."""
        ...


@dataclass(frozen=True, slots=True)
class DatabaseTarget:
    """Where the database is, and by which authorities its server is known.

    `host` is the name that the server's certificate has to be for. `ca_file` is read at each new
    connection, so a new bundle counts as soon as it is in place.
    """

    host: str
    port: int
    name: str
    ca_file: str | PathLike[str]


def create_engine(
    secret: Secret,
    target: DatabaseTarget,
    *,
    application_name: str = "ztmtls",
    patience: float = PATIENCE,
    max_age: float = MAX_AGE,
    audit: AuditLog | None = None,
    **engine_options: Any,
) -> AsyncEngine:
    """An engine for `target` that logs in with what `secret` says at the time.

    A login that the database refuses, and a server that does not prove that it is the database, are lines of
    `audit` (event `database`).

    `engine_options` go to `sqlalchemy.ext.asyncio.create_async_engine`, except those by which a connection
    could be made in another way.
    """
    _refuse_other_ways(engine_options)
    connector = _Connector(secret, target, application_name, patience, audit)
    options: dict[str, Any] = {
        "pool_size": 5,
        "max_overflow": 5,
        "pool_timeout": 5.0,
        "pool_recycle": max_age,
        "pool_pre_ping": True,
        "hide_parameters": True,  # what people order is not for error messages
    }
    engine = create_async_engine(_URL, async_creator=connector.connect, **{**options, **engine_options})
    _follow(connector, engine.sync_engine)
    return engine


def sync_engine(
    secret: Secret,
    target: DatabaseTarget,
    *,
    application_name: str = "ztmtls",
    patience: float = PATIENCE,
    audit: AuditLog | None = None,
    **engine_options: Any,
) -> Engine:
    """The twin for code that does not await, such as migrations. It keeps no connection open after its use.

    The secret is asked in an event loop of its own, in a thread of its own, so this works in a coroutine too.
    """
    _refuse_other_ways(engine_options)
    connector = _Connector(secret, target, application_name, patience, audit)
    options: dict[str, Any] = {"poolclass": NullPool, "hide_parameters": True}
    engine = sqlalchemy.create_engine(_URL, creator=connector.connect_sync, **{**options, **engine_options})
    _follow(connector, engine)
    return engine


async def database_use(connection: AsyncConnection) -> dict[str, str | None]:
    """What this connection is, asked of the server itself, and the version of the secret that opened it.

    The keys are database, user, secret_id, secret_version, tls_version and tls_cipher. For a connection of an
    engine of `create_engine`.
    """
    row = (
        await connection.execute(
            text(
                "SELECT current_database(), current_user, tls.version, tls.cipher"
                " FROM pg_stat_ssl AS tls WHERE tls.pid = pg_backend_pid()"
            )
        )
    ).one()
    opened = (await connection.get_raw_connection()).driver_connection
    if not isinstance(opened, _OpenedAsync):
        raise TypeError("not a connection of an engine of ztmtls.database.create_engine")
    return {
        "database": row[0],
        "user": row[1],
        "secret_id": opened.secret_id,
        "secret_version": opened.secret_version,
        "tls_version": row[2],
        "tls_cipher": row[3],
    }


async def check(engine: AsyncEngine, timeout: float = 2.0) -> str | None:
    """For readiness: None when the database answers a query within `timeout` seconds, else a short reason."""
    try:
        async with asyncio.timeout(timeout), engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except Refusal as refusal:
        return str(refusal.reason)
    except TimeoutError:
        return f"{Reason.DATABASE_UNAVAILABLE}: no answer within {timeout:g} s"
    except PoolTimeout:
        return f"{Reason.DATABASE_UNAVAILABLE}: all connections are in use"
    except SQLAlchemyError:
        return str(Reason.DATABASE_UNAVAILABLE)
    return None


async def renew_idle(engine: AsyncEngine) -> None:
    """Open those idle connections of the pool anew that are too old or whose secret has changed.

    A pool looks at a connection when it is used. This is for those that nobody uses: without it a withdrawn
    login could stay in an idle pool for ever.
    """
    connector = _connectors[engine.sync_engine]
    with contextlib.suppress(Refusal):  # not to be had now: the last one counts on, and says so itself
        await connector.secret.get()
    idle = getattr(engine.pool, "checkedin", lambda: 0)()
    for _ in range(idle):  # first in, first out: each comes once
        async with engine.connect():
            pass


async def keep_fresh(engine: AsyncEngine, every: float = 30.0) -> NoReturn:
    """`renew_idle` every so many seconds until cancelled: run it as a task beside the server."""
    while True:
        await asyncio.sleep(every)
        try:
            await renew_idle(engine)
        except (Refusal, SQLAlchemyError) as error:
            # Not connecting is what the next request and the readiness check will report.
            logger.info(
                "idle connections could not be renewed: %s", getattr(error, "reason", type(error).__name__)
            )


# -- connecting


class _OpenedAsync(psycopg.AsyncConnection[Any]):
    """A connection that knows which version of which secret opened it."""

    secret_id = ""
    secret_version = ""


class _Opened(psycopg.Connection[Any]):
    """Its twin."""

    secret_id = ""
    secret_version = ""


def _close_unwanted(opening: asyncio.Task[_OpenedAsync]) -> None:
    """Whoever wanted it was cancelled: close it, once it is open."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().pgconn.finish()


class _LoginRefused(NoDatabase):
    """The server does not take this user name and password."""


class _Connector:
    """Opens connections with the secret of the moment, and recovers from refused logins one at a time.

    Many requests can find at the same moment that the password has changed. They form a queue here: the
    first one reads the secret again and tries, the others find the new version and need to do neither.
    While there is none, one login a second is tried for all of them together, so neither Secrets Manager
    nor the database is stormed.
    """

    def __init__(
        self,
        secret: Secret,
        target: DatabaseTarget,
        application_name: str,
        patience: float,
        audit: AuditLog | None = None,
        *,
        pace: float = PACE,
    ) -> None:
        self.secret = secret
        self.target = target
        self._application_name = application_name
        self._patience = patience
        self._audit = audit
        self._pace = pace
        self._refused_version: str | None = None
        self._last_try = float("-inf")
        self._problem = ""
        self._recovery = asyncio.Lock()
        self._thread_lock = threading.Lock()

    async def connect(self) -> _OpenedAsync:
        return await self.open(self._open_async)

    def connect_sync(self) -> _Opened:
        with self._thread_lock:
            return _run_in_own_loop(self.open(self._open_in_thread))

    def outdated(self, version_id: str) -> bool:
        """Whether a connection of this version should give way. Not to a version that the database
        refuses."""
        current = self.secret.current
        return current is not None and current.version_id not in (version_id, self._refused_version)

    async def open(self, opener: Callable[[SecretVersion], Awaitable[_C]]) -> _C:
        """Open with the current version; recover when its login is refused."""
        began = time.monotonic()
        version = await self.secret.get()
        if version.version_id != self._refused_version:
            try:
                return await opener(version)
            except _LoginRefused as refusal:
                logger.warning("%s; asking for a newer version of the secret", refusal)
                self._refused_version = version.version_id
        async with self._recovery:
            return await self._recover(opener, began)

    async def _recover(self, opener: Callable[[SecretVersion], Awaitable[_C]], began: float) -> _C:
        deadline = began + self._patience
        while True:
            version = await self.secret.get()
            if version.version_id == self._refused_version:
                now = time.monotonic()
                pause = self._last_try + self._pace - now
                # Whoever waited in the queue need not try what has been tried since he came.
                if (pause > 0 or self._last_try >= began) and now + max(0.0, pause) > deadline:
                    raise NoDatabase(Reason.DATABASE_DENIED, self._refusal_detail(version) + self._problem)
                await asyncio.sleep(pause)
                self._last_try = time.monotonic()
                self._problem = await self._read_again(deadline)
                version = await self.secret.get()
            try:
                opened = await opener(version)
            except _LoginRefused:
                self._refused_version = version.version_id
                continue
            self._refused_version = None
            return opened

    async def _read_again(self, deadline: float) -> str:
        """Ask for the newest version of the secret. The answer is what was in the way, for the refusal."""
        try:
            # A read that takes longer goes on, for whoever comes next.
            async with asyncio.timeout(max(deadline - time.monotonic(), READ_TIMEOUT)):
                await self.secret.refresh(force=True)
        except Refusal as refusal:
            return f"; the secret could not be read again ({refusal})"
        except TimeoutError:
            return "; the secret could not be read again (no answer in time)"
        return ""

    def _refusal_detail(self, version: SecretVersion) -> str:
        target = self.target
        return (
            f"the database {target.name} at {target.host}:{target.port} refuses the login of "
            f"{printable(version.fields.get('username', ''), 64)!r} "
            f"(secret {self.secret.secret_id}, version {version.version_id})"
        )

    # Each of the next two raises outside of its `except` block: psycopg's exception, whose frames hold the
    # password, is not even the context of ours.

    async def _open_async(self, version: SecretVersion) -> _OpenedAsync:
        opening = asyncio.create_task(_OpenedAsync.connect(**self.parameters(version)))
        try:
            opened = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # Cut off, psycopg would leave the session to the garbage collector.
            opening.add_done_callback(_close_unwanted)
            raise
        except psycopg.Error as error:
            failure = self._refused(error, version)
        else:
            opened.secret_id, opened.secret_version = self.secret.secret_id, version.version_id
            return opened
        raise failure

    def _open_sync(self, version: SecretVersion) -> _Opened:
        try:
            opened = _Opened.connect(**self.parameters(version))
        except psycopg.Error as error:
            failure = self._refused(error, version)
        else:
            opened.secret_id, opened.secret_version = self.secret.secret_id, version.version_id
            return opened
        raise failure

    async def _open_in_thread(self, version: SecretVersion) -> _Opened:
        return await asyncio.to_thread(self._open_sync, version)

    def parameters(self, version: SecretVersion) -> dict[str, Any]:
        """Everything that libpq is told. What stands here is not taken from PG* variables or
        ~/.postgresql."""
        missing = [name for name in ("username", "password") if not version.fields.get(name)]
        if missing:
            raise NoDatabase(
                Reason.SECRET_MALFORMED,
                f"secret {self.secret.secret_id}, version {version.version_id}, has no "
                f"{' and no '.join(missing)}",
            )
        return {
            "host": self.target.host,
            "port": self.target.port,
            "dbname": self.target.name,
            "user": version.fields["username"],
            "password": version.fields["password"],
            "sslmode": "verify-full",
            "sslrootcert": str(self.target.ca_file),
            "ssl_min_protocol_version": "TLSv1.3",
            "sslcertmode": "disable",
            "gssencmode": "disable",
            "require_auth": "scram-sha-256",
            "channel_binding": "require",
            "application_name": self._application_name,
            "options": "",
            "connect_timeout": CONNECT_TIMEOUT,
            "keepalives": 1,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }

    def _refused(self, error: psycopg.Error, version: SecretVersion) -> NoDatabase:
        failure = self.explain(error, version)
        if self._audit is not None and failure.reason is not Reason.DATABASE_UNAVAILABLE:
            self._audit.record("database", "deny", reason=failure.reason, detail=failure.detail)
        return failure

    def explain(self, error: psycopg.Error, version: SecretVersion) -> NoDatabase:
        """The failure as a refusal that says what to look at."""
        message = " ".join(str(error).split()).removeprefix("connection failed: ")
        message = message.partition(" Either provide the file")[0]  # or do without: libpq's hint, not ours
        for secret in sorted(map(str, version.fields.values()), key=len, reverse=True):
            # libpq does not quote passwords. Should it ever: not here.
            if secret and secret == version.fields.get("password"):
                message = message.replace(secret, "***")
        target = self.target
        match _reason_of(error.sqlstate, message):
            case Reason.DATABASE_DENIED:
                return _LoginRefused(Reason.DATABASE_DENIED, self._refusal_detail(version))
            case Reason.DATABASE_UNTRUSTED:
                return NoDatabase(
                    Reason.DATABASE_UNTRUSTED,
                    f"{target.host}:{target.port} did not prove that it is the database, by the "
                    "authorities in "
                    f"{target.ca_file}: {printable(message, 400)}",
                )
            case reason:
                return NoDatabase(
                    reason, f"{target.host}:{target.port}, database {target.name}: {printable(message, 400)}"
                )


#: invalid_authorization_specification (unknown or barred role, no line in pg_hba.conf) and invalid_password.
_DENIED_STATES = frozenset({"28000", "28P01"})

#: libpq gives no SQLSTATE for what happens before a session exists, so the text has to tell. These are the
#: server's words, which are English unless its `lc_messages` says otherwise (RDS does not).
_DENIED_TEXTS = (
    "password authentication failed",
    "no pg_hba.conf entry",
    "pg_hba.conf rejects connection",
    "is not permitted to log in",
    "permission denied for database",
)

#: And these are libpq's own.
_UNTRUSTED_TEXTS = (
    "root certificate file",
    "could not read root certificate",
    "certificate verify failed",
    "does not match host name",
    "could not get server's host name from server certificate",
    "server does not support ssl",
    "ssl error",
    "tlsv1 alert",
    "channel binding",
    "authentication method requirement",
    "server signature",
)


def _reason_of(sqlstate: str | None, message: str) -> Reason:
    lowered = message.lower()
    # First what the server says: a certificate's trouble ends the connection before it can say anything.
    if sqlstate in _DENIED_STATES or any(part in lowered for part in _DENIED_TEXTS):
        return Reason.DATABASE_DENIED
    if any(part in lowered for part in _UNTRUSTED_TEXTS):
        return Reason.DATABASE_UNTRUSTED
    return Reason.DATABASE_UNAVAILABLE


def _run_in_own_loop(work: Coroutine[Any, Any, _T]) -> _T:
    """Also when the calling thread has a running loop, which must not be entered twice."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ztmtls-database") as executor:
        return executor.submit(asyncio.run, work).result()


# -- the pool

_connectors: weakref.WeakKeyDictionary[Engine, _Connector] = weakref.WeakKeyDictionary()

_OTHER_WAYS = ("async_creator", "connect_args", "creator", "pool", "url")


def _refuse_other_ways(options: Mapping[str, Any]) -> None:
    found = [name for name in _OTHER_WAYS if name in options]
    if found:
        raise TypeError(f"{', '.join(found)}: connections are made by ztmtls.database alone")


def _follow(connector: _Connector, engine: Engine) -> None:
    """Let the pool of this engine follow the secret."""
    _connectors[engine] = connector

    def outdated(entry: ConnectionPoolEntry) -> bool:
        opened = entry.driver_connection
        return isinstance(opened, _OpenedAsync | _Opened) and connector.outdated(opened.secret_version)

    @event.listens_for(engine, "checkin")
    def _close_outdated(_: object, entry: ConnectionPoolEntry) -> None:
        if outdated(entry):
            entry.invalidate()

    @event.listens_for(engine, "checkout")
    def _replace_outdated(_: object, entry: ConnectionPoolEntry, __: object) -> None:
        if outdated(entry):
            raise DisconnectionError("the secret has a newer version")
