"""The database: a real PostgreSQL, reached as the services reach it. Each test makes its own engine."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ztdev.errors import AlreadyRunning, DiskFull, NotReady, PortInUse, ProgramMissing, StateUnusable
from ztdev.ports import choose_free_ports
from ztdev.postgres import PostgresServer, make_server_tls, roles
from ztdev.postgres import server as server_module
from ztdev.postgres.binaries import Wheel
from ztdev.processes import ProcessRef
from ztmtls.database import (
    DatabaseTarget,
    NoDatabase,
    check,
    create_engine,
    database_use,
    keep_fresh,
    renew_idle,
    sync_engine,
)
from ztmtls.reasons import Reason

pytestmark = pytest.mark.asyncio(loop_scope="module")

CANARY = "Zz-CANARY-%40/:#'\\ \""


@dataclass(frozen=True)
class Version:
    version_id: str
    fields: Mapping[str, str] = field(repr=False)


class Secret:
    """A secret as a service sees it: what was fetched last counts until it is fetched anew."""

    def __init__(self, secret_id: str, username: str, password: str) -> None:
        self.secret_id = secret_id
        self.stored = Version("v1", {"username": username, "password": password})
        self.current: Version | None = None
        self.refreshes = 0

    def put(self, username: str, password: str) -> str:
        """A new version on the other side; nobody here knows of it yet."""
        name = f"v{int(self.stored.version_id[1:]) + 1}"
        self.stored = Version(name, {"username": username, "password": password})
        return name

    async def get(self) -> Version:
        if self.current is None:
            self.current = self.stored
        return self.current

    async def refresh(self, *, force: bool = False) -> Version:
        assert force
        self.refreshes += 1
        await asyncio.sleep(0)
        self.current = self.stored
        return self.current


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PostgresServer]:
    port = choose_free_ports(1)[0]
    postgres = PostgresServer(tmp_path_factory.mktemp("postgres") / "db", port)
    async with postgres:
        await postgres.ensure_service("orders", app_password=CANARY, owner_password="owner-" + CANARY)
        await postgres.ensure_service("payments", app_password="p-app", owner_password="p-owner")
        with owner_connection(postgres, "orders", "owner-" + CANARY) as connection:
            connection.execute("CREATE TABLE orders (id int PRIMARY KEY, note text)")
        with owner_connection(postgres, "payments", "p-owner") as connection:
            connection.execute("CREATE TABLE ledger (id int PRIMARY KEY)")
        yield postgres


def owner_connection(server: PostgresServer, service: str, password: str) -> psycopg.Connection[Any]:
    return psycopg.connect(
        host=server.host,
        port=server.port,
        dbname=service,
        user=f"{service}_owner",
        password=password,
        sslmode="verify-full",
        sslrootcert=str(server.ca_file),
    )


def target(server: PostgresServer, name: str = "orders", **changes: Any) -> DatabaseTarget:
    return DatabaseTarget(
        **{"host": server.host, "port": server.port, "name": name, "ca_file": server.ca_file, **changes}
    )


def orders_secret() -> Secret:
    return Secret("zt-demo/orders/db", "orders_app", CANARY)


@asynccontextmanager
async def engine_for(secret: Secret, where: DatabaseTarget, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(secret, where, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def password(server: PostgresServer, role: str, new: str, old: str) -> AsyncIterator[None]:
    """Another password for a while."""
    await server.set_password(role, new)
    try:
        yield
    finally:
        await server.set_password(role, old)


async def until(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        await asyncio.sleep(0.02)


async def refusal(engine: AsyncEngine) -> NoDatabase:
    with pytest.raises(NoDatabase) as caught:
        async with engine.connect():
            pass
    return caught.value


# -- the way to the server


async def test_service_logs_in_over_verified_tls_1_3(server: PostgresServer) -> None:
    async with engine_for(orders_secret(), target(server)) as engine, engine.connect() as connection:
        assert await database_use(connection) == {
            "database": "orders",
            "user": "orders_app",
            "secret_id": "zt-demo/orders/db",
            "secret_version": "v1",
            "tls_version": "TLSv1.3",
            "tls_cipher": "TLS_AES_256_GCM_SHA384",
        }


async def test_host_name_serves_as_well_as_the_address(server: PostgresServer) -> None:
    async with engine_for(orders_secret(), target(server, host="localhost")) as engine:
        assert await check(engine) is None


async def test_server_of_another_authority_is_refused(server: PostgresServer, tmp_path: Path) -> None:
    other = tmp_path / "other-ca.pem"
    other.write_bytes(make_server_tls().authorities)

    async with engine_for(orders_secret(), target(server, ca_file=other)) as engine:
        failure = await refusal(engine)

    assert failure.reason is Reason.DATABASE_UNTRUSTED
    assert str(other) in failure.detail


async def test_missing_ca_file_is_refused_and_named(server: PostgresServer, tmp_path: Path) -> None:
    async with engine_for(orders_secret(), target(server, ca_file=tmp_path / "none.pem")) as engine:
        failure = await refusal(engine)
        readiness = await check(engine)

    assert failure.reason is Reason.DATABASE_UNTRUSTED
    assert str(tmp_path / "none.pem") in failure.detail
    assert readiness == "database_untrusted"


async def test_certificate_for_another_host_is_refused(server: PostgresServer) -> None:
    elsewhere = make_server_tls(["db.elsewhere.example"])
    async with engine_for(orders_secret(), target(server)) as engine:
        server.trust(elsewhere)
        await server.use_certificate(elsewhere)
        try:
            failure = await refusal(engine)
        finally:
            await server.rotate_authority()
        assert await check(engine) is None

    assert failure.reason is Reason.DATABASE_UNTRUSTED
    assert "db.elsewhere.example" in failure.detail


async def test_rotated_authority_of_the_server(server: PostgresServer) -> None:
    """Clients that trust both go on; those that trust only the old one fail closed and name the file."""
    old, new = make_server_tls(), make_server_tls()
    server.trust(old)
    await server.use_certificate(old)
    async with engine_for(orders_secret(), target(server), pool_size=1) as engine:
        assert await check(engine) is None

        server.trust(old, new)
        await server.use_certificate(new)
        await engine.dispose()
        assert await check(engine) is None

        server.trust(old)
        await engine.dispose()
        failure = await refusal(engine)
        assert failure.reason is Reason.DATABASE_UNTRUSTED
        assert str(server.ca_file) in failure.detail

        await server.rotate_authority()
        assert await check(engine) is None


@pytest.mark.parametrize(
    ("way", "because"),
    [
        ({"sslmode": "disable"}, "no encryption"),
        ({"ssl_max_protocol_version": "TLSv1.2"}, "SSL"),
        ({"user": "postgres"}, "pg_hba.conf"),
        ({"user": "orders_rw"}, "authentication failed|pg_hba.conf|not permitted"),
        ({"user": "orders"}, "authentication failed|not permitted"),
        ({"user": "orders_app_clone"}, "authentication failed"),
        ({"dbname": "postgres"}, "no pg_hba.conf entry"),
        ({"dbname": "template1"}, "no pg_hba.conf entry"),
    ],
)
async def test_other_ways_in_are_closed(server: PostgresServer, way: dict[str, Any], because: str) -> None:
    parameters: dict[str, Any] = {
        "host": server.host,
        "port": server.port,
        "dbname": "orders",
        "user": "orders_app",
        "password": CANARY,
        "sslmode": "require",
    }
    await (await psycopg.AsyncConnection.connect(**parameters)).close()

    with pytest.raises(psycopg.OperationalError, match=because):
        await psycopg.AsyncConnection.connect(**{**parameters, **way})


# -- what a service may do


async def test_service_reads_and_writes_rows(server: PostgresServer) -> None:
    async with engine_for(orders_secret(), target(server)) as engine, engine.begin() as connection:
        await connection.execute(text("INSERT INTO orders VALUES (1, 'a')"))
        await connection.execute(text("UPDATE orders SET note = 'b' WHERE id = 1"))
        assert (await connection.execute(text("SELECT note FROM orders WHERE id = 1"))).scalar() == "b"
        await connection.execute(text("DELETE FROM orders WHERE id = 1"))


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (id int)",
        "CREATE TEMPORARY TABLE mine (id int)",
        "CREATE SCHEMA mine",
        "ALTER TABLE orders ADD COLUMN more text",
        "DROP TABLE orders",
        "TRUNCATE orders",
        "SET ROLE orders_owner",
        "SET ROLE orders_rw",
        "ALTER ROLE orders_owner PASSWORD 'x'",
        "ALTER ROLE orders_app_clone PASSWORD 'x'",
        "CREATE ROLE mine",
        "CREATE DATABASE mine",
        "SELECT pg_read_file('/etc/passwd')",
        "COPY orders TO PROGRAM 'cat'",
    ],
)
async def test_service_may_do_nothing_else(server: PostgresServer, statement: str) -> None:
    async with (
        engine_for(orders_secret(), target(server), isolation_level="AUTOCOMMIT") as engine,
        engine.connect() as connection,
    ):
        await connection.execute(text("SELECT note FROM orders"))

        with pytest.raises(ProgrammingError) as caught:
            await connection.execute(text(statement))

    assert isinstance(caught.value.orig, psycopg.errors.InsufficientPrivilege)


@pytest.mark.parametrize("login", ["orders_app", "orders_owner"])
async def test_service_cannot_reach_the_other_services_database(server: PostgresServer, login: str) -> None:
    right = CANARY if login == "orders_app" else "owner-" + CANARY
    secret = Secret("zt-demo/orders/db", login, right)
    async with engine_for(secret, target(server, "orders")) as engine:
        assert await check(engine) is None

    async with engine_for(secret, target(server, "payments"), patience=0) as engine:
        failure = await refusal(engine)

    assert failure.reason is Reason.DATABASE_DENIED
    assert "payments" in failure.detail


async def test_second_layer_keeps_services_apart_when_the_first_lets_them_in(server: PostgresServer) -> None:
    """Were pg_hba.conf to name them, the right to connect is still missing."""
    async with server.administrator() as connection:
        rows = await (
            await connection.execute(
                "SELECT rolname FROM pg_roles WHERE has_database_privilege(oid, 'payments', 'CONNECT')"
                " AND NOT rolsuper AND rolname NOT LIKE 'pg\\_%'"
            )
        ).fetchall()

    assert {row[0] for row in rows} == {"payments", "payments_owner", "payments_app", "payments_app_clone"}


async def test_owner_migrates_and_both_twins_may_use_the_new_table(server: PostgresServer) -> None:
    owner = Secret("zt-demo/orders/db-owner", "orders_owner", "owner-" + CANARY)
    engine = sync_engine(owner, target(server))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE made_later (id serial PRIMARY KEY)"))
    engine.dispose()
    await server.set_password("orders_app_clone", "twin")

    for user, right in (("orders_app", CANARY), ("orders_app_clone", "twin")):
        secret = Secret("zt-demo/orders/db", user, right)
        async with engine_for(secret, target(server)) as app, app.begin() as session:
            await session.execute(text("INSERT INTO made_later DEFAULT VALUES"))
            assert (await database_use(session))["user"] == user


async def test_rotator_sets_the_passwords_of_the_two_twins_only(server: PostgresServer) -> None:
    await server.ensure_service("payments", rotator_password="rot")
    rotator = Secret("zt-demo/payments/db-rotator", "payments_rotator", "rot")
    engine = sync_engine(rotator, target(server, "payments"), isolation_level="AUTOCOMMIT")

    with engine.connect() as connection:
        pgconn = connection.connection.driver_connection.pgconn  # type: ignore[union-attr]
        for role, allowed in (
            ("payments_app_clone", True),
            ("payments_app", True),
            ("payments_owner", False),
            ("orders_app", False),
            ("postgres", False),
        ):
            verifier = pgconn.encrypt_password(b"next", role.encode(), b"scram-sha-256").decode()
            with nullcontext() if allowed else pytest.raises(ProgrammingError):
                connection.execute(
                    text("SELECT rotation.set_password(:role, :verifier)"),
                    {"role": role, "verifier": verifier},
                )
            with pytest.raises(ProgrammingError):
                connection.execute(text(f"ALTER ROLE {role} PASSWORD 'x'"))
        with pytest.raises(ProgrammingError):
            connection.execute(text("SELECT * FROM public.ledger"))

    secret = Secret("zt-demo/payments/db", "payments_app_clone", "next")
    async with engine_for(secret, target(server, "payments")) as app:
        assert await check(app) is None


async def test_ensuring_a_service_again_changes_nothing(server: PostgresServer) -> None:
    await asyncio.gather(server.ensure_service("orders"), server.ensure_service("payments"))

    async with engine_for(orders_secret(), target(server)) as engine, engine.connect() as connection:
        await connection.execute(text("SELECT * FROM orders"))


async def test_ensuring_a_service_takes_its_logins_out_of_the_groups_of_others(
    server: PostgresServer,
) -> None:
    """What somebody granted by hand, or a run that was killed left behind, does not outlive a start."""
    secret = Secret("zt-demo/orders/db", "orders_app", CANARY)
    async with server.administrator() as connection:
        await connection.execute("GRANT payments, payments_rw TO orders_app")
    async with engine_for(secret, target(server, "payments")) as engine:
        assert await check(engine) is None

    await server.ensure_service("orders")

    async with engine_for(secret, target(server, "payments"), patience=0) as engine:
        assert (await refusal(engine)).reason is Reason.DATABASE_DENIED


async def test_an_administrator_who_is_no_superuser_makes_the_same(server: PostgresServer) -> None:
    """As RDS's is: it may create roles and databases, and becomes what it made for no longer than it must."""

    @asynccontextmanager
    async def connect(database: str) -> AsyncIterator[roles.Connection]:
        async with server.administrator(database) as connection:
            await connection.execute("SET SESSION AUTHORIZATION rds_like")
            yield connection

    async with server.administrator() as connection:
        await connection.execute("CREATE ROLE rds_like LOGIN CREATEROLE CREATEDB")
    for _ in range(2):
        await roles.ensure_service(
            connect, "refunds", app_password="r-app", owner_password="r-owner", rotator_password="r-rot"
        )

    with owner_connection(server, "refunds", "r-owner") as owner:
        owner.execute("CREATE TABLE notes (id int)")
    where = target(server, "refunds")
    async with engine_for(Secret("x", "refunds_app", "r-app"), where) as app, app.begin() as session:
        await session.execute(text("INSERT INTO notes VALUES (1)"))
        with pytest.raises(ProgrammingError):
            await session.execute(text("CREATE TABLE more (id int)"))
    with sync_engine(Secret("x", "refunds_rotator", "r-rot"), where).begin() as session:
        pgconn = session.connection.driver_connection.pgconn  # type: ignore[union-attr]
        verifier = pgconn.encrypt_password(b"next", b"refunds_app_clone", b"scram-sha-256").decode()
        call = text("SELECT rotation.set_password('refunds_app_clone', :verifier)")
        session.execute(call, {"verifier": verifier})
    async with engine_for(Secret("x", "refunds_app_clone", "next"), where) as app:
        assert await check(app) is None

    async with server.administrator() as connection:
        left = await connection.execute(
            "SELECT roleid::regrole::text FROM pg_auth_members WHERE member = 'rds_like'::regrole "
            "AND (inherit_option OR set_option)"
        )
        assert await left.fetchall() == []


