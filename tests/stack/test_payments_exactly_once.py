"""payments charges exactly once, and it is the database that makes it so. Against a real PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import pytest_asyncio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import errors
from sqlalchemy import text

from payments.app import create_app
from payments.ledger import Ledger
from payments.migrations import MIGRATIONS
from payments.models import Base
from ztdev.postgres import PostgresServer
from ztmtls.authz import Policy
from ztmtls.database import DatabaseTarget, create_engine, sync_engine
from ztmtls.secrets import SecretValue
from ztmtls.testing import calling_as
from ztmtls.transactions import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAYMENTS = "spiffe://zt.example/ns/zt-demo/sa/payments"
ORDERS = "spiffe://zt.example/ns/zt-demo/sa/orders"
BILLING = "spiffe://zt.example/ns/zt-demo/sa/billing"
LIMIT = 500_000
DEADLINE = 10.0


class FixedSecret:
    """Database credentials that are simply there."""

    def __init__(self, username: str, password: str) -> None:
        self.secret_id = "test"
        self.current = SecretValue("v1", {"username": username, "password": password})

    async def get(self) -> SecretValue:
        return self.current

    async def refresh(self, *, force: bool = False) -> SecretValue:
        return self.current


class Bank:
    """A migrated payments database, and as many replicas of the service on it as a test wants."""

    def __init__(self, server: PostgresServer, app: FixedSecret, owner: FixedSecret) -> None:
        self.server = server
        self.owner_secret = owner
        self.app_secret = app
        self.target = DatabaseTarget("127.0.0.1", server.port, "payments", server.ca_file)

    @asynccontextmanager
    async def replica(
        self, caller: str = ORDERS, *, secret: FixedSecret | None = None
    ) -> AsyncIterator[httpx.AsyncClient]:
        """A replica of payments with a pool of its own, and a client that `caller` uses."""
        engine = create_engine(secret or self.app_secret, self.target, pool_size=10, max_overflow=10)
        try:
            app = create_app(Ledger(Database(engine), LIMIT), _no_status)
            async with _client(app, caller) as client:
                yield client
        finally:
            await engine.dispose()

    def for_program(self, body: dict[str, Any], key: str) -> dict[str, Any]:
        """What a replica in a process of its own must be told to charge once."""
        password = self.app_secret.current.fields["password"]
        ca_file = str(self.server.ca_file)
        return {"port": self.server.port, "ca_file": ca_file, "password": password, "body": body, "key": key}

    async def sql(self, query: str, *parameters: object) -> list[Any]:
        """Ask the database as its administrator."""
        async with self.server.administrator("payments") as connection:
            cursor = await connection.execute(query, parameters)
            return await cursor.fetchall() if cursor.description else []


async def _no_status() -> dict[str, Any]:
    return {}


def _client(app: Any, caller: str) -> httpx.AsyncClient:
    """Calls `app` behind the guard, on a connection whose peer was verified to be `caller`."""
    everything = {
        "name": "everything",
        "callers": [caller],
        "methods": ["GET", "POST"],
        "paths": ["/payments", "/payments/{id}", "/payments/by-key/{key}", "/payments/{id}/refunds"],
    }
    policy = Policy.parse({"version": 1, "rules": [everything]})
    return calling_as(app, caller, policy, callee_id=PAYMENTS)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bank(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bank]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app, owner = secrets.token_urlsafe(), secrets.token_urlsafe()
    async with PostgresServer(tmp_path_factory.mktemp("postgres"), port) as server:
        await server.ensure_service("payments", app_password=app, owner_password=owner)
        bank = Bank(server, FixedSecret("payments_app", app), FixedSecret("payments_owner", owner))
        engine = sync_engine(bank.owner_secret, bank.target)
        await asyncio.to_thread(MIGRATIONS.upgrade, engine)
        engine.dispose()
        yield bank


def _charge(amount: int = 2190, order_id: UUID | None = None) -> dict[str, Any]:
    return {"order_id": str(order_id or uuid4()), "amount": amount, "currency": "EUR"}


def _key(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


async def _eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await condition():
            await asyncio.sleep(0.02)


async def _paid(client: httpx.AsyncClient, amount: int = 1000) -> str:
    answer = await client.post("/payments", json=_charge(amount), headers=_key(uuid4().hex))
    assert answer.status_code == 201
    payment_id: str = answer.json()["payment"]["id"]
    return payment_id


# --- charges ------------------------------------------------------------------------------------------


async def test_a_charge_is_booked_with_its_evidence(bank: Bank) -> None:
    async with bank.replica() as orders:
        body = _charge()
        answer = await orders.post("/payments", json=body, headers=_key("evidence-1"))

        assert answer.status_code == 201
        payment = answer.json()["payment"]
        assert payment == body | {
            "id": payment["id"],
            "status": "charged",
            "refunded": 0,
            "created_at": payment["created_at"],
        }
        assert payment["created_at"].endswith("Z")
        assert answer.json()["seen_by_callee"]["peer"]["id"] == ORDERS
        assert answer.json()["seen_by_callee"]["rule"] == "everything"
        use = answer.json()["database"]
        assert (use["service"], use["database"], use["user"]) == ("payments", "payments", "payments_app")
        assert (use["tls_version"], use["secret_version"]) == ("TLSv1.3", "v1")
        booked = await bank.sql(
            "SELECT amount, booked_by FROM entries WHERE charge_id = %s", UUID(payment["id"])
        )
        assert booked == [(2190, "payments_app")]


async def test_the_same_key_gets_the_first_answer_again(bank: Bank) -> None:
    async with bank.replica() as orders:
        body = _charge()
        first = await orders.post("/payments", json=body, headers=_key("again-1"))
        await orders.post(
            f"/payments/{first.json()['payment']['id']}/refunds",
            json={"amount": 100},
            headers=_key("again-refund"),
        )

        second = await orders.post("/payments", json=dict(reversed(body.items())), headers=_key("again-1"))

        assert (first.status_code, second.status_code) == (201, 200)
        assert second.headers["Idempotency-Replayed"] == "true"
        assert "Idempotency-Replayed" not in first.headers
        assert second.json()["payment"] == first.json()["payment"]
        by_key = (await orders.get("/payments/by-key/again-1")).json()["payment"]
        assert (by_key["id"], by_key["status"], by_key["refunded"]) == (
            first.json()["payment"]["id"],
            "partly_refunded",
            100,
        )


async def test_twenty_twins_on_two_replicas_charge_once(bank: Bank) -> None:
    async with bank.replica() as one, bank.replica() as two:
        body = _charge()
        answers = await asyncio.gather(
            *(
                replica.post("/payments", json=body, headers=_key("twins"))
                for _ in range(10)
                for replica in (one, two)
            )
        )

        assert sorted(a.status_code for a in answers) == [200] * 19 + [201]
        assert len({a.json()["payment"]["id"] for a in answers}) == 1
        assert await bank.sql("SELECT count(*) FROM charges WHERE idempotency_key = 'twins'") == [(1,)]
        assert await bank.sql(
            "SELECT count(*) FROM entries e JOIN charges c ON c.id = e.charge_id WHERE c.order_id = %s",
            UUID(body["order_id"]),
        ) == [(1,)]


async def test_the_same_key_for_another_amount_is_refused(bank: Bank) -> None:
    async with bank.replica() as orders:
        body = _charge(2190)
        assert (await orders.post("/payments", json=body, headers=_key("reused"))).status_code == 201

        answer = await orders.post("/payments", json=body | {"amount": 2191}, headers=_key("reused"))

        assert answer.status_code == 422
        assert answer.json()["reason"] == "idempotency_key_reused"
        assert await bank.sql("SELECT amount FROM charges WHERE idempotency_key = 'reused'") == [(2190,)]


async def test_another_callers_key_is_its_own(bank: Bank) -> None:
    async with bank.replica(ORDERS) as orders, bank.replica(BILLING) as billing:
        first = await orders.post("/payments", json=_charge(100), headers=_key("shared"))
        assert (await orders.get("/payments/by-key/shared")).status_code == 200

        hidden = await billing.get("/payments/by-key/shared")
        hidden_too = await billing.get(f"/payments/{first.json()['payment']['id']}")
        second = await billing.post("/payments", json=_charge(999), headers=_key("shared"))

        assert (hidden.status_code, hidden_too.status_code) == (404, 404)
        assert second.status_code == 201
        assert second.json()["payment"]["id"] != first.json()["payment"]["id"]


async def test_over_the_limit_is_declined_and_leaves_nothing(bank: Bank) -> None:
    async with bank.replica() as orders:
        at_limit = await orders.post("/payments", json=_charge(LIMIT), headers=_key("limit"))
        over = await orders.post("/payments", json=_charge(LIMIT + 1), headers=_key("over"))

        assert at_limit.status_code == 201
        assert (over.status_code, over.json()["reason"]) == (402, "payment_declined")
        assert await bank.sql("SELECT count(*) FROM charges WHERE idempotency_key = 'over'") == [(0,)]
        assert (await orders.get("/payments/by-key/over")).status_code == 404


# --- crashes and conflicts ----------------------------------------------------------------------------


@asynccontextmanager
async def _stopped_before_commit(bank: Bank, key: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Hold every transaction that books for `key` in its last step; yields a wait until one is there."""
    await bank.sql(f"""
        CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF (SELECT idempotency_key FROM charges WHERE id = NEW.charge_id) = '{key}' THEN
                PERFORM pg_advisory_xact_lock(42);
            END IF;
            RETURN NEW;
        END $$
    """)
    await bank.sql("CREATE TRIGGER hold BEFORE INSERT ON entries FOR EACH ROW EXECUTE FUNCTION hold()")

    async def until_held() -> None:
        async def held() -> bool:
            return bool(await bank.sql("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))

        await _eventually(held)

    async with bank.server.administrator("payments") as holder:
        await holder.execute("SELECT pg_advisory_lock(42)")
        try:
            yield until_held
        finally:
            await holder.execute("SELECT pg_advisory_unlock(42)")
            await holder.execute("DROP TRIGGER hold ON entries")
            await holder.execute("DROP FUNCTION hold")


async def _charge_from_stdin() -> None:
    """This file run as a program: one replica in a process of its own, for the test that kills it."""
    told = json.load(sys.stdin)
    target = DatabaseTarget("127.0.0.1", told["port"], "payments", Path(told["ca_file"]))
    engine = create_engine(FixedSecret("payments_app", told["password"]), target)
    async with _client(create_app(Ledger(Database(engine), LIMIT), _no_status), ORDERS) as orders:
        await orders.post("/payments", json=told["body"], headers=_key(told["key"]))


async def test_kill_9_before_commit_leaves_the_key_usable(bank: Bank) -> None:
    body = _charge()
    async with bank.replica() as orders:
        async with _stopped_before_commit(bank, "killed") as until_held:
            process = await asyncio.create_subprocess_exec(
                sys.executable, __file__, stdin=asyncio.subprocess.PIPE
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(bank.for_program(body, "killed")).encode())
            process.stdin.close()
            await until_held()
            twin = asyncio.create_task(orders.post("/payments", json=body, headers=_key("killed")))
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        # PostgreSQL notices its dead client when the held statement ends, and rolls back.
        answer = await twin

        assert answer.status_code == 201
        again = await orders.post("/payments", json=body, headers=_key("killed"))
        assert again.json()["payment"] == answer.json()["payment"]
    assert await bank.sql("SELECT count(*) FROM charges WHERE idempotency_key = 'killed'") == [(1,)]


async def test_a_transaction_left_open_is_ended_by_the_server(bank: Bank) -> None:
    async with bank.replica() as orders:
        assert await _paid(orders)
    engine = create_engine(bank.app_secret, bank.target)
    Database(engine)
    async with engine.connect() as connection:
        limit = await connection.scalar(text("SHOW idle_in_transaction_session_timeout"))
    await engine.dispose()
    assert limit == "10s"


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
async def test_a_serialization_failure_is_retried_inside(bank: Bank, sqlstate: str) -> None:
    await bank.sql("CREATE SEQUENCE failures")  # a sequence remembers through a rollback
    await bank.sql("GRANT USAGE ON SEQUENCE failures TO payments_app")
    await bank.sql(f"""
        CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('failures') = 1 THEN
                RAISE EXCEPTION 'forced' USING ERRCODE = '{sqlstate}';
            END IF;
            RETURN NEW;
        END $$
    """)
    await bank.sql("CREATE TRIGGER fail_once BEFORE INSERT ON entries EXECUTE FUNCTION fail_once()")
    try:
        async with bank.replica() as orders:
            key = f"serialization-{sqlstate}"
            answer = await orders.post("/payments", json=_charge(), headers=_key(key))

            assert answer.status_code == 201
            assert await bank.sql("SELECT last_value FROM failures") == [(2,)]
            assert await bank.sql("SELECT count(*) FROM charges WHERE idempotency_key = %s", key) == [(1,)]
    finally:
        await bank.sql("DROP TRIGGER fail_once ON entries")
        await bank.sql("DROP FUNCTION fail_once")
        await bank.sql("DROP SEQUENCE failures")


async def test_ended_sessions_cost_no_request(bank: Bank) -> None:
    async with bank.replica() as orders:
        assert await _paid(orders)
        assert await bank.server.end_sessions("payments_app") > 0

        answers = await asyncio.gather(
            *(orders.post("/payments", json=_charge(), headers=_key(uuid4().hex)) for _ in range(5))
        )

        assert [a.status_code for a in answers] == [201] * 5


async def test_a_failure_is_not_stored(bank: Bank) -> None:
    body = _charge()
    async with bank.replica() as orders:
        async with _stopped_before_commit(bank, "busy"):
            # The lock is held for longer than lock_timeout lets a statement wait.
            failed = await orders.post("/payments", json=body, headers=_key("busy"))
        assert (failed.status_code, failed.json()["reason"]) == (503, "database_unavailable")

        assert (await orders.post("/payments", json=body, headers=_key("busy"))).status_code == 201


# --- refunds ------------------------------------------------------------------------------------------


async def test_refunds_never_exceed_the_charge(bank: Bank) -> None:
    async with bank.replica() as one, bank.replica() as two:
        payment_id = await _paid(one, 1000)
        answers = await asyncio.gather(
            *(
                replica.post(
                    f"/payments/{payment_id}/refunds", json={"amount": 300}, headers=_key(f"race-{n}")
                )
                for n, replica in enumerate([one, two] * 4)
            )
        )

        assert sorted(a.status_code for a in answers) == [201] * 3 + [409] * 5
        assert {a.json()["reason"] for a in answers if a.status_code == 409} == {"conflict"}
        payment = (await one.get(f"/payments/{payment_id}")).json()["payment"]
        assert (payment["refunded"], payment["status"]) == (900, "partly_refunded")
        assert await bank.sql("SELECT sum(amount) FROM entries WHERE charge_id = %s", UUID(payment_id)) == [
            (100,)
        ]


async def test_twin_refunds_happen_once(bank: Bank) -> None:
    async with bank.replica() as one, bank.replica() as two:
        payment_id = await _paid(one, 1000)
        answers = await asyncio.gather(
            *(
                replica.post(
                    f"/payments/{payment_id}/refunds", json={"amount": 1000}, headers=_key("refund-twins")
                )
                for replica in [one, two] * 5
            )
        )

        assert sorted(a.status_code for a in answers) == [200] * 9 + [201]
        assert len({a.json()["refund"]["id"] for a in answers}) == 1
        assert {a.json()["payment"]["status"] for a in answers} == {"refunded"}


async def test_a_refund_is_answered_as_it_was(bank: Bank) -> None:
    async with bank.replica() as orders:
        payment_id = await _paid(orders, 1000)
        path = f"/payments/{payment_id}/refunds"
        first = await orders.post(path, json={"amount": 400}, headers=_key("as-it-was"))
        await orders.post(path, json={"amount": 600}, headers=_key("the-rest"))

        second = await orders.post(path, json={"amount": 400}, headers=_key("as-it-was"))

        assert (first.json()["payment"]["refunded"], second.status_code) == (400, 200)
        assert second.json()["payment"] == first.json()["payment"]
        assert second.json()["refund"] == first.json()["refund"]


async def test_a_refund_key_names_one_refund_of_one_payment(bank: Bank) -> None:
    async with bank.replica() as one, bank.replica() as two:
        first, second = await _paid(one), await _paid(one)
        answers = await asyncio.gather(
            *(
                replica.post(f"/payments/{payment}/refunds", json={"amount": 1}, headers=_key("one-refund"))
                for payment in (first, second)
                for replica in (one, two)
            )
        )

        assert sorted(a.status_code for a in answers) == [200, 201, 422, 422]
        assert await bank.sql("SELECT count(*) FROM refunds WHERE idempotency_key = 'one-refund'") == [(1,)]


async def test_only_the_caller_that_charged_may_refund(bank: Bank) -> None:
    async with bank.replica(ORDERS) as orders, bank.replica(BILLING) as billing:
        path = f"/payments/{await _paid(orders)}/refunds"
        assert (await orders.post(path, json={"amount": 1}, headers=_key("mine"))).status_code == 201

        answer = await billing.post(path, json={"amount": 1}, headers=_key("mine"))

        assert (answer.status_code, answer.json()["reason"]) == (404, "not_found")


# --- what the database itself holds to ----------------------------------------------------------------


async def test_the_ledger_balances_after_all_this(bank: Bank) -> None:
    off = await bank.sql("""
        SELECT c.id FROM charges c WHERE c.amount - c.refunded <>
            (SELECT sum(e.amount) FROM entries e WHERE e.charge_id = c.id)
    """)
    count = await bank.sql("SELECT count(*) FROM charges")

    assert count > [(0,)]
    assert off == []


@pytest.mark.parametrize(
    ("statement", "refused_as"),
    [
        ("UPDATE entries SET amount = amount + 1", errors.InsufficientPrivilege),
        ("DELETE FROM entries", errors.InsufficientPrivilege),
        ("DELETE FROM charges", errors.InsufficientPrivilege),
        ("UPDATE charges SET amount = 1", errors.InsufficientPrivilege),
        ("UPDATE charges SET refunded = amount + 1", errors.CheckViolation),
        (
            "UPDATE charges SET refunded = 1 WHERE refunded = 0",
            errors.IntegrityConstraintViolation,
        ),
        ("CREATE TABLE mine ()", errors.InsufficientPrivilege),
        ("TRUNCATE refunds", errors.InsufficientPrivilege),
    ],
)
async def test_the_application_role_cannot(bank: Bank, statement: str, refused_as: type[Exception]) -> None:
    async with bank.replica() as orders:
        assert await _paid(orders)
    engine = create_engine(bank.app_secret, bank.target)
    try:
        async with engine.begin() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM charges"))
        with pytest.raises(Exception) as failure:
            async with engine.begin() as connection:
                await connection.execute(text(statement))
        assert isinstance(getattr(failure.value, "orig", None), refused_as)
    finally:
        await engine.dispose()


async def test_the_twin_login_has_the_same_rights(bank: Bank) -> None:
    twin = FixedSecret("payments_app_clone", secrets.token_urlsafe())
    await bank.server.set_password("payments_app_clone", twin.current.fields["password"])
    async with bank.replica() as before, bank.replica(secret=twin) as after:
        payment_id = await _paid(before, 1000)

        refund = await after.post(
            f"/payments/{payment_id}/refunds", json={"amount": 1000}, headers=_key("by-the-twin")
        )

        assert (refund.status_code, refund.json()["database"]["user"]) == (201, "payments_app_clone")
        assert await bank.sql(
            "SELECT amount, booked_by FROM entries WHERE charge_id = %s ORDER BY id", UUID(payment_id)
        ) == [(1000, "payments_app"), (-1000, "payments_app_clone")]


async def test_not_even_the_owner_rewrites_the_ledger(bank: Bank) -> None:
    async with bank.replica() as orders:
        assert await _paid(orders)
    with pytest.raises(errors.IntegrityConstraintViolation, match="append-only"):
        await bank.sql("UPDATE entries SET amount = amount + 1")


async def test_migrating_again_changes_nothing_and_models_match(bank: Bank) -> None:
    def differences() -> list[Any]:
        engine = sync_engine(bank.owner_secret, bank.target)
        try:
            MIGRATIONS.upgrade(engine)
            with engine.connect() as connection:
                return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))
        finally:
            engine.dispose()

    assert await asyncio.to_thread(differences) == []
    owners = await bank.sql("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert owners == [("payments_owner",)]


if __name__ == "__main__":
    asyncio.run(_charge_from_stdin())
