"""The HTTP side of payments, without a database: who gets in, and what never gets to the ledger."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from payments.app import create_app, router
from payments.ledger import Ledger, Receipt
from payments.models import Charge
from payments.settings import PACKAGED_POLICY
from ztmtls.authz import load_policy
from ztmtls.idempotency import fingerprint
from ztmtls.ids import SpiffeId
from ztmtls.testing import calling_as

POLICY = load_policy(PACKAGED_POLICY)
NAMESPACE = "spiffe://zt.example/ns/zt-demo/sa"
ORDERS = f"{NAMESPACE}/orders"
BODY = {"order_id": str(uuid4()), "amount": 2190, "currency": "EUR"}


class FakeLedger:
    """Charges whatever it is asked, and writes down who asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []

    async def charge(self, caller: str, key: str, request: Any) -> Receipt:
        self.calls.append((caller, key, request))
        charge = Charge(id=uuid4(), created_at=datetime.now(UTC), refunded=0, **request.model_dump())
        return Receipt(charge, refunded=0, replayed=False, database={"service": "payments"})


@pytest.fixture
def ledger() -> FakeLedger:
    return FakeLedger()


@pytest.fixture
def app(ledger: FakeLedger) -> FastAPI:
    async def status_report() -> dict[str, Any]:
        return {
            "identity": {"state": "serving"},
            "credentials": {"version": "v1"},
            "database": None,
            "decisions": {},
        }

    return create_app(cast(Ledger, ledger), status_report)


@pytest.fixture
async def orders(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with calling_as(app, ORDERS, POLICY) as client:
        yield client


async def _charge(client: httpx.AsyncClient, body: Any = BODY, **headers: str) -> httpx.Response:
    return await client.post("/payments", json=body, headers={"Idempotency-Key": "k-1", **headers})


async def test_orders_charges(orders: httpx.AsyncClient, ledger: FakeLedger) -> None:
    answer = await _charge(orders)

    assert answer.status_code == 201
    assert answer.json()["seen_by_callee"]["rule"] == "orders-charges"
    assert [(caller, key) for caller, key, _ in ledger.calls] == [(ORDERS, "k-1")]


@pytest.mark.parametrize("caller", [f"{NAMESPACE}/frontend", f"{NAMESPACE}/payments", f"{ORDERS}/x"])
async def test_nobody_else_does(
    app: FastAPI, ledger: FakeLedger, orders: httpx.AsyncClient, caller: str
) -> None:
    assert (await _charge(orders)).status_code == 201
    async with calling_as(app, caller, POLICY) as stranger:
        answer = await _charge(
            stranger, **{"X-Forwarded-Client-Cert": f"URI={ORDERS}", "X-Spiffe-Id": ORDERS, "From": ORDERS}
        )

    assert (answer.status_code, answer.json()["reason"]) == (403, "caller_not_allowed")
    assert len(ledger.calls) == 1


async def test_headers_never_name_the_caller(orders: httpx.AsyncClient, ledger: FakeLedger) -> None:
    answer = await _charge(
        orders, **{"X-Forwarded-Client-Cert": "URI=spiffe://zt.example/admin", "X-Client-Verify": "SUCCESS"}
    )

    assert answer.status_code == 201
    assert ledger.calls[0][0] == ORDERS


async def test_without_a_verified_peer_nothing_is_served(app: FastAPI, ledger: FakeLedger) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://payments") as plain:
        answer = await _charge(plain, **{"X-Spiffe-Id": ORDERS})

    assert (answer.status_code, answer.json()["reason"]) == (403, "no_peer")
    assert ledger.calls == []


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "idempotency_key_missing"),
        ([("Idempotency-Key", "")], "idempotency_key_missing"),
        ([("Idempotency-Key", "k" * 129)], "idempotency_key_invalid"),
        ([("Idempotency-Key", "k" * 10_000)], "idempotency_key_invalid"),
        ([("Idempotency-Key", "two words")], "idempotency_key_invalid"),
        ([("Idempotency-Key", "a/b")], "idempotency_key_invalid"),
        ([("Idempotency-Key", "nul\x00")], "idempotency_key_invalid"),
        ([("Idempotency-Key", b"\xf0\x9f\x94\x91")], "idempotency_key_invalid"),
        ([("Idempotency-Key", "line\n")], "idempotency_key_invalid"),
        ([("Idempotency-Key", "one"), ("Idempotency-Key", "two")], "idempotency_key_invalid"),
    ],
)
async def test_a_key_is_there_and_well_formed(
    orders: httpx.AsyncClient, ledger: FakeLedger, headers: Any, reason: str
) -> None:
    good = await orders.post("/payments", json=BODY, headers={"Idempotency-Key": "k" * 128})
    assert good.status_code == 201

    answer = await orders.post("/payments", content=b"not even JSON", headers=headers)

    assert (answer.status_code, answer.json()["reason"]) == (400, reason)
    assert len(ledger.calls) == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"amount": 0}, "amount"),
        ({"amount": -1}, "amount"),
        ({"amount": 1.5}, "amount"),
        ({"amount": "100"}, "amount"),
        ({"amount": True}, "amount"),
        ({"amount": 2**63}, "amount"),
        ({"currency": "USD"}, "currency"),
        ({"currency": "eur"}, "currency"),
        ({"order_id": "17"}, "order_id"),
        ({"caller": "me"}, "caller"),
    ],
)
async def test_a_wrong_body_is_named_by_field(
    orders: httpx.AsyncClient, ledger: FakeLedger, change: dict[str, Any], field: str
) -> None:
    answer = await _charge(orders, BODY | change)

    assert (answer.status_code, answer.json()["reason"]) == (422, "invalid_request")
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert ledger.calls == []


async def test_status_ends_the_chain(orders: httpx.AsyncClient) -> None:
    answer = (await orders.get("/status")).json()

    assert (answer["service"], answer["downstream"]) == ("payments", [])
    assert answer["seen_by_callee"]["peer"]["id"] == ORDERS
    assert answer["identity"] == {"state": "serving"}


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/redoc", "/", "/payments/", "/metrics"])
async def test_there_is_nothing_beside_the_routes(orders: httpx.AsyncClient, path: str) -> None:
    assert (await orders.get(path)).json()["reason"] == "route_not_allowed"
    assert path not in {route.path for route in _routes()}


def _routes() -> list[APIRoute]:
    return [route for route in router.routes if isinstance(route, APIRoute)]


def test_the_policy_names_every_route_and_nothing_more() -> None:
    served = {(method, _shape(route.path)) for route in _routes() for method in route.methods or ()}
    named = {
        (method, _shape(path)) for rule in POLICY.rules for method in rule.methods for path in rule.paths
    }

    assert served == named
    assert {caller for rule in POLICY.rules for caller in rule.callers} == {SpiffeId.parse(ORDERS)}


def _shape(path: str) -> str:
    return re.sub(r"\{\w+\}", "{}", path)


def test_a_fingerprint_is_of_what_was_meant() -> None:
    one = fingerprint("charge", {"amount": 1, "currency": "EUR"})

    assert one == fingerprint("charge", {"currency": "EUR", "amount": 1})
    assert one != fingerprint("charge", {"currency": "EUR", "amount": 2})
    assert one != fingerprint("refund", {"currency": "EUR", "amount": 1})