# -- rotation


async def test_password_changed_under_a_live_pool_costs_one_refresh_and_no_request(
    server: PostgresServer,
) -> None:
    secret = orders_secret()
    async with engine_for(secret, target(server), pool_size=5, max_overflow=0) as engine:

        async def request() -> str | None:
            async with engine.begin() as connection:
                await connection.execute(text("SELECT pg_sleep(0.01)"))
                return (await database_use(connection))["secret_version"]

        assert set(await asyncio.gather(*(request() for _ in range(20)))) == {"v1"}

        secret.put("orders_app", "new-" + CANARY)
        async with password(server, "orders_app", "new-" + CANARY, old=CANARY):
            await server.end_sessions("orders_app")
            answers = await asyncio.gather(*(request() for _ in range(40)))

        assert set(answers) == {"v2"}
        assert secret.refreshes == 1


async def test_password_ahead_of_the_secret_is_waited_for(server: PostgresServer) -> None:
    secret = orders_secret()
    async with (
        password(server, "orders_app", "ahead", old=CANARY),
        engine_for(secret, target(server), patience=20) as engine,
    ):
        waiting = asyncio.create_task(check(engine, timeout=20))
        await until(lambda: secret.refreshes >= 1, "the secret is asked again")
        secret.put("orders_app", "ahead")

        assert await waiting is None
        assert secret.refreshes <= 4


