"""The database's pure parts: what libpq is told, how failures are named, how a refused login is recovered
from, and what the local server is configured with. The rest is in tests/stack/test_postgres.py, with a real
server."""

from __future__ import annotations

import asyncio
import logging
import pwd
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from ztdev.errors import DiskFull, NotReady, PortInUse, StackError, StateUnusable
from ztdev.postgres import PostgresServer, ServiceRoles, config, make_server_tls
from ztmtls import database
from ztmtls.database import DatabaseTarget, NoDatabase, create_engine, sync_engine
from ztmtls.reasons import Reason, Refusal

CANARY = "Zz-CANARY-%40/:#'\\ \""

TARGET = DatabaseTarget("db.example", 5432, "orders", "/etc/ca.pem")


@dataclass(frozen=True)
class Version:
    version_id: str
    fields: Mapping[str, str] = field(repr=False)


def version(name: str = "v1", **fields: str) -> Version:
    return Version(name, fields or {"username": "orders_app", "password": CANARY})


class FakeSecret:
    """A secret whose next version becomes visible by `refresh`."""

    secret_id = "zt-demo/orders/db"

    def __init__(self, *versions: Version, fails: Refusal | None = None) -> None:
        self.current: Version = versions[0]
        self._later = list(versions[1:])
        self._fails = fails
        self.refreshes = 0

    async def get(self) -> Version:
        return self.current

    async def refresh(self, *, force: bool = False) -> Version:
        assert force
        self.refreshes += 1
        await asyncio.sleep(0)
        if self._fails is not None:
            raise self._fails
        if self._later:
            self.current = self._later.pop(0)
        return self.current


class FakeServer:
    """Takes the logins of some versions and counts how many came."""

    def __init__(self, *accepted: str) -> None:
        self.accepted = set(accepted)
        self.logins: list[str] = []

    async def open(self, offered: database.SecretVersion) -> str:
        self.logins.append(offered.version_id)
        await asyncio.sleep(0)
        if offered.version_id not in self.accepted:
            raise database._LoginRefused(Reason.DATABASE_DENIED, "no")
        return f"opened by {offered.version_id}"


def connector(secret: FakeSecret, *, patience: float = 0.0, pace: float = 0.01) -> database._Connector:
    return database._Connector(secret, TARGET, "orders", patience, pace=pace)


# -- what libpq is told


def test_only_verified_tls_1_3_with_channel_binding() -> None:
    told = connector(FakeSecret(version())).parameters(version())

    assert told["sslmode"] == "verify-full"
    assert told["ssl_min_protocol_version"] == "TLSv1.3"
    assert told["sslrootcert"] == "/etc/ca.pem"
    assert told["require_auth"] == "scram-sha-256"
    assert told["channel_binding"] == "require"


def test_user_and_password_come_from_the_same_version() -> None:
    told = connector(FakeSecret(version())).parameters(
        version("v2", username="orders_app_clone", password="other")
    )

    assert (told["user"], told["password"]) == ("orders_app_clone", "other")


def test_environment_cannot_add_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c search_path=elsewhere")
    monkeypatch.setenv("PGSSLMODE", "disable")

    told = psycopg.conninfo.make_conninfo("", **connector(FakeSecret(version())).parameters(version()))

    assert "options=''" in told
    assert "sslmode=verify-full" in told


@pytest.mark.parametrize("fields", [{"username": "u"}, {"username": "u", "password": ""}, {"password": "p"}])
def test_secret_without_user_or_password_is_malformed(fields: dict[str, str]) -> None:
    with pytest.raises(NoDatabase) as caught:
        connector(FakeSecret(version())).parameters(version("v1", **fields))

    assert caught.value.reason is Reason.SECRET_MALFORMED


