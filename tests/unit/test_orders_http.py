"""The HTTP side of orders, without a database: who gets in, and what is refused before it is written."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from orders.app import Parts, create_app, router
from orders.checkout import Checkout, Placed
from orders.models import Order, OrderItem
from orders.payments import Payments, Refused
from orders.schemas import Link
from orders.settings import PACKAGED_POLICY
from orders.store import Orders
from ztmtls.authz import load_policy
from ztmtls.ids import SpiffeId
from ztmtls.reasons import Reason
from ztmtls.testing import calling_as

POLICY = load_policy(PACKAGED_POLICY)
NAMESPACE = "spiffe://zt.example/ns/zt-demo/sa"
FRONTEND = f"{NAMESPACE}/frontend"
BODY = {"items": [{"sku": "mug-stoneware", "quantity": 2}]}


class FakeCheckout:
    """Answers with `placed`, and writes down who asked for what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.placed = Placed(_order(), new=True)

    async def place(self, caller: str, key: str, request: Any, arrival: Link) -> Placed:
        self.calls.append((caller, key, request))
        self.placed.order.links = [arrival.as_dict()]
        return self.placed


def _order(status: str = "paid", reason: str | None = None) -> Order:
    order = Order(
        id=uuid4(),
        status=status,
        reason=reason,
        payment_id=uuid4() if status == "paid" else None,
        total=3600,
        currency="EUR",
        links=[],
        databases=[{"service": "orders"}],
        created_at=datetime.now(UTC),
    )
    order.items = [
        OrderItem(position=1, sku="mug-stoneware", name="Stoneware mug", quantity=2, unit_price=1800)
    ]
    return order


@pytest.fixture
def checkout() -> FakeCheckout:
    return FakeCheckout()


@pytest.fixture
def app(checkout: FakeCheckout) -> FastAPI:
    async def status_report() -> dict[str, Any]:
        return {
            "identity": {"state": "serving"},
            "credentials": {"version": "v1"},
            "database": None,
            "decisions": {},
        }

    async def payments_status() -> tuple[dict[str, Any], Link]:
        link = Link(source="orders", target="payments", method="GET", path="/status")
        return {"service": "payments", "downstream": []}, link

    payments = cast(Payments, SimpleNamespace(status=payments_status))
    return create_app(
        Parts(cast(Orders, SimpleNamespace()), cast(Checkout, checkout), payments, status_report)
    )