async def test_refused_login_ends_in_bounded_time_and_old_sessions_serve_on(server: PostgresServer) -> None:
    secret = orders_secret()
    async with engine_for(secret, target(server), patience=0, pool_size=2) as engine, engine.connect() as old:
        await old.execute(text("SELECT 1"))
        async with password(server, "orders_app", "unknown to anybody", old=CANARY):
            failure = await refusal(engine)
            readiness = await check(engine)
            assert (await old.execute(text("SELECT 2"))).scalar() == 2

        assert failure.reason is Reason.DATABASE_DENIED
        assert readiness == "database_denied"
        assert secret.refreshes <= 2


async def test_older_connections_are_replaced_as_they_return_and_no_transaction_is_cut(
    server: PostgresServer,
) -> None:
    secret = orders_secret()
    await server.set_password("orders_app_clone", "twin")
    async with engine_for(secret, target(server), pool_size=2, max_overflow=0) as engine:
        idle = await engine.connect()
        pid_of_idle = (await idle.execute(text("SELECT pg_backend_pid()"))).scalar()
        busy = await engine.connect()
        await busy.execute(text("INSERT INTO orders VALUES (7, 'open when the secret changed')"))
        pid_of_busy = (await busy.execute(text("SELECT pg_backend_pid()"))).scalar()
        await idle.close()

        secret.put("orders_app_clone", "twin")
        await secret.refresh(force=True)

        # The idle one is replaced before it is used again,
        async with engine.connect() as connection:
            use = await database_use(connection)
            assert (use["user"], use["secret_version"]) == ("orders_app_clone", "v2")
            assert (await connection.execute(text("SELECT pg_backend_pid()"))).scalar() != pid_of_idle
        # the busy one ends its transaction on the connection that it began on,
        assert (await database_use(busy))["secret_version"] == "v1"
        await busy.commit()
        assert await backend_exists(server, pid_of_busy)
        # and is closed, not kept, when it returns.
        await busy.close()
        await until_gone(server, pid_of_busy)
        await until_gone(server, pid_of_idle)

        async with engine.begin() as one, engine.begin() as two:
            assert {(await database_use(c))["user"] for c in (one, two)} == {"orders_app_clone"}
            await one.execute(text("DELETE FROM orders WHERE id = 7 AND note LIKE 'open%'"))


