"""orders has each order paid exactly once, whatever happens between it and payments.

Real PostgreSQL, the real payments service behind real mutual TLS, and between the two a connection that
can be made to fail at the worst moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import secrets
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import pytest_asyncio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import errors
from sqlalchemy import text

from orders.app import Parts
from orders.app import create_app as create_orders
from orders.checkout import Checkout
from orders.migrations import MIGRATIONS as ORDERS_MIGRATIONS
from orders.models import Base
from orders.payments import Payments, Retry
from orders.schemas import Link, OrderRequest
from orders.settings import PACKAGED_POLICY as ORDERS_POLICY
from orders.store import Orders
from payments.app import create_app as create_payments
from payments.ledger import Ledger
from payments.migrations import MIGRATIONS as PAYMENTS_MIGRATIONS
from payments.settings import PACKAGED_POLICY as PAYMENTS_POLICY
from ztdev.postgres import PostgresServer
from ztdev.stack import BackgroundProcess, BackgroundStack
from ztmtls.asgi import Message, Receive, Scope, Send
from ztmtls.audit import AuditLog
from ztmtls.authz import Policy, load_policy
from ztmtls.client import AsyncClient
from ztmtls.database import DatabaseTarget, create_engine, sync_engine
from ztmtls.listen import bind
from ztmtls.migrations import Migrations
from ztmtls.probes import Probes
from ztmtls.secrets import SecretValue
from ztmtls.server import serve
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority, calling_as
from ztmtls.transactions import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMESPACE = "spiffe://zt.example/ns/zt-demo/sa"
FRONTEND, ORDERS, PAYMENTS = (f"{NAMESPACE}/{name}" for name in ("frontend", "orders", "payments"))
ONE_MUG = {"items": [{"sku": "mug-stoneware", "quantity": 1}]}
LIMIT = 500_000
DEADLINE = 10.0
PATIENT = Retry(deadline=6.0, attempt=1.0, attempts=6, first_pause=0.02, longest_pause=0.2)
# Gives up after two failures, not after a time: a loaded machine must not look like a broken one.
HASTY = Retry(deadline=20.0, attempt=10.0, attempts=2, first_pause=0.02, longest_pause=0.05)
# Asks once, for as long as it takes: for counting requests.
ONCE = Retry(deadline=30.0, attempt=30.0, attempts=1, first_pause=0.02, longest_pause=0.05)


class FixedSecret:
    """Database credentials that are simply there."""

    def __init__(self, username: str, password: str) -> None:
        self.secret_id = "test"
        self.current = SecretValue("v1", {"username": username, "password": password})

    async def get(self) -> SecretValue:
        return self.current

    async def refresh(self, *, force: bool = False) -> SecretValue:
        return self.current


class Wire:
    """A TCP connection between orders and payments that can be cut.

    It sees ciphertext only. `cut` resets every open connection; with `cut_next_request` set, the next bytes
    from orders on a connection that is already in use do that; while `away` is set nobody is at home.
    """

    def __init__(self, target: int) -> None:
        self.away = False
        self.cut_next_request = False
        self.connections = 0
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.away:
            writer.transport.abort()
            return
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._target)
        self._open |= {writer, there}
        try:
            await asyncio.gather(self._pump(reader, there, True), self._pump(there_reader, writer, False))
        finally:
            self._open -= {writer, there}
            for end in (writer, there):
                end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_orders: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if from_orders and self.cut_next_request:
                    self.cut_next_request = False
                    self.cut()
                    return
                writer.write(data)
                await writer.drain()
            writer.close()


Trouble = Callable[[Scope, Receive, Send], Awaitable[None]]


class Mischief:
    """Sits in payments, inside its guard, and does `trouble` instead of serving, `times` times."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.trouble: Trouble | None = None
        self.times = 0
        self.requests: list[tuple[str, str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = dict(scope["headers"]).get(b"idempotency-key", b"").decode()
            self.requests.append((scope["method"], scope["path"], key))
            if self.trouble is not None and self.times > 0:
                self.times -= 1
                await self.trouble(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Shop:
    """orders and payments on one database server, and a client of orders that is frontend."""

    def __init__(self, server: PostgresServer, passwords: dict[str, str]) -> None:
        self.server = server
        self.passwords = passwords
        self.ca = CertificateAuthority("zt.example")
        self.sources = {name: self.source(name) for name in (FRONTEND, ORDERS, PAYMENTS)}
        self.payments_audit = io.StringIO()
        self.wire: Wire
        self.mischief: Mischief
        self.url = ""

    def source(self, spiffe_id: str) -> StaticSource:
        return StaticSource(self.ca.context(self.ca.issue(spiffe_id)))

    def secret(self, role: str) -> FixedSecret:
        return FixedSecret(role, self.passwords[role])

    def target(self, name: str) -> DatabaseTarget:
        return DatabaseTarget("127.0.0.1", self.server.port, name, self.server.ca_file)

    async def migrate(self, name: str, migrations: Migrations) -> None:
        await asyncio.to_thread(
            migrations.upgrade, sync_engine(self.secret(f"{name}_owner"), self.target(name))
        )

    @asynccontextmanager
    async def payments_served(self) -> AsyncIterator[None]:
        engine = create_engine(self.secret("payments_app"), self.target("payments"))
        self.mischief = Mischief(create_payments(Ledger(Database(engine), LIMIT), _report))
        async with served(
            self.mischief, self.sources[PAYMENTS], load_policy(PAYMENTS_POLICY), self.payments_audit
        ) as port:
            self.wire = Wire(port)
            self.url = f"https://127.0.0.1:{await self.wire.start()}"
            try:
                yield
            finally:
                await self.wire.stop()
                await engine.dispose()

    @asynccontextmanager
    async def orders(
        self,
        retry: Retry = PATIENT,
        *,
        source: StaticSource | None = None,
        peer: str = PAYMENTS,
        caller: str = FRONTEND,
    ) -> AsyncIterator[OrdersReplica]:
        """A replica of orders with its own pool, its own connections to payments and its own client."""
        engine = create_engine(self.secret("orders_app"), self.target("orders"), pool_size=10)
        store = Orders(Database(engine))
        async with AsyncClient(source or self.sources[ORDERS], peer=peer, base_url=self.url) as to_payments:
            payments = Payments(to_payments, retry)
            checkout = Checkout(store, payments)
            app = create_orders(Parts(store, checkout, payments, _report))
            async with self.client_of(app, caller) as client:
                yield OrdersReplica(client, checkout, store)
        await engine.dispose()

    def client_of(self, app: Any, caller: str) -> httpx.AsyncClient:
        policy = load_policy(ORDERS_POLICY)
        if caller != FRONTEND:  # another caller that some other policy would allow
            rule = {"name": "other", "callers": [caller], "methods": ["GET", "POST"]}
            paths = ["/orders", "/orders/{id}"]
            policy = Policy.parse({"version": 1, "rules": [rule | {"paths": paths}]})
        return calling_as(app, caller, policy, callee_id=ORDERS)

    async def sql(self, database: str, query: str, *parameters: object) -> list[Any]:
        """Ask a database as its administrator."""
        async with self.server.administrator(database) as connection:
            cursor = await connection.execute(query, parameters)
            return await cursor.fetchall() if cursor.description else []

    async def booked(self, order_id: str) -> list[Any]:
        """The lines of the payments ledger for one order."""
        return await self.sql(
            "payments",
            "SELECT e.amount FROM entries e JOIN charges c ON c.id = e.charge_id WHERE c.order_id = %s",
            UUID(order_id),
        )

    async def make_due(self) -> None:
        await self.sql("orders", "UPDATE orders SET next_attempt_at = now() WHERE status = 'pending'")

    def make_trouble(self, trouble: Trouble, times: int = 1) -> None:
        self.mischief.trouble, self.mischief.times = trouble, times
        self.mischief.requests.clear()


class OrdersReplica:
    """One replica of orders."""

    def __init__(self, client: httpx.AsyncClient, checkout: Checkout, store: Orders) -> None:
        self.client = client
        self.checkout = checkout
        self.store = store

    async def place(self, key: str | None = None, body: Any = ONE_MUG) -> httpx.Response:
        return await self.client.post(
            "/orders", json=body, headers={"Idempotency-Key": key or uuid4().hex}, timeout=30
        )


async def _report() -> dict[str, Any]:
    return {"identity": {}, "credentials": {}, "database": None, "decisions": {}}


@asynccontextmanager
async def served(app: Any, source: StaticSource, policy: Policy, audit: io.StringIO) -> AsyncIterator[int]:
    """Serve `app` over mutual TLS on a free port."""
    with bind("127.0.0.1", 0, "PORT") as free:
        port = int(free.getsockname()[1])
    probes = Probes("127.0.0.1", 0, source=source)
    task = asyncio.create_task(
        serve(
            app,
            source=source,
            policy=policy,
            host="127.0.0.1",
            port=port,
            audit=AuditLog("payments", audit),
            probes=probes,
            grace=1.0,
        )
    )
    try:
        async with asyncio.timeout(DEADLINE):
            while not (probes.serving or task.done()):
                await asyncio.sleep(0.01)
        if task.done():
            await task
        yield port
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def open_shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    with bind("127.0.0.1", 0, "PORT") as free:
        port = int(free.getsockname()[1])
    roles = [f"{name}_{role}" for name in ("orders", "payments") for role in ("app", "owner")]
    passwords = {role: secrets.token_urlsafe() for role in roles}
    async with PostgresServer(tmp_path_factory.mktemp("postgres"), port) as server:
        for name in ("orders", "payments"):
            await server.ensure_service(
                name, app_password=passwords[f"{name}_app"], owner_password=passwords[f"{name}_owner"]
            )
        shop = Shop(server, passwords)
        await shop.migrate("orders", ORDERS_MIGRATIONS)
        await shop.migrate("payments", PAYMENTS_MIGRATIONS)
        async with shop.payments_served():
            yield shop


@pytest.fixture
def shop(open_shop: Shop) -> Shop:
    """The shop, with nothing left of another test's trouble."""
    open_shop.mischief.trouble, open_shop.mischief.times = None, 0
    open_shop.wire.away = open_shop.wire.cut_next_request = False
    return open_shop


# --- the plain case -----------------------------------------------------------------------------------


async def test_an_order_is_paid_and_keeps_the_evidence_of_every_hop(shop: Shop) -> None:
    async with shop.orders() as replica:
        body = {"items": [{"sku": "mug-stoneware", "quantity": 2}, {"sku": "desk-lamp", "quantity": 1}]}
        answer = await replica.place("plain", body)

        assert answer.status_code == 201
        order = answer.json()["order"]
        assert (order["status"], order["total"], order["currency"]) == ("paid", 2 * 1800 + 8900, "EUR")
        assert [(item["sku"], item["quantity"]) for item in order["items"]] == [
            ("mug-stoneware", 2),
            ("desk-lamp", 1),
        ]
        first, second = answer.json()["links"]
        assert (first["from"], first["to"], first["seen_by_caller"]) == ("frontend", "orders", None)
        assert first["seen_by_callee"]["peer"]["id"] == FRONTEND
        assert (second["from"], second["to"], second["path"]) == ("orders", "payments", "/payments")
        assert second["seen_by_caller"]["peer"]["id"] == PAYMENTS
        assert second["seen_by_callee"]["peer"]["id"] == ORDERS
        assert second["seen_by_callee"]["rule"] == "orders-charges"
        assert second["seen_by_caller"]["own"] == {
            name: second["seen_by_callee"]["peer"][name] for name in ("id", "serial", "not_after")
        }
        assert second["duration_ms"] > 0
        assert [(use["service"], use["user"], use["tls_version"]) for use in answer.json()["databases"]] == [
            ("orders", "orders_app", "TLSv1.3"),
            ("payments", "payments_app", "TLSv1.3"),
        ]
        assert await shop.booked(order["id"]) == [(12500,)]

        later = (await replica.client.get(f"/orders/{order['id']}")).json()
        assert later.pop("this_request")["rule"] == "frontend-reads-orders"
        assert later == answer.json()


async def test_the_catalogue_has_prices_and_orders_come_newest_first(shop: Shop) -> None:
    async with shop.orders() as replica:
        products = (await replica.client.get("/products")).json()["products"]
        assert len(products) == 8
        assert all(product["price"] > 0 and product["currency"] == "EUR" for product in products)

        ids = [(await replica.place()).json()["order"]["id"] for _ in range(3)]
        listed = (await replica.client.get("/orders", params={"limit": 2})).json()["orders"]

        assert [order["id"] for order in listed] == [ids[2], ids[1]]


async def test_the_same_key_places_one_order(shop: Shop) -> None:
    async with shop.orders() as one, shop.orders() as two:
        answers = await asyncio.gather(*(replica.place("twins") for replica in [one, two] * 5))

        assert sorted(a.status_code for a in answers) == [200] * 9 + [201]
        assert len({a.json()["order"]["id"] for a in answers}) == 1
        assert len({a.json()["order"]["payment_id"] for a in answers}) == 1
        assert await shop.booked(answers[0].json()["order"]["id"]) == [(1800,)]


async def test_the_same_key_for_other_goods_is_refused(shop: Shop) -> None:
    async with shop.orders() as replica:
        assert (await replica.place("reused")).status_code == 201

        answer = await replica.place("reused", {"items": [{"sku": "mug-stoneware", "quantity": 2}]})

        assert (answer.status_code, answer.json()["reason"]) == (422, "idempotency_key_reused")


async def test_another_caller_has_its_own_keys_and_orders(shop: Shop) -> None:
    async with shop.orders() as replica, shop.orders(caller=f"{NAMESPACE}/other") as other:
        mine = (await replica.place("shared")).json()["order"]
        theirs = await other.place("shared")

        assert theirs.status_code == 201
        assert theirs.json()["order"]["id"] != mine["id"]
        hidden = await other.client.get(f"/orders/{mine['id']}")
        assert (hidden.status_code, hidden.json()["reason"]) == (404, "not_found")
        assert [o["id"] for o in (await other.client.get("/orders")).json()["orders"]] == [
            theirs.json()["order"]["id"]
        ]


async def test_goods_that_are_not_there_are_named(shop: Shop) -> None:
    async with shop.orders() as replica:
        answer = await replica.place(
            body={"items": [ONE_MUG["items"][0], {"sku": "no-such-thing", "quantity": 1}]}
        )

        assert (answer.status_code, answer.json()["reason"]) == (422, "invalid_request")
        assert [error["field"] for error in answer.json()["errors"]] == ["items[1].sku"]


async def test_what_payments_declines_is_declined(shop: Shop) -> None:
    async with shop.orders() as replica:
        blankets = {"items": [{"sku": "wool-blanket", "quantity": 99}]}
        answer = await replica.place("too-much", blankets)

        assert answer.status_code == 201
        order = answer.json()["order"]
        assert (order["status"], order["reason"], order["payment_id"]) == (
            "declined",
            "payment_declined",
            None,
        )
        assert await shop.booked(order["id"]) == []
        again = await replica.place("too-much", blankets)
        assert (again.status_code, again.json()["order"]) == (200, order)


# --- trouble on the way -------------------------------------------------------------------------------


def cut_after_the_commit(shop: Shop) -> Trouble:
    async def trouble(scope: Scope, receive: Receive, send: Send) -> None:
        async def lost(message: Message) -> None:
            shop.wire.cut()

        await shop.mischief.app(scope, receive, lost)

    return trouble


def cut_before_anything_happens(shop: Shop) -> Trouble:
    async def trouble(scope: Scope, receive: Receive, send: Send) -> None:
        shop.wire.cut()

    return trouble


def no_answer_in_time(shop: Shop) -> Trouble:
    async def trouble(scope: Scope, receive: Receive, send: Send) -> None:
        async def held(message: Message) -> None:
            while (await receive())["type"] != "http.disconnect":  # until orders has given up
                pass

        await shop.mischief.app(scope, receive, held)

    return trouble


def answers_with(status: int) -> Callable[[Shop], Trouble]:
    def make(shop: Shop) -> Trouble:
        async def trouble(scope: Scope, receive: Receive, send: Send) -> None:
            async def ignored(message: Message) -> None:
                pass

            await shop.mischief.app(scope, receive, ignored)
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"<html>gateway</html>"})

        return trouble

    return make


def goes_away_after_the_commit(shop: Shop) -> Trouble:
    async def trouble(scope: Scope, receive: Receive, send: Send) -> None:
        async def lost(message: Message) -> None:
            shop.wire.away = True
            shop.wire.cut()
            before = shop.wire.connections

            async def come_back() -> None:
                while shop.wire.connections < before + 2:
                    await asyncio.sleep(0.01)
                shop.wire.away = False

            background.add(task := asyncio.create_task(come_back()))
            task.add_done_callback(background.discard)

        await shop.mischief.app(scope, receive, lost)

    return trouble


background: set[asyncio.Task[None]] = set()


@pytest.mark.parametrize(
    "trouble",
    [
        cut_after_the_commit,
        no_answer_in_time,
        cut_before_anything_happens,
        answers_with(502),
        answers_with(503),
        answers_with(504),
        goes_away_after_the_commit,
    ],
)
async def test_one_loss_is_repaired_within_the_request(
    shop: Shop, trouble: Callable[[Shop], Trouble]
) -> None:
    async with shop.orders() as replica:
        assert (await replica.place()).status_code == 201
        shop.make_trouble(trouble(shop))

        answer = await replica.place()

        assert answer.status_code == 201
        order = answer.json()["order"]
        assert order["status"] == "paid"
        assert await shop.booked(order["id"]) == [(1800,)]
        assert len(shop.mischief.requests) >= 2
        assert set(shop.mischief.requests) == {("POST", "/payments", f"order-{order['id']}")}


async def test_an_idle_connection_that_closes_under_the_request_costs_nothing(shop: Shop) -> None:
    async with shop.orders() as replica:
        assert (await replica.place()).status_code == 201
        shop.wire.cut_next_request = True

        answer = await replica.place()

        assert not shop.wire.cut_next_request
        assert answer.status_code == 201
        assert await shop.booked(answer.json()["order"]["id"]) == [(1800,)]


@pytest.mark.parametrize("trouble", [cut_after_the_commit, cut_before_anything_happens, answers_with(500)])
async def test_a_lasting_loss_leaves_a_pending_order_that_is_settled_later(
    shop: Shop, trouble: Callable[[Shop], Trouble]
) -> None:
    async with shop.orders(HASTY) as replica:
        assert (await replica.place()).status_code == 201
        shop.make_trouble(trouble(shop), times=100)
        key = uuid4().hex

        answer = await replica.place(key)

        assert answer.status_code == 202
        order = answer.json()["order"]
        assert (order["status"], order["reason"], order["payment_id"]) == ("pending", "payment_unknown", None)

        shop.mischief.trouble = None
        assert await replica.checkout.settle_due() == 0  # not due yet
        await shop.make_due()
        assert await replica.checkout.settle_due() == 1

        later = (await replica.client.get(f"/orders/{order['id']}")).json()
        assert (later["order"]["status"], later["order"]["reason"]) == ("paid", None)
        assert [link["to"] for link in later["links"]] == ["orders", "payments"]
        assert await shop.booked(order["id"]) == [(1800,)]
        assert (await replica.place(key)).json()["order"] == later["order"]


async def test_asking_again_settles_a_pending_order(shop: Shop) -> None:
    async with shop.orders(HASTY) as replica:
        shop.make_trouble(cut_after_the_commit(shop), times=100)
        pending = await replica.place("ask-again")
        assert pending.status_code == 202
        shop.mischief.trouble = None

        answer = await replica.place("ask-again")

        assert (answer.status_code, answer.json()["order"]["status"]) == (200, "paid")
        assert await shop.booked(answer.json()["order"]["id"]) == [(1800,)]


# --- crashes and replicas -----------------------------------------------------------------------------


async def _written_down_only(shop: Shop, replica: OrdersReplica) -> str:
    """What a process leaves behind that dies between its commit and the charge."""
    link = Link(source="frontend", target="orders", method="POST", path="/orders")
    request = OrderRequest.model_validate(ONE_MUG)
    order, _ = await replica.store.place(FRONTEND, uuid4().hex, request, link)
    return str(order.id)


async def test_an_order_left_behind_by_a_crash_is_paid_once(shop: Shop) -> None:
    async with shop.orders() as replica:
        order_id = await _written_down_only(shop, replica)
        assert await replica.checkout.settle_due() == 0  # its own request may still be at it
        await shop.make_due()

        assert await replica.checkout.settle_due() == 1

        assert await shop.booked(order_id) == [(1800,)]
        assert (await replica.client.get(f"/orders/{order_id}")).json()["order"]["status"] == "paid"
        assert await replica.checkout.settle_due() == 0


async def test_two_replicas_share_the_work_and_do_none_twice(shop: Shop) -> None:
    async with shop.orders(ONCE) as one, shop.orders(ONCE) as two:
        ids = [await _written_down_only(shop, one) for _ in range(12)]
        await shop.make_due()
        shop.mischief.requests.clear()

        looked_at = await asyncio.gather(
            *(replica.checkout.settle_due(limit=3) for replica in [one, two] * 3)
        )

        assert sum(looked_at) == 12
        keys = [key for _, _, key in shop.mischief.requests]
        assert sorted(keys) == sorted(f"order-{order_id}" for order_id in ids)


async def test_a_taken_order_comes_up_again_later_and_later(shop: Shop) -> None:
    async with shop.orders() as replica:
        order_id = await _written_down_only(shop, replica)
        pauses = []
        for _ in range(8):
            await shop.make_due()
            assert [str(order.id) for order in await replica.store.take_due(10)] == [order_id]
            assert await replica.store.take_due(10) == []
            query = "SELECT extract(epoch FROM next_attempt_at - now()) FROM orders WHERE id = %s"
            pauses.append(float((await shop.sql("orders", query, UUID(order_id)))[0][0]))
        assert [round(pause, -1) for pause in pauses] == [10, 20, 40, 80, 160, 300, 300, 300]

        await shop.make_due()
        assert await replica.checkout.settle_due() == 1


async def test_a_payment_wins_over_a_decline(shop: Shop) -> None:
    async with shop.orders() as replica:
        order_id = await _written_down_only(shop, replica)
        reason = "wrong_server_identity"
        query = "UPDATE orders SET status = 'declined', reason = %s WHERE id = %s"
        await shop.sql("orders", query, reason, UUID(order_id))
        charged = await replica.checkout._payments.charge(UUID(order_id), 1800)

        order = await replica.store.paid(UUID(order_id), charged)  # type: ignore[arg-type]

        assert (order.status, order.reason) == ("paid", None)


# --- identities ---------------------------------------------------------------------------------------


async def test_a_server_that_is_not_payments_never_sees_the_order(shop: Shop) -> None:
    async with shop.orders() as replica:
        assert (await replica.place()).status_code == 201
    async with shop.orders(peer=f"{NAMESPACE}/other-payments") as deceived:
        shop.mischief.requests.clear()

        answer = await deceived.place("impostor")

        problem = answer.json()
        assert (answer.status_code, problem["reason"]) == (502, "wrong_server_identity")
        order = problem["order"]
        assert (order["status"], order["reason"]) == ("declined", "wrong_server_identity")
        assert shop.mischief.requests == []
        assert await shop.booked(order["id"]) == []
        again = await deceived.place("impostor")
        assert (again.status_code, again.json()["order"]) == (200, order)


async def test_a_caller_that_payments_does_not_allow_is_told_why(shop: Shop) -> None:
    async with shop.orders() as replica:
        assert (await replica.place()).status_code == 201
    async with shop.orders(source=shop.source(f"{NAMESPACE}/shipping")) as stranger:
        answer = await stranger.place()

        problem = answer.json()
        assert (answer.status_code, problem["reason"]) == (502, "caller_not_allowed")
        assert problem["downstream"]["status"] == 403
        assert problem["links"][-1]["seen_by_caller"]["peer"]["id"] == PAYMENTS
        assert await shop.booked(problem["order"]["id"]) == []
        assert '"reason": "caller_not_allowed"' in shop.payments_audit.getvalue()


async def test_a_certificate_that_payments_rejects_is_an_identity_failure(shop: Shop) -> None:
    foreign = CertificateAuthority("zt.example")
    context = foreign.context(foreign.issue(ORDERS))
    ours = shop.sources[ORDERS].context
    mixed = StaticSource(type(context)(context.generation, context.svids, ours.bundles, context.received_at))
    async with shop.orders() as replica:
        assert (await replica.place()).status_code == 201
    async with shop.orders(source=mixed) as stranger:
        shop.mischief.requests.clear()
        answer = await stranger.place()

        problem = answer.json()
        assert (answer.status_code, problem["reason"]) == (502, "refused_by_server")
        assert shop.mischief.requests == []
        assert await shop.booked(problem["order"]["id"]) == []


async def test_status_shows_both_services(shop: Shop) -> None:
    async with shop.orders() as replica:
        status = (await replica.client.get("/status")).json()

        (downstream,) = status["downstream"]
        assert (status["service"], downstream["service"]) == ("orders", "payments")
        assert downstream["seen_by_callee"]["peer"]["id"] == ORDERS
        assert status["links"][0]["seen_by_callee"] == downstream["seen_by_callee"]


# --- what the database itself holds to ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "refused_as"),
    [
        ("UPDATE products SET price = 1", errors.InsufficientPrivilege),
        ("UPDATE orders SET total = 1", errors.InsufficientPrivilege),
        ("DELETE FROM orders", errors.InsufficientPrivilege),
        ("UPDATE order_items SET unit_price = 1", errors.InsufficientPrivilege),
        ("UPDATE orders SET status = 'paid', payment_id = NULL, reason = NULL", errors.CheckViolation),
        ("UPDATE orders SET status = 'lost'", errors.CheckViolation),
        ("UPDATE orders SET status = 'declined', payment_id = NULL, reason = NULL", errors.CheckViolation),
        (
            "INSERT INTO order_items SELECT id, 9, 'tea-jasmine', 'Tea', 1, 1450 FROM orders LIMIT 1",
            errors.IntegrityConstraintViolation,
        ),
        ("CREATE TABLE mine ()", errors.InsufficientPrivilege),
    ],
)
async def test_the_application_role_cannot(shop: Shop, statement: str, refused_as: type[Exception]) -> None:
    async with shop.orders() as replica:
        assert (await replica.place()).status_code == 201
    engine = create_engine(shop.secret("orders_app"), shop.target("orders"))
    try:
        async with engine.begin() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM orders"))
        with pytest.raises(Exception) as failure:
            async with engine.begin() as connection:
                await connection.execute(text(statement))
        assert isinstance(getattr(failure.value, "orig", None), refused_as)
    finally:
        await engine.dispose()


