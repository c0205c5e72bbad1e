"""The frontend with a small orders and a small payments behind it, all in one process.

Orders and payments keep things in memory and answer as the real ones do, but every hop is real: mutual
TLS by ztmtls, certificates of a real authority, each side telling what it verified. So what the page shows
is what the library saw, and the tests stay fast enough to look at each page in many ways.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import httpx
from fastapi import FastAPI, Header, Response
from starlette.types import ASGIApp

from frontend.__main__ import CONNECT_TIMEOUT
from frontend.app import create_app
from frontend.orders import Orders
from frontend.settings import Settings
from frontend.streams import Streams
from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.client import AsyncClient, hop
from ztmtls.fastapi import Hop, Problem, install
from ztmtls.reasons import Reason
from ztmtls.server import serve, serve_public
from ztmtls.source import StaticSource
from ztmtls.testing.ca import CertificateAuthority

PREFIX = "spiffe://zt.example/ns/zt-demo/sa/"
SECRET_VERSION = "5f0c2a6e-7c0e-4b5e-9d2b-3f1a8c6d4e21"
PRODUCTS = [
    {
        "sku": "lamp",
        "name": "Desk lamp",
        "description": "Warm light, one arm, no opinions.",
        "price": 4900,
        "currency": "EUR",
    },
    {
        "sku": "notebook",
        "name": "Notebook, dotted",
        "description": "192 pages that lie flat.",
        "price": 1450,
        "currency": "EUR",
    },
    {
        "sku": "pencil",
        "name": "Pencil, 2B",
        "description": "Cedar, unlacquered.",
        "price": 180,
        "currency": "EUR",
    },
    {
        "sku": "mug",
        "name": "Enamel mug",
        "description": "Survives a fall from the table.",
        "price": 1290,
        "currency": "EUR",
    },
]


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class SmallChain:
    """Start with ``with``. `url` is the address of the pages.

    `payment` is what payments answers: ``paid``, ``declined``, ``pending`` (no answer in time) or
    ``refused`` (a problem document). With `orders_down` orders refuses every request. `secret_version` is
    what both log in to their databases with.
    """

    def __init__(self, *, svid_ttl: float = 3600, products: list[dict[str, Any]] | None = None) -> None:
        self.payment = "paid"
        self.orders_down = False
        self.secret_version = SECRET_VERSION
        self.products = PRODUCTS if products is None else products
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.keys: dict[str, str] = {}
        self.placed: dict[str, dict[str, Any]] = {}
        self._ports = {name: free_port() for name in ("orders", "payments")}
        self._authority = CertificateAuthority("zt.example", svid_ttl=svid_ttl)
        self._sources = {name: self._source(name) for name in ("frontend", "orders", "payments")}
        self._audits = {name: AuditLog(name) for name in ("frontend", "orders", "payments")}
        self._streams = Streams(self._audits["frontend"])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="small-chain")
        self._stop = asyncio.Event()
        self._failed: BaseException | None = None

    def __enter__(self) -> SmallChain:
        self._thread.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._failed is None:
            try:
                if httpx.get(f"{self.url}/pillars", trust_env=False).status_code == 200:
                    return self
            except httpx.TransportError:
                self._thread.join(0.02)
        self.__exit__()
        raise RuntimeError("the small chain did not start") from self._failed

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def rotate(self, service: str) -> str:
        """Give `service` a new certificate, as an agent does; returns its serial number."""
        svid = self._authority.issue(PREFIX + service)
        self._in_loop(lambda: self._sources[service].set(self._authority.context(svid)))
        return svid.serial

    def forget_placings(self) -> None:
        """Start the frontend's memory anew, as a restart does."""
        self._in_loop(self._new_frontend)

    # --- inside ---

    def _source(self, name: str) -> StaticSource:
        return StaticSource(self._authority.context(self._authority.issue(PREFIX + name)))

    def _in_loop(self, call: Callable[[], object]) -> None:
        done: Future[object] = Future()
        self._loop.call_soon_threadsafe(lambda: done.set_result(call()))
        done.result(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:
            self._failed = error
        finally:
            self._loop.close()

    async def _main(self) -> None:
        async with (
            self._client("orders", "payments") as payments,
            self._client("frontend", "orders") as client,
        ):
            self._orders = Orders(client, hop)
            self._new_frontend()

            async def pages(scope: Any, receive: Any, send: Any) -> None:
                await self._frontend(scope, receive, send)

            servers = [
                asyncio.create_task(self._serve("payments", _payments(self), "orders")),
                asyncio.create_task(self._serve("orders", _orders(self, payments), "frontend")),
                asyncio.create_task(self._serve_pages(pages)),
            ]
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait([*servers, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in servers:
                task.cancel()
            for result in await asyncio.gather(*servers, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    async def _serve_pages(self, pages: ASGIApp) -> None:
        await serve_public(pages, host="127.0.0.1", port=self.port, grace=1, on_stopping=self._streams.close)

    def _new_frontend(self) -> None:
        settings: dict[str, Any] = {
            "spiffe_endpoint_socket": "unix:/nowhere",
            "spiffe_id": PREFIX + "frontend",
            "port": self.port,
            "probe_port": 1,
            "mode": "local",
            "orders_url": f"https://127.0.0.1:{self._ports['orders']}",
            "orders_spiffe_id": PREFIX + "orders",
        }
        self._frontend = create_app(
            Settings(**settings),
            orders=self._orders,
            identity=lambda: self._sources["frontend"].status().as_dict(),
            audit=self._audits["frontend"],
            streams=self._streams,
        )

    def _client(self, caller: str, callee: str) -> AsyncClient:
        return AsyncClient(
            self._sources[caller],
            peer=PREFIX + callee,
            base_url=f"https://127.0.0.1:{self._ports[callee]}",
            timeout=httpx.Timeout(5, connect=CONNECT_TIMEOUT),
        )

    async def _serve(self, name: str, app: FastAPI, caller: str) -> None:
        paths = {
            "orders": ["/orders", "/orders/{order_id}", "/products", "/status"],
            "payments": ["/payments", "/status"],
        }[name]
        rules = [
            (f"{caller}-calls-{name}", ["POST"], paths[:1]),
            (f"{caller}-reads-{name}", ["GET"], paths),
        ]
        policy = {
            "version": 1,
            "rules": [
                {"name": rule, "callers": [PREFIX + caller], "methods": methods, "paths": allowed}
                for rule, methods, allowed in rules
            ],
        }
        await serve(
            app,
            source=self._sources[name],
            policy=Policy.parse(policy),
            host="127.0.0.1",
            port=self._ports[name],
            audit=self._audits[name],
            grace=1,
        )

    def status_of(self, service: str) -> dict[str, Any]:
        """What a service says of itself at ``GET /status``."""
        return {
            "service": service,
            "identity": self._sources[service].status().as_dict(),
            "credentials": {
                "state": "serving",
                "secret_id": f"zt-demo/{service}/db",
                "version": self.secret_version,
                "age_seconds": 1.2,
                "last_error": None,
                "detail": None,
                "role_arn": f"arn:aws:iam::123456789012:role/zt-demo-{service}",
                "source": "web identity",
                "created_at": _time(-13),
                "rotation_enabled": True,
                "next_rotation_at": _time(47),
            },
            "database": _database(service),
            "decisions": self._audits[service].report(),
        }


def _time(seconds: float = 0) -> str:
    """RFC 3339, so many seconds from now."""
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _database(service: str) -> dict[str, Any]:
    return {
        "service": service,
        "database": service,
        "user": f"{service}_app",
        "secret_id": f"zt-demo/{service}/db",
        "secret_version": SECRET_VERSION,
        "tls_version": "TLSv1.3",
        "tls_cipher": "TLS_AES_256_GCM_SHA384",
    }


def _payments(chain: SmallChain) -> FastAPI:
    app = FastAPI()
    install(app)

    @app.post("/payments")
    async def charge(seen: Hop) -> dict[str, Any]:
        if chain.payment == "refused":
            raise Problem(403, Reason.ROUTE_NOT_ALLOWED, "Refused", "no rule lets orders use POST /payments")
        status = "declined" if chain.payment == "declined" else "charged"
        payment = {"id": str(uuid.uuid4()), "status": status}
        return {"payment": payment, "seen_by_callee": seen.as_dict(), "database": _database("payments")}

    @app.get("/status")
    async def status(seen: Hop) -> dict[str, Any]:
        return chain.status_of("payments") | {"seen_by_callee": seen.as_dict(), "downstream": []}

    return app


def _orders(chain: SmallChain, payments: httpx.AsyncClient) -> FastAPI:
    app = FastAPI()
    install(app)

    def up() -> None:
        if chain.orders_down:
            raise Problem(503, Reason.DATABASE_UNAVAILABLE, "orders' database did not answer")

    @app.get("/products")
    async def products() -> dict[str, Any]:
        up()
        return {"products": chain.products}

    @app.get("/orders")
    async def recent(limit: int = 8) -> dict[str, Any]:
        up()
        return {"orders": [placed["order"] for placed in list(chain.placed.values())[::-1][:limit]]}

    @app.get("/orders/{order_id}")
    async def read(order_id: str, seen: Hop) -> dict[str, Any]:
        up()
        if order_id not in chain.placed:
            raise Problem(404, Reason.NOT_FOUND, "There is no such order")
        return chain.placed[order_id] | {"this_request": seen.as_dict()}

    @app.post("/orders", status_code=201)
    async def place(
        body: dict[str, Any], seen: Hop, response: Response, idempotency_key: Annotated[str, Header()]
    ) -> dict[str, Any]:
        up()
        if order_id := chain.keys.get(idempotency_key):
            response.status_code = 200
            response.headers["Idempotency-Replayed"] = "true"
            return chain.placed[order_id]
        goods = {product["sku"]: product for product in chain.products}
        items = [
            {
                "sku": item["sku"],
                "name": goods[item["sku"]]["name"],
                "quantity": item["quantity"],
                "unit_price": goods[item["sku"]]["price"],
            }
            for item in body["items"]
        ]
        order_id = str(uuid.uuid4())
        order = {
            "id": order_id,
            "items": items,
            "total": sum(item["quantity"] * item["unit_price"] for item in items),
            "currency": "EUR",
            "status": "pending",
            "payment_id": None,
            "created_at": _time(),
        }
        first = {"from": "frontend", "to": "orders", "method": "POST", "path": "/orders"}
        links: list[dict[str, Any]] = [first | {"seen_by_caller": None, "seen_by_callee": seen.as_dict()}]
        databases = [_database("orders")]
        if chain.payment == "pending":
            response.status_code = 202
        else:
            answer = await payments.post("/payments")
            if not answer.is_success:
                problem = answer.json()
                raise Problem(
                    502,
                    Reason(problem["reason"]),
                    "The call to payments was refused",
                    problem["detail"],
                    downstream={"service": "payments", "reason": problem["reason"]},
                )
            charged = answer.json()
            order["status"] = "paid" if charged["payment"]["status"] == "charged" else "declined"
            order["payment_id"] = charged["payment"]["id"]
            links.append(
                {
                    "from": "orders",
                    "to": "payments",
                    "method": "POST",
                    "path": "/payments",
                    "seen_by_caller": hop(answer).as_dict(),
                    "seen_by_callee": charged["seen_by_callee"],
                    "duration_ms": answer.elapsed.total_seconds() * 1000,
                }
            )
            databases.append(charged["database"])
        chain.keys[idempotency_key] = order_id
        chain.placed[order_id] = {"order": order, "links": links, "databases": databases}
        return chain.placed[order_id]

    @app.get("/status")
    async def status(seen: Hop) -> dict[str, Any]:
        up()
        answer = await payments.get("/status")
        behind = answer.json()
        link = {
            "from": "orders",
            "to": "payments",
            "method": "GET",
            "path": "/status",
            "seen_by_caller": hop(answer).as_dict(),
            "seen_by_callee": behind["seen_by_callee"],
            "duration_ms": answer.elapsed.total_seconds() * 1000,
        }
        return chain.status_of("orders") | {
            "seen_by_callee": seen.as_dict(),
            "downstream": [behind],
            "links": [link],
        }

    return app