async def backend_exists(server: PostgresServer, pid: Any) -> bool:
    async with server.administrator() as connection:
        cursor = await connection.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid])
        return await cursor.fetchone() is not None


async def until_gone(server: PostgresServer, pid: Any) -> None:
    deadline = time.monotonic() + 20
    while await backend_exists(server, pid):
        assert time.monotonic() < deadline, "the session is still there"
        await asyncio.sleep(0.01)


async def test_idle_connections_of_an_old_secret_do_not_stay(server: PostgresServer) -> None:
    secret = orders_secret()
    await server.set_password("orders_app_clone", "twin")
    async with engine_for(secret, target(server), pool_size=3) as engine:
        held = [await engine.connect() for _ in range(3)]
        for connection in held:
            await connection.close()
        await until_sessions(server, "orders_app", 3)
        secret.put("orders_app_clone", "twin")
        await secret.refresh(force=True)

        await renew_idle(engine)

        await until_sessions(server, "orders_app", 0)
        assert await sessions(server, "orders_app_clone") == 3


async def test_no_idle_connection_gets_older_than_its_age(server: PostgresServer) -> None:
    async with engine_for(orders_secret(), target(server), max_age=0) as engine:
        async with engine.connect() as connection:
            first = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()
        keeper = asyncio.create_task(keep_fresh(engine, every=0.01))
        try:
            await until_gone(server, first)
        finally:
            keeper.cancel()