@pytest.fixture
async def frontend(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with calling_as(app, FRONTEND, POLICY) as client:
        yield client


async def _place(client: httpx.AsyncClient, body: Any = BODY, **headers: str) -> httpx.Response:
    return await client.post("/orders", json=body, headers={"Idempotency-Key": "k-1", **headers})


async def test_frontend_places_an_order(frontend: httpx.AsyncClient, checkout: FakeCheckout) -> None:
    answer = await _place(frontend)

    assert answer.status_code == 201
    order = answer.json()["order"]
    assert (order["status"], order["total"], order["currency"], order["reason"]) == (
        "paid",
        3600,
        "EUR",
        None,
    )
    assert order["items"] == [
        {"sku": "mug-stoneware", "name": "Stoneware mug", "quantity": 2, "unit_price": 1800}
    ]
    assert order["created_at"].endswith("Z")
    (link,) = answer.json()["links"]
    assert (link["from"], link["to"], link["seen_by_caller"], link["duration_ms"]) == (
        "frontend",
        "orders",
        None,
        None,
    )
    assert link["seen_by_callee"]["rule"] == "frontend-places-orders"
    assert [(caller, key) for caller, key, _ in checkout.calls] == [(FRONTEND, "k-1")]


@pytest.mark.parametrize(
    ("status", "new", "code"),
    [
        ("paid", True, 201),
        ("declined", True, 201),
        ("pending", True, 202),
        ("paid", False, 200),
        ("declined", False, 200),
        ("pending", False, 202),
    ],
)
async def test_the_status_code_says_what_happened(
    frontend: httpx.AsyncClient, checkout: FakeCheckout, status: str, new: bool, code: int
) -> None:
    checkout.placed = Placed(_order(status, None if status == "paid" else "payment_declined"), new=new)

    answer = await _place(frontend)

    assert answer.status_code == code
    assert answer.headers.get("Idempotency-Replayed") == (None if new else "true")


@pytest.mark.parametrize(
    ("reason", "downstream_status", "code"),
    [
        (Reason.WRONG_SERVER_IDENTITY, None, 502),
        (Reason.REFUSED_BY_SERVER, None, 502),
        (Reason.CALLER_NOT_ALLOWED, 403, 502),
        (Reason.NO_IDENTITY, None, 503),
    ],
)
async def test_a_refusal_by_payments_is_told_with_its_reason(
    frontend: httpx.AsyncClient,
    checkout: FakeCheckout,
    reason: Reason,
    downstream_status: int | None,
    code: int,
) -> None:
    link = Link(source="orders", target="payments", method="POST", path="/payments")
    refused = Refused(reason, "for a good reason", downstream_status, link)
    checkout.placed = Placed(_order("declined", str(reason)), new=True, refused=refused)

    answer = await _place(frontend)

    problem = answer.json()
    assert answer.status_code == code
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["reason"] == reason
    assert problem["downstream"] == {
        "service": "payments",
        "status": downstream_status,
        "reason": reason,
        "detail": "for a good reason",
    }
    assert "Nothing was charged" in problem["detail"]
    assert problem["order"]["status"] == "declined"


@pytest.mark.parametrize("caller", [f"{NAMESPACE}/payments", f"{NAMESPACE}/orders", f"{FRONTEND}/x"])
async def test_nobody_else_does(
    app: FastAPI, checkout: FakeCheckout, frontend: httpx.AsyncClient, caller: str
) -> None:
    assert (await _place(frontend)).status_code == 201
    async with calling_as(app, caller, POLICY) as stranger:
        answer = await _place(
            stranger, **{"X-Spiffe-Id": FRONTEND, "X-Forwarded-Client-Cert": f"URI={FRONTEND}"}
        )

    assert (answer.status_code, answer.json()["reason"]) == (403, "caller_not_allowed")
    assert len(checkout.calls) == 1


async def test_without_a_verified_peer_nothing_is_served(app: FastAPI, checkout: FakeCheckout) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://orders") as plain:
        answer = await _place(plain, **{"X-Spiffe-Id": FRONTEND})

    assert (answer.status_code, answer.json()["reason"]) == (403, "no_peer")
    assert checkout.calls == []


@pytest.mark.parametrize(
    ("headers", "reason"),
    [({}, "idempotency_key_missing"), ({"Idempotency-Key": "two words"}, "idempotency_key_invalid")],
)
async def test_a_key_is_there_and_well_formed(
    frontend: httpx.AsyncClient, checkout: FakeCheckout, headers: dict[str, str], reason: str
) -> None:
    assert (await _place(frontend)).status_code == 201

    answer = await frontend.post("/orders", json=BODY, headers=headers)

    assert (answer.status_code, answer.json()["reason"]) == (400, reason)
    assert len(checkout.calls) == 1


ITEM = BODY["items"][0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "items"),
        ({"items": []}, "items"),
        ({"items": [{"sku": f"mug-{n}", "quantity": 1} for n in range(21)]}, "items"),
        ({"items": [ITEM, ITEM]}, "items"),
        ({"items": [ITEM | {"quantity": 0}]}, "items[0].quantity"),
        ({"items": [ITEM | {"quantity": 100}]}, "items[0].quantity"),
        ({"items": [ITEM | {"quantity": "2"}]}, "items[0].quantity"),
        ({"items": [ITEM | {"sku": "Mug'; --"}]}, "items[0].sku"),
        ({"items": [ITEM | {"price": 1}]}, "items[0].price"),
        (BODY | {"total": 1}, "total"),
    ],
)
async def test_a_wrong_body_is_named_by_field(
    frontend: httpx.AsyncClient, checkout: FakeCheckout, body: dict[str, Any], field: str
) -> None:
    answer = await _place(frontend, body)

    assert (answer.status_code, answer.json()["reason"]) == (422, "invalid_request")
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert checkout.calls == []


async def test_status_goes_down_the_chain(frontend: httpx.AsyncClient) -> None:
    answer = (await frontend.get("/status")).json()

    assert answer["service"] == "orders"
    assert answer["downstream"] == [{"service": "payments", "downstream": []}]
    assert [(link["from"], link["to"]) for link in answer["links"]] == [("orders", "payments")]
    assert answer["seen_by_callee"]["peer"]["id"] == FRONTEND


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/redoc", "/", "/orders/", "/metrics"])
async def test_there_is_nothing_beside_the_routes(frontend: httpx.AsyncClient, path: str) -> None:
    assert (await frontend.get(path)).json()["reason"] == "route_not_allowed"
    assert path not in {route.path for route in _routes()}


def _routes() -> list[APIRoute]:
    return [route for route in router.routes if isinstance(route, APIRoute)]


def test_the_policy_names_every_route_and_nothing_more() -> None:
    rules = POLICY.rules
    served = {(method, _shape(route.path)) for route in _routes() for method in route.methods or ()}
    named = {(method, _shape(path)) for rule in rules for method in rule.methods for path in rule.paths}

    assert served == named
    assert {caller for rule in rules for caller in rule.callers} == {SpiffeId.parse(FRONTEND)}


def _shape(path: str) -> str:
    return re.sub(r"\{\w+\}", "{}", path)