@pytest.mark.parametrize("option", ["connect_args", "creator", "async_creator", "pool", "url"])
def test_no_other_way_to_connect(option: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(TypeError, match=option):
        create_engine(FakeSecret(version()), TARGET, **options)
    with pytest.raises(TypeError, match=option):
        sync_engine(FakeSecret(version()), TARGET, **options)


def test_engine_holds_no_credentials() -> None:
    engine = create_engine(FakeSecret(version()), TARGET, pool_size=2)

    assert str(engine.url) == "postgresql+psycopg://"
    assert CANARY not in repr(engine) + repr(engine.pool) + repr(vars(engine.sync_engine))


# -- how failures are named


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('FATAL:  password authentication failed for user "orders_app"', Reason.DATABASE_DENIED),
        ('FATAL:  role "orders_app" is not permitted to log in', Reason.DATABASE_DENIED),
        ('FATAL:  no pg_hba.conf entry for host "127.0.0.1", user "x"', Reason.DATABASE_DENIED),
        ('FATAL:  permission denied for database "payments"', Reason.DATABASE_DENIED),
        ("SSL error: certificate verify failed", Reason.DATABASE_UNTRUSTED),
        ('root certificate file "/etc/ca.pem" does not exist', Reason.DATABASE_UNTRUSTED),
        (
            'server certificate for "db" does not match host name "db.example"',
            Reason.DATABASE_UNTRUSTED,
        ),
        ("server does not support SSL, but SSL was required", Reason.DATABASE_UNTRUSTED),
        ("SSL error: tlsv1 alert protocol version", Reason.DATABASE_UNTRUSTED),
        (
            "channel binding required, but server authenticated client without channel binding",
            Reason.DATABASE_UNTRUSTED,
        ),
        (
            'authentication method requirement "scram-sha-256" failed: server requested a cleartext password',
            Reason.DATABASE_UNTRUSTED,
        ),
        ("Connection refused", Reason.DATABASE_UNAVAILABLE),
        ("connection timeout expired", Reason.DATABASE_UNAVAILABLE),
        ("FATAL:  the database system is starting up", Reason.DATABASE_UNAVAILABLE),
        ("FATAL:  sorry, too many clients already", Reason.DATABASE_UNAVAILABLE),
        ("SSL SYSCALL error: EOF detected", Reason.DATABASE_UNAVAILABLE),
        ('FATAL:  database "orders" does not exist', Reason.DATABASE_UNAVAILABLE),
    ],
)
def test_failure_has_its_reason(message: str, reason: Reason) -> None:
    failure = connector(FakeSecret(version())).explain(
        psycopg.OperationalError(f"connection failed: {message}"), version()
    )

    assert failure.reason is reason
    assert "db.example:5432" in failure.detail


def test_login_is_refused_by_state_whatever_the_language() -> None:
    assert database._reason_of("28P01", "Passwort-Authentifizierung fehlgeschlagen") is Reason.DATABASE_DENIED


def test_untrusted_server_names_the_ca_file() -> None:
    failure = connector(FakeSecret(version())).explain(
        psycopg.OperationalError("SSL error: certificate verify failed"), version()
    )

    assert "/etc/ca.pem" in failure.detail


def test_password_in_a_driver_message_is_blotted_out() -> None:
    failure = connector(FakeSecret(version())).explain(
        psycopg.OperationalError("invalid connection option: hunter22"),
        version("v1", username="u", password="hunter22"),
    )

    assert "hunter22" not in str(failure)


async def test_failure_has_no_context_that_could_show_the_password() -> None:
    nowhere = DatabaseTarget("127.0.0.1", 1, "orders", "/nonexistent/ca.pem")
    attempt = database._Connector(FakeSecret(version()), nowhere, "orders", 0.0)

    with pytest.raises(NoDatabase) as caught:
        await attempt.connect()

    failure = caught.value
    assert failure.reason in (Reason.DATABASE_UNTRUSTED, Reason.DATABASE_UNAVAILABLE)
    assert failure.__context__ is None
    assert failure.__cause__ is None
    frames = traceback.TracebackException.from_exception(failure, capture_locals=True)
    assert "CANARY" not in "".join(frames.format())


# -- refused logins


async def test_working_login_asks_nobody() -> None:
    secret, server = FakeSecret(version("v1")), FakeServer("v1")

    assert await connector(secret).open(server.open) == "opened by v1"

    assert secret.refreshes == 0
    assert server.logins == ["v1"]


async def test_refused_login_is_recovered_by_one_refresh_and_one_retry() -> None:
    secret, server = FakeSecret(version("v1"), version("v2")), FakeServer("v2")

    assert await connector(secret).open(server.open) == "opened by v2"

    assert secret.refreshes == 1
    assert server.logins == ["v1", "v2"]


async def test_login_that_stays_refused_ends_after_one_refresh_and_one_retry() -> None:
    secret, server = FakeSecret(version("v1")), FakeServer()

    with pytest.raises(NoDatabase) as caught:
        await connector(secret, patience=0.0).open(server.open)

    assert caught.value.reason is Reason.DATABASE_DENIED
    assert "zt-demo/orders/db" in caught.value.detail
    assert "version v1" in caught.value.detail
    assert CANARY not in str(caught.value)
    assert secret.refreshes == 1
    assert server.logins == ["v1", "v1"]