async def sessions(server: PostgresServer, user: str) -> int:
    async with server.administrator() as connection:
        row = await (
            await connection.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = %s", [user])
        ).fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]


async def until_sessions(server: PostgresServer, user: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while await sessions(server, user) != count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_ended_sessions_are_replaced_without_a_failed_request(server: PostgresServer) -> None:
    async with engine_for(orders_secret(), target(server), pool_size=3) as engine:
        held = [await engine.connect() for _ in range(3)]
        for connection in held:
            await connection.close()

        assert await server.end_sessions("orders_app") >= 3

        for _ in range(6):
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))


# -- secrets stay secret


async def test_password_is_in_no_exception_and_no_log(
    server: PostgresServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    found: list[str] = []

    async def provoke(where: DatabaseTarget, right: str = CANARY) -> None:
        secret = Secret("zt-demo/orders/db", "orders_app", right)
        async with engine_for(secret, where, echo="debug", echo_pool="debug", patience=0) as engine:
            try:
                async with engine.connect() as connection:
                    raw = await connection.get_raw_connection()
                    found.append(repr(raw) + repr(raw.driver_connection) + repr(connection) + repr(engine))
                    await connection.execute(text("SELECT nothing FROM nowhere"))
            except Exception as error:
                found.extend(everything_shown_by(error))
            else:
                raise AssertionError("it should have failed")

    await provoke(target(server))  # a statement that fails
    await provoke(target(server), right="wrong-CANARY-password")
    await provoke(target(server, port=1))
    await provoke(target(server, host="nowhere.invalid"))
    await provoke(target(server, name="payments"))
    await provoke(target(server, name="none"))
    await provoke(target(server, ca_file=tmp_path / "none.pem"))
    await provoke(target(server, ca_file=tmp_path))
    async with server.administrator() as connection:
        await connection.execute("ALTER ROLE orders_app CONNECTION LIMIT 0")
        try:
            await provoke(target(server))
        finally:
            await connection.execute("ALTER ROLE orders_app CONNECTION LIMIT -1")
        with pytest.raises(psycopg.errors.Error):
            await connection.execute("ALTER ROLE nobody_of_that_name PASSWORD 'CANARY'")

    output = capfd.readouterr()
    for shown in (*found, caplog.text, output.out, output.err, "\n".join(server_log(server))):
        assert "CANARY" not in shown
    assert "SELECT nothing" in "".join(found)  # it did look at what it meant to look at


def everything_shown_by(error: BaseException | None) -> Iterator[str]:
    """An exception as the most talkative of error reporters shows it: with the variables of each frame, and
    with all that went before it. Only the frames of this test, which knows the password, are left out."""
    while error is not None:
        yield repr(error) + str(error)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename != __file__:
                yield repr(frame.f_locals)
        error = error.__cause__ or error.__context__


def server_log(server: PostgresServer) -> list[str]:
    return server.log_file.read_text(errors="replace").splitlines()


async def test_password_is_in_no_file_of_the_server(server: PostgresServer) -> None:
    marker = "CANARY-in-a-file"
    await server.set_password("orders_owner", marker)
    async with server.administrator() as connection:
        await connection.execute("CHECKPOINT")

    holders = [
        path
        for path in server.directory.rglob("*")
        if path.is_file() and not path.is_symlink() and marker.encode() in path.read_bytes()
    ]

    await server.set_password("orders_owner", "owner-" + CANARY)
    assert holders == []


# -- the server's own life


async def test_server_is_nobody_privileged_and_its_files_are_closed(server: PostgresServer) -> None:
    assert server.pid is not None
    status = Path(f"/proc/{server.pid}/status").read_text()
    uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]

    assert "0" not in uids
    assert server.data.stat().st_mode & 0o777 == 0o700
    assert server.socket_directory.stat().st_mode & 0o777 == 0o700
    for name in ("server.key", "pg_hba.conf", "postgresql.conf"):
        assert (server.data / name).stat().st_mode & 0o077 == 0
        assert (server.data / name).stat().st_uid == int(uids[0])


