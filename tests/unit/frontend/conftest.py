"""The frontend on an in-process ASGI transport, with a scripted orders behind it."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontend.app import create_app
from frontend.orders import Orders
from frontend.settings import Settings
from frontend.streams import Streams
from ztmtls.audit import AuditLog
from ztmtls.hop import HopView
from ztmtls.svid import IdentitySummary

PREFIX = "spiffe://zt.example/ns/zt-demo/sa/"
ORDER_ID = "5d0c6f0e-6a59-4c0f-9a3c-0d9d6c1f7a11"
SERIALS = {"frontend": "0f" * 20, "orders": "a1" * 20, "payments": "b2" * 20}

Answer = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


def moment(seconds: float) -> str:
    """RFC 3339, so many seconds from now."""
    return (
        (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds").replace("+00:00", "Z")
    )


def certificate(service: str) -> dict[str, str]:
    return {"id": PREFIX + service, "serial": SERIALS[service], "not_after": "2030-01-01T12:00:00Z"}


def view(side: str, own: str, peer: str, **changes: Any) -> dict[str, Any]:
    """What one side of a hop says, as JSON."""
    return {
        "side": side,
        "own": certificate(own),
        "peer": {**certificate(peer), "authority": "cafe"},
        "tls_version": "TLSv1.3",
        "cipher": "TLS_AES_256_GCM_SHA384",
        "generation": 3,
        "connection": "c-1",
        "rule": f"{peer}-calls-{own}" if side == "callee" else None,
    } | changes


def seen_by_frontend(_: httpx.Response) -> HopView:
    """Stands in for `ztmtls.client.hop`, which needs a real connection."""
    return HopView(
        side="caller",
        own=IdentitySummary(**certificate("frontend")),
        peer=IdentitySummary(**certificate("orders")),
        authority="cafe",
        tls_version="TLSv1.3",
        cipher="TLS_AES_256_GCM_SHA384",
        generation=3,
        connection="c-1",
    )


def order(**changes: Any) -> dict[str, Any]:
    return {
        "id": ORDER_ID,
        "items": [{"sku": "lamp", "name": "Desk lamp", "quantity": 2, "unit_price": 4900}],
        "total": 9800,
        "currency": "EUR",
        "status": "paid",
        "reason": None,
        "payment_id": "1f1e2d3c-0000-4000-8000-000000000001",
        "created_at": "2026-01-02T03:04:05Z",
    } | changes


def placed(**changes: Any) -> dict[str, Any]:
    """An answer of orders about one order, with its evidence."""
    return {
        "order": order(**changes),
        "links": [
            {
                "from": "frontend",
                "to": "orders",
                "method": "POST",
                "path": "/orders",
                "seen_by_caller": None,
                "seen_by_callee": view("callee", "orders", "frontend"),
                "duration_ms": None,
            },
            {
                "from": "orders",
                "to": "payments",
                "method": "POST",
                "path": "/payments",
                "seen_by_caller": view("caller", "orders", "payments"),
                "seen_by_callee": view("callee", "payments", "orders"),
                "duration_ms": 12.5,
            },
        ],
        "databases": [database("orders"), database("payments")],
    }


def database(service: str) -> dict[str, Any]:
    return {
        "service": service,
        "database": service,
        "user": f"{service}_app",
        "secret_id": f"zt-demo/{service}/db",
        "secret_version": "0a1b2c3d-aaaa-4bbb-8ccc-ddddeeeeffff",
        "tls_version": "TLSv1.3",
        "tls_cipher": "TLS_AES_256_GCM_SHA384",
    }


def identity(service: str, **changes: Any) -> dict[str, Any]:
    """A source's status, as JSON."""
    return {
        "state": "serving",
        "reason": "",
        "id": PREFIX + service,
        "serial": SERIALS[service],
        "not_after": moment(60),
        "seconds_left": 60.0,
        "generation": 3,
        "last_update": moment(-5),
        "failures": 0,
        "authorities": {"zt.example": 1},
    } | changes


def report(service: str, **changes: Any) -> dict[str, Any]:
    """What a service answers to ``GET /status``."""
    caller = {"orders": "frontend", "payments": "orders"}[service]
    return {
        "service": service,
        "identity": identity(service),
        "credentials": {
            "state": "serving",
            "secret_id": f"zt-demo/{service}/db",
            "version": "0a1b2c3d-aaaa-4bbb-8ccc-ddddeeeeffff",
            "age_seconds": 12.0,
            "last_error": None,
            "detail": None,
            "role_arn": f"arn:aws:iam::123456789012:role/zt-demo-{service}",
            "source": "web identity",
            "created_at": moment(-20),
            "rotation_enabled": True,
            "next_rotation_at": moment(41),
        },
        "database": database(service),
        "seen_by_callee": view("callee", service, caller),
        "downstream": [],
    } | changes