async def test_migrating_again_changes_nothing_and_models_match(shop: Shop) -> None:
    def differences() -> list[Any]:
        engine = sync_engine(shop.secret("orders_owner"), shop.target("orders"))
        ORDERS_MIGRATIONS.upgrade(engine)
        with engine.connect() as connection:
            return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))

    assert await asyncio.to_thread(differences) == []


async def test_every_order_is_paid_as_often_as_it_says(shop: Shop) -> None:
    paid = await shop.sql("orders", "SELECT id, total, payment_id FROM orders WHERE status = 'paid'")
    assert len(paid) > 10
    charges = await shop.sql("payments", "SELECT order_id, amount, id FROM charges")
    assert sorted(paid) == sorted(charges)


# --- as processes of the whole stack ------------------------------------------------------------------


class Chain:
    """The running stack, called as frontend calls it."""

    def __init__(self, stack: BackgroundStack) -> None:
        self.stack = stack
        self.source = StaticSource(stack.ca.context(stack.ca.issue(FRONTEND)))

    async def place(self, key: str) -> httpx.Response:
        async with AsyncClient(
            self.source, peer=ORDERS, base_url=self.stack.urls.orders, timeout=30
        ) as client:
            return await client.post("/orders", json=ONE_MUG, headers={"Idempotency-Key": key})

    async def sql(self, database: str, *statements: str) -> list[Any]:
        """Run statements as the administrator; the rows of the last."""

        async def run() -> list[Any]:
            async with self.stack.postgres.administrator(database) as connection:
                for statement in statements:
                    cursor = await connection.execute(statement.encode())
                return await cursor.fetchall() if cursor.description else []

        return await self.stack.arun(run())

    async def order_of(self, key: str) -> tuple[str, str]:
        """Id and status of the order that `key` placed."""
        rows = await self.sql("orders", f"SELECT id, status FROM orders WHERE idempotency_key = '{key}'")
        return str(rows[0][0]), rows[0][1]

    async def charges(self, key: str) -> list[Any]:
        order_id, _ = await self.order_of(key)
        return await self.sql("payments", f"SELECT amount FROM charges WHERE order_id = '{order_id}'")

    @asynccontextmanager
    async def charging_is_held(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Let no charge get through; yields a wait until one is held. Goes on at the end of the block."""
        holding, release = threading.Event(), threading.Event()

        async def hold() -> None:
            async with self.stack.postgres.administrator("payments") as connection, connection.transaction():
                await connection.execute("LOCK TABLE charges IN ACCESS EXCLUSIVE MODE")
                holding.set()
                await asyncio.to_thread(release.wait, DEADLINE)

        async def until_held() -> None:
            query = "SELECT count(*) FROM pg_locks WHERE relation = 'charges'::regclass AND NOT granted"
            await until(lambda: self.sql("payments", query), [(1,)])

        held = asyncio.create_task(self.stack.arun(hold()))
        try:
            await asyncio.to_thread(holding.wait, DEADLINE)
            yield until_held
        finally:
            release.set()
            await held

    async def probe(self, service: str, path: str) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(self.stack.urls.probes[service] + path)


async def until(ask: Callable[[], Awaitable[Any]], wanted: Any, timeout: float = DEADLINE) -> None:
    """Ask until the answer is `wanted`."""
    answer = None
    try:
        async with asyncio.timeout(timeout):
            while (answer := await ask()) != wanted:
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"still {answer!r} after {timeout:g} s, not {wanted!r}") from None


@pytest.fixture
def chain(stack: BackgroundStack) -> Chain:
    return Chain(stack)


async def test_an_order_in_flight_at_sigterm_is_finished(chain: Chain) -> None:
    assert (await chain.place("sigterm-before")).status_code == 201
    process = chain.stack.process("orders")
    pid = process.pid
    assert pid is not None
    async with chain.charging_is_held() as until_held:
        placing = asyncio.create_task(chain.place("sigterm"))
        await until_held()
        os.kill(pid, signal.SIGTERM)

    answer = await placing

    assert (answer.status_code, answer.json()["order"]["status"]) == (201, "paid")
    assert await chain.charges("sigterm") == [(1800,)]
    await until(lambda: _pid_changed(process, pid), True)
    await asyncio.to_thread(process.wait_ready)


async def test_payments_killed_in_the_middle_charges_once(chain: Chain) -> None:
    assert (await chain.place("killed-before")).status_code == 201
    process = chain.stack.process("payments")
    pid = process.pid
    async with chain.charging_is_held() as until_held:
        placing = asyncio.create_task(chain.place("killed"))
        await until_held()
        process.kill()

    answer = await placing
    await until(lambda: _pid_changed(process, pid), True)
    await asyncio.to_thread(process.wait_ready)

    assert answer.status_code in (201, 202)
    assert (await chain.place("killed")).json()["order"]["status"] == "paid"
    assert await chain.charges("killed") == [(1800,)]


async def test_orders_killed_in_the_middle_is_settled_by_its_successor(chain: Chain) -> None:
    assert (await chain.place("successor-before")).status_code == 201
    process = chain.stack.process("orders")
    pid = process.pid
    async with chain.charging_is_held() as until_held:
        placing = asyncio.create_task(chain.place("successor"))
        await until_held()
        process.kill()
        with pytest.raises(httpx.TransportError):
            await placing
        assert (await chain.order_of("successor"))[1] == "pending"
    await until(lambda: _pid_changed(process, pid), True)
    await asyncio.to_thread(process.wait_ready)
    await chain.sql("orders", "UPDATE orders SET next_attempt_at = now() WHERE status = 'pending'")

    async def status() -> str:
        return (await chain.order_of("successor"))[1]

    await until(status, "paid")
    assert await chain.charges("successor") == [(1800,)]


async def test_without_its_database_orders_is_alive_and_not_ready(chain: Chain) -> None:
    async def database() -> str:
        checks: dict[str, str] = (await chain.probe("orders", "/readyz")).json()["checks"]
        return checks["database"]

    await until(database, "ok")
    process = chain.stack.process("orders")
    pid = process.pid
    try:
        await chain.sql(
            "postgres",
            "ALTER DATABASE orders ALLOW_CONNECTIONS false",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'orders'",
        )
        await until(database, "database_unavailable")
        assert (await chain.probe("orders", "/readyz")).status_code == 503
        assert (await chain.probe("orders", "/livez")).status_code == 200
        assert (await chain.probe("payments", "/readyz")).status_code == 200
        answer = await chain.place("no-database")
        assert (answer.status_code, answer.json()["reason"]) == (503, "database_unavailable")
    finally:
        await chain.sql("postgres", "ALTER DATABASE orders ALLOW_CONNECTIONS true")

    await until(database, "ok")
    assert process.pid == pid
    assert (await chain.place("no-database")).status_code == 201


async def _pid_changed(process: BackgroundProcess, before: int | None) -> bool:
    return process.pid not in (None, before)