async def taken_back(connection: AsyncConnection, number: int) -> object:
    statement = text("DELETE FROM orders WHERE id = :number RETURNING note")
    return (await connection.execute(statement, {"number": number})).scalar()


async def test_rows_survive_stop_and_start(server: PostgresServer) -> None:
    async with engine_for(orders_secret(), target(server)) as engine:
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO orders VALUES (100, 'kept')"))
        readiness_before = await check(engine)

        await server.stop()
        readiness_while_down = await check(engine)
        await server.start()

        async with engine.begin() as connection:
            found = await taken_back(connection, 100)

    assert readiness_before is None
    assert readiness_while_down == "database_unavailable"
    assert found == "kept"


async def test_rows_survive_a_killed_server(server: PostgresServer) -> None:
    async with engine_for(orders_secret(), target(server)) as engine:
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO orders VALUES (101, 'kept')"))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert await server.wait() == -signal.SIGKILL

        await server.start()

        async with engine.begin() as connection:
            found = await taken_back(connection, 101)

    assert found == "kept"


async def test_stop_leaves_no_process_no_socket_and_no_key(server: PostgresServer) -> None:
    pid = server.pid
    assert pid is not None
    children = set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    assert children

    await server.stop()
    try:
        assert not Path(f"/proc/{pid}").exists()
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        assert not server.socket_directory.exists()
        assert not (server.data / "server.key").exists()
        assert not server.running
        await server.stop()  # harmless
    finally:
        await server.start()