def status_answer(payments: dict[str, Any] | None = None) -> dict[str, Any]:
    behind = report("payments") if payments is None else payments
    link = {
        "from": "orders",
        "to": "payments",
        "method": "GET",
        "path": "/status",
        "seen_by_caller": view("caller", "orders", "payments"),
        "seen_by_callee": behind.get("seen_by_callee"),
        "duration_ms": 2.0,
    }
    return report("orders", downstream=[behind], links=[link])


def problem(
    status: int, reason: str, title: str = "Refused", detail: str = "", **more: Any
) -> httpx.Response:
    body = {"type": f"urn:ztmtls:problem:{reason}", "title": title, "status": status, "detail": detail}
    return httpx.Response(status, json=body | {"reason": reason} | more)


class ScriptedOrders:
    """Answers as orders would; `answers` overrides one route, by method and path."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: dict[tuple[str, str], Answer | list[Answer]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.get((request.method, request.url.path), self._usual)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer

    def asked(self, method: str, path: str) -> list[httpx.Request]:
        return [r for r in self.requests if (r.method, r.url.path) == (method, path)]

    def _usual(self, request: httpx.Request) -> httpx.Response:
        match request.method, request.url.path:
            case "GET", "/products":
                lamp = {"sku": "lamp", "name": "Desk lamp", "price": 4900}
                mug = {"sku": "mug", "name": "Mug", "price": 1290}
                more = {"description": "Good.", "currency": "EUR"}
                return httpx.Response(200, json={"products": [lamp | more, mug | more]})
            case "GET", "/orders":
                return httpx.Response(200, json={"orders": [order()]})
            case "POST", "/orders":
                return httpx.Response(201, json=placed())
            case "GET", "/status":
                return httpx.Response(200, json=status_answer())
            case "GET", path if path == f"/orders/{ORDER_ID}":
                seen = view("callee", "orders", "frontend")
                return httpx.Response(200, json=placed() | {"this_request": seen})
        return problem(404, "not_found", "There is no such order")


class Browser:
    """A person's browser: keeps its cookie, says where its forms come from."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(path, headers=headers)

    async def form(self) -> dict[str, str]:
        """The hidden fields of a fresh order form."""
        return hidden_fields((await self.get("/")).text)

    async def send(self, fields: dict[str, str], **headers: str | None) -> httpx.Response:
        """Post a form as a browser does; a header given as None is left out."""
        origin = str(self.http.base_url).rstrip("/")
        usual: dict[str, str | None] = {"Origin": origin, "Sec-Fetch-Site": "same-origin"}
        sent = {name.replace("_", "-"): value for name, value in (usual | headers).items()}
        return await self.http.post(
            "/orders", data=fields, headers={n: v for n, v in sent.items() if v is not None}
        )

    async def order(self, **quantities: int | str) -> httpx.Response:
        """Fill in a fresh form and send it."""
        typed = {f"quantity.{sku}": str(value) for sku, value in quantities.items()}
        return await self.send(await self.form() | typed)


def hidden_fields(page: str) -> dict[str, str]:
    found = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', page)
    return {html.unescape(name): html.unescape(value) for name, value in found}


def text_of(page: str) -> str:
    """What a person reads: tags out, space collapsed, printed apostrophes as typed ones."""
    body = re.sub(r"<(svg|head)\b.*?</\1>", "", page, flags=re.S)
    text = re.sub(r"<(/?span|wbr|/?code|br)\b[^>]*>", "", body)
    read = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
    return read.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


class Audit:
    """The audit log of the frontend under test."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.log = AuditLog("frontend", self.stream)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def denials(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["decision"] == "deny"]


@pytest.fixture
def orders() -> ScriptedOrders:
    return ScriptedOrders()


@pytest.fixture
def audit() -> Audit:
    return Audit()


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings that a test may change before it asks for a `browser`."""
    return {
        "spiffe_endpoint_socket": "unix:/nowhere",
        "spiffe_id": PREFIX + "frontend",
        "port": 8080,
        "probe_port": 9080,
        "mode": "local",
        "orders_url": "https://orders.zt.example:8443",
        "orders_spiffe_id": PREFIX + "orders",
    }


@pytest.fixture
async def browser(orders: ScriptedOrders, audit: Audit, settings: dict[str, Any]) -> AsyncIterator[Browser]:
    made = Settings(**settings)
    async with httpx.AsyncClient(transport=httpx.MockTransport(orders), base_url=made.orders_url) as client:
        app = create_app(
            made,
            orders=Orders(client, seen_by_frontend),
            identity=lambda: identity("frontend"),
            audit=audit.log,
            streams=Streams(audit.log),
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        base_url = "https://shop.example" if made.https else "http://localhost:8080"
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as http:
            yield Browser(http)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"k" * 32)
    return path