async def test_password_ahead_of_the_secret_is_waited_for() -> None:
    """Between setSecret and finishSecret of a rotation the database is ahead of AWSCURRENT."""
    old = version("v1")
    secret, server = FakeSecret(old, old, old, version("v2")), FakeServer("v2")

    assert await connector(secret, patience=30.0).open(server.open) == "opened by v2"

    assert secret.refreshes == 3


async def test_many_refused_logins_cause_one_refresh() -> None:
    secret, server = FakeSecret(version("v1"), version("v2")), FakeServer("v2")
    shared = connector(secret, patience=30.0)

    opened = await asyncio.gather(*(shared.open(server.open) for _ in range(50)))

    assert set(opened) == {"opened by v2"}
    assert secret.refreshes == 1


async def test_known_refused_login_is_not_tried_by_everybody() -> None:
    """While there is no better version, the database sees one login per pace, not one per request."""
    secret, server = FakeSecret(version("v1")), FakeServer()
    shared = connector(secret, patience=0.2, pace=0.05)
    with pytest.raises(NoDatabase):
        await shared.open(server.open)
    before = len(server.logins)

    results = await asyncio.gather(*(shared.open(server.open) for _ in range(50)), return_exceptions=True)

    assert all(isinstance(result, NoDatabase) for result in results)
    assert len(server.logins) - before <= 10
    assert secret.refreshes <= 20


async def test_refresh_that_fails_is_told_and_last_version_tried_on() -> None:
    fails = Refusal(Reason.SECRET_UNAVAILABLE, "no answer")
    secret, server = FakeSecret(version("v1"), fails=fails), FakeServer()

    with pytest.raises(NoDatabase) as caught:
        await connector(secret).open(server.open)

    assert "secret_unavailable: no answer" in caught.value.detail
    assert server.logins == ["v1", "v1"]


class SlowSecret(FakeSecret):
    """AWS answers, but not soon."""

    def __init__(self, *versions: Version) -> None:
        super().__init__(*versions)
        self.answers = asyncio.Event()

    async def refresh(self, *, force: bool = False) -> Version:
        self.refreshes += 1
        await self.answers.wait()
        self.refreshes -= 1
        return await super().refresh(force=force)