async def test_second_server_on_the_same_directory_is_refused(server: PostgresServer) -> None:
    with pytest.raises(AlreadyRunning, match="Another stack"):
        await PostgresServer(server.directory, choose_free_ports(1)[0]).start()

    async with server.administrator():
        pass  # unharmed


async def test_taken_port_is_refused_and_its_owner_named(server: PostgresServer, tmp_path: Path) -> None:
    other = PostgresServer(tmp_path / "db", server.port)

    with pytest.raises(PortInUse, match=rf"Port {server.port} .*postgres.*\(pid {server.pid}\)"):
        await other.start()

    assert not other.running


@pytest.fixture
def copy_of_a_database(server: PostgresServer, tmp_path: Path) -> Iterator[Callable[[], PostgresServer]]:
    """Servers on an empty cluster of their own, of which only the first is the slow one."""
    made: list[PostgresServer] = []

    def make() -> PostgresServer:
        made.append(PostgresServer(tmp_path / "db", choose_free_ports(1)[0]))
        return made[-1]

    yield make
    assert not any(other.running for other in made)


async def test_stale_process_id_that_a_stranger_has_now(
    copy_of_a_database: Callable[[], PostgresServer],
) -> None:
    first = copy_of_a_database()
    async with first:
        recorded = (first.data / "postmaster.pid").read_text()
    stranger = subprocess.Popen(["sleep", "60"], user=first.data.stat().st_uid if os.geteuid() == 0 else None)
    try:
        lines = recorded.split("\n")
        (first.data / "postmaster.pid").write_text("\n".join([str(stranger.pid), *lines[1:]]))

        async with copy_of_a_database():
            pass

        assert stranger.poll() is None  # and nobody has hurt the stranger
    finally:
        stranger.kill()
        stranger.wait()


SUPERVISOR = """
    import asyncio, sys
    from pathlib import Path
    from ztdev.postgres import PostgresServer

    async def main():
        server = PostgresServer(Path(sys.argv[1]), int(sys.argv[2]))
        await server.start()
        print(server.pid, flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


async def test_killed_supervisor_leaves_no_server_and_the_next_one_starts_at_once(
    copy_of_a_database: Callable[[], PostgresServer],
) -> None:
    following = copy_of_a_database()
    supervisor = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUPERVISOR), str(following.directory), str(following.port)],
        stdout=subprocess.PIPE,
    )
    assert supervisor.stdout is not None
    postmaster = ProcessRef.of(int(await asyncio.to_thread(supervisor.stdout.readline)))
    assert postmaster is not None
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()

    async with following:
        assert following.pid != postmaster.pid
        assert not postmaster.alive()


async def test_server_that_nobody_watches_ends_by_itself(
    copy_of_a_database: Callable[[], PostgresServer],
) -> None:
    prepared = copy_of_a_database()
    supervisor = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUPERVISOR), str(prepared.directory), str(prepared.port)],
        stdout=subprocess.PIPE,
    )
    assert supervisor.stdout is not None
    postmaster = ProcessRef.of(int(await asyncio.to_thread(supervisor.stdout.readline)))
    assert postmaster is not None
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()

    await until(lambda: not postmaster.alive(), "the server ends with its supervisor")


async def test_directory_with_a_long_path(tmp_path: Path) -> None:
    """Paths of Unix sockets are limited to 107 bytes; the administrator's socket is not."""
    deep = tmp_path / ("long " * 20) / ("longer" * 10)
    deep.mkdir(parents=True)

    async with PostgresServer(deep / "db", choose_free_ports(1)[0]) as server:
        await server.ensure_service("orders", app_password=CANARY, owner_password="o")
        async with engine_for(orders_secret(), target(server)) as engine:
            assert await check(engine) is None


async def test_data_of_another_release_is_refused(copy_of_a_database: Callable[[], PostgresServer]) -> None:
    first = copy_of_a_database()
    async with first:
        pass
    (first.data / "PG_VERSION").write_text("12\n")

    with pytest.raises(StateUnusable, match=r"made by PostgreSQL 12, but this is 18"):
        await copy_of_a_database().start()


async def test_damaged_data_is_told(copy_of_a_database: Callable[[], PostgresServer]) -> None:
    first = copy_of_a_database()
    async with first:
        pass
    (first.data / "global" / "pg_control").unlink()

    with pytest.raises((StateUnusable, NotReady), match=r"pg_control|cannot be used"):
        await copy_of_a_database().start()


async def test_missing_shared_libraries_are_named(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="zt-program-") as folder:
        place = Path(folder)
        place.chmod(0o755)  # the unprivileged user has to get through
        program = await asyncio.to_thread(Wheel.installed().install, place)
        for library in program.libraries.glob("libicu*"):
            library.unlink()

        with pytest.raises(ProgramMissing, match=r"shared libraries .*libicu\w+\.so"):
            await PostgresServer(tmp_path / "db", choose_free_ports(1)[0], program_directory=place).start()


async def test_programs_out_of_reach_are_told(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user reaches its own programs")
    server = PostgresServer(tmp_path / "db", choose_free_ports(1)[0], program_directory=tmp_path / "program")

    with pytest.raises(StateUnusable, match=r"cannot reach or run .*postgres: Permission denied"):
        await server.start()


async def test_programs_that_others_may_write_are_refused(tmp_path: Path) -> None:
    await asyncio.to_thread(Wheel.installed().install, tmp_path / "program")
    (tmp_path / "program").chmod(0o777)

    with pytest.raises(StateUnusable, match="can be written by others"):
        await PostgresServer(
            tmp_path / "db", choose_free_ports(1)[0], program_directory=tmp_path / "program"
        ).start()


async def test_small_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ROOM_FOR_FIRST_START", shutil.disk_usage(tmp_path).free * 2)

    with pytest.raises(DiskFull, match="Free some space"):
        await PostgresServer(tmp_path / "db", choose_free_ports(1)[0]).start()

    assert not (tmp_path / "db" / "data").exists()


async def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    (tmp_path / "db").mkdir()
    os.chown(tmp_path / "db", 12345, 12345)

    with pytest.raises(StateUnusable, match="belongs to another user"):
        await PostgresServer(tmp_path / "db", choose_free_ports(1)[0]).start()