async def test_aws_that_does_not_answer_ends_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those who wait in the queue wait for it one after the other."""
    monkeypatch.setattr(database, "READ_TIMEOUT", 0.2)
    secret, server = SlowSecret(version("v1"), version("v2")), FakeServer("v2")
    shared = connector(secret, patience=0.1)
    began = time.monotonic()

    results = await asyncio.gather(*(shared.open(server.open) for _ in range(50)), return_exceptions=True)

    assert time.monotonic() - began < 5, "one after the other takes ten seconds"
    assert all(isinstance(result, NoDatabase) for result in results)
    assert "no answer in time" in str(results[-1])
    assert secret.refreshes == 1
    secret.answers.set()
    assert await shared.open(server.open) == "opened by v2"


async def test_slow_answers_of_aws_do_not_make_a_refused_login_wait_for_ever() -> None:
    class Slow(FakeSecret):
        async def refresh(self, *, force: bool = False) -> Version:
            await asyncio.sleep(0.05)  # longer than the pace
            return await super().refresh(force=force)

    secret = Slow(version("v1"))

    with pytest.raises(NoDatabase):
        async with asyncio.timeout(5):
            await connector(secret, patience=0.2).open(FakeServer().open)

    assert 2 <= secret.refreshes <= 5


async def test_password_put_back_is_found_again() -> None:
    """A rotation that failed puts the old password back: no restart, no new version needed."""
    secret, server = FakeSecret(version("v1")), FakeServer()
    shared = connector(secret)
    with pytest.raises(NoDatabase):
        await shared.open(server.open)

    server.accepted.add("v1")

    async with asyncio.timeout(10):
        while True:
            try:
                assert await shared.open(server.open) == "opened by v1"
                break
            except NoDatabase:  # within the pace of the last try
                await asyncio.sleep(0.005)
    assert not shared.outdated("v1")


async def test_version_that_the_database_refuses_replaces_nothing() -> None:
    secret, server = FakeSecret(version("v1"), version("v2")), FakeServer("v1")
    shared = connector(secret)
    await shared.open(server.open)
    assert not shared.outdated("v1")

    await secret.refresh(force=True)
    assert shared.outdated("v1")  # not known to be refused yet
    with pytest.raises(NoDatabase):
        await shared.open(server.open)

    assert not shared.outdated("v1")


async def test_refusal_of_the_secret_passes_unchanged() -> None:
    class Denied(FakeSecret):
        async def get(self) -> Version:
            raise Refusal(Reason.SECRET_DENIED, "not allowed")

    with pytest.raises(Refusal) as caught:
        await connector(Denied(version())).open(FakeServer("v1").open)

    assert caught.value.reason is Reason.SECRET_DENIED


async def test_check_gives_a_short_reason() -> None:
    engine = create_engine(FakeSecret(version()), DatabaseTarget("127.0.0.1", 1, "orders", __file__))

    assert await database.check(engine) in ("database_unavailable", "database_untrusted")
    await engine.dispose()


async def test_sync_engine_works_inside_a_running_loop(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = sync_engine(FakeSecret(version()), DatabaseTarget("127.0.0.1", 1, "orders", __file__))

    with pytest.raises(NoDatabase), engine.connect() as connection:
        connection.execute(text("SELECT 1"))

    assert isinstance(engine.pool, NullPool)
    assert "CANARY" not in caplog.text


# -- the local server


def test_server_certificate_is_for_this_machine_only() -> None:
    tls = make_server_tls()
    certificate = x509.load_pem_x509_certificate(tls.certificate)
    authority = x509.load_pem_x509_certificate(tls.authorities)

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert load_pem_private_key(tls.key, None).public_key() == certificate.public_key()
    certificate.verify_directly_issued_by(authority)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_server_key_is_not_in_the_repr() -> None:
    assert "PRIVATE" not in repr(make_server_tls())


def test_each_authority_is_another_one() -> None:
    assert make_server_tls().authorities != make_server_tls().authorities


def test_nobody_enters_without_tls() -> None:
    for line in config.pg_hba_conf().splitlines():
        words = line.split()
        if words[0] == "#":
            continue
        assert (words[0], words[-1]) in {
            ("local", "map=administrator"),
            ("host", "reject"),
            ("hostssl", "scram-sha-256"),
        }


def test_server_listens_on_this_machine_and_logs_no_statement() -> None:
    text_of_conf = config.postgresql_conf(15432, "zt'demo")

    assert "listen_addresses = '127.0.0.1'" in text_of_conf
    assert "log_statement = 'none'" in text_of_conf
    assert "log_min_error_statement = 'panic'" in text_of_conf
    assert "fsync = 'on'" in text_of_conf
    assert "cluster_name = 'zt''demo'" in text_of_conf


@pytest.mark.parametrize("name", ["", "Orders", 'orders"; DROP', "postgres", "public", "1st", "a" * 41])
def test_service_name_that_cannot_name_a_database(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a database"):
        ServiceRoles(name)


def test_roles_of_a_service() -> None:
    roles = ServiceRoles("orders")

    assert (
        roles.database,
        roles.owner,
        roles.rw,
        roles.app,
        roles.app_clone,
        roles.rotator,
        roles.passwords,
    ) == (
        "orders",
        "orders_owner",
        "orders_rw",
        "orders_app",
        "orders_app_clone",
        "orders_rotator",
        "orders_passwords",
    )


@pytest.mark.parametrize(
    ("line", "error", "advice"),
    [
        ("could not write to file: No space left on device", DiskFull, "Free some space"),
        ('could not bind IPv4 address "127.0.0.1": Address already in use', PortInUse, "choose another port"),
        ("could not resize shared memory segment: ENOSPC", StateUnusable, "--shm-size"),
        ("database files are incompatible with server", StateUnusable, "begin with an empty database"),
        ("run_as: user 65534 may not write to /x", StateUnusable, "user 65534 may not write to /x"),
        ("FATAL: something else", NotReady, "something else"),
    ],
)
def test_server_that_does_not_start_says_what_to_do(
    tmp_path: Path, line: str, error: type[StackError], advice: str
) -> None:
    told = PostgresServer(tmp_path, 15432)._explain("PostgreSQL did not start", ["before", line])

    assert type(told) is error
    assert advice in str(told)


async def test_user_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nameless)

    with pytest.raises(StateUnusable, match="needs a user that has a name"):
        await PostgresServer(tmp_path / "db", 15432).start()

    assert not (tmp_path / "db").exists()
