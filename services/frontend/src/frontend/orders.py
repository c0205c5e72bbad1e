"""The client of the orders service: typed answers, and failures that say where and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import httpx
from pydantic import TypeAdapter, ValidationError

from ztmtls.client import NoIdentityError, RefusedByServer, ServerRefused
from ztmtls.hop import HopView
from ztmtls.reasons import Reason

from .models import FieldError, Link, Model, Order, PlacedOrder, Product, View
from .status import ServiceReport

M = TypeVar("M", bound=Model)

SERVICE = "frontend"
PEER = "orders"
RECENT_SECONDS = 15.0
PROBE_TIMEOUT = 1.5  # a readiness check has two seconds


class _Products(Model):
    products: tuple[Product, ...]


class _Orders(Model):
    orders: tuple[Order, ...]


#: Refusals that are answers: what was asked for does not exist or can't be.
_ANSWERS = (404, 409, 422)

_FIELD_ERRORS = TypeAdapter(tuple[FieldError, ...])


@dataclass(eq=False)
class OrdersFailure(Exception):
    """orders gave no usable answer.

    `status` is what we answer to the browser. `caller` and `callee` name the hop that failed. `unknown`
    is True when the request may have been carried out although no answer came; `order_id` is set when
    orders took the order but could not go on with it.
    """

    status: int
    reason: str
    title: str
    detail: str
    caller: str = SERVICE
    callee: str = PEER
    unknown: bool = False
    order_id: UUID | None = None
    errors: Sequence[FieldError] = field(default=())

    def __str__(self) -> str:
        return f"{self.reason} on {self.caller} -> {self.callee}: {self.detail or self.title}"


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls to orders since the process was started, but for those that ask for its status.

    `failed` ones got no usable answer; that there is no such thing, or can't be (404, 409, 422), is one.
    """

    answered: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """An order as orders answered it, and our own view of that very call."""

    placed: PlacedOrder
    link: Link
    replayed: bool


class Orders:
    """Speaks to orders over mutual TLS.

    `client` is a `ztmtls.client.AsyncClient` bound to the identity of orders; `hop` reads from a response
    what we verified about the connection it came on (`ztmtls.client.hop`).
    """

    def __init__(self, client: httpx.AsyncClient, hop: Callable[[httpx.Response], HopView]) -> None:
        self._client = client
        self._hop = hop
        self._answered_at = float("-inf")
        self.calls = Calls()

    async def products(self) -> tuple[Product, ...]:
        """What can be ordered."""
        response, _ = await self._ask("GET", "/products")
        return _parse(_Products, response).products

    async def recent(self, limit: int = 8) -> tuple[Order, ...]:
        """The newest orders, newest first."""
        response, _ = await self._ask("GET", "/orders", params={"limit": limit})
        return _parse(_Orders, response).orders

    async def place(self, items: Mapping[str, int], key: str) -> Placed:
        """Order `items` (quantity by SKU). With the same `key` the same order is placed at most once."""
        body = {"items": [{"sku": sku, "quantity": quantity} for sku, quantity in items.items()]}
        return await self._placed("POST", "/orders", json=body, headers={"Idempotency-Key": key})

    async def read(self, order_id: UUID) -> Placed:
        """An order with its stored evidence, and the link of this very request."""
        return await self._placed("GET", f"/orders/{order_id}")

    async def status(self) -> tuple[ServiceReport, Link]:
        """How orders and what lies behind it are, and the link of this very request."""
        response, took = await self._ask("GET", "/status")
        report = _parse(ServiceReport, response)
        return report, self._link(response, took, report.seen_by_callee)

    async def answered_recently(self) -> str | None:
        """Readiness: None when orders answered within the last seconds or does so now, else the reason."""
        if time.monotonic() - self._answered_at < RECENT_SECONDS:
            return None
        try:
            await self._ask("GET", "/products", timeout=PROBE_TIMEOUT)
        except OrdersFailure as failure:
            return failure.reason
        return None

    async def _placed(self, method: str, path: str, **request: Any) -> Placed:
        response, took = await self._ask(method, path, **request)
        placed = _parse(PlacedOrder, response)
        replayed = response.headers.get("Idempotency-Replayed") == "true"
        return Placed(placed, self._link(response, took, placed.this_request), replayed)

    def _link(self, response: httpx.Response, took: float, seen_by_callee: View | None) -> Link:
        return Link(
            caller=SERVICE,
            callee=PEER,
            method=response.request.method,
            path=response.request.url.path,
            seen_by_caller=View.model_validate(self._hop(response).as_dict()),
            seen_by_callee=seen_by_callee,
            duration_ms=took,
        )

    async def _ask(self, method: str, path: str, **request: Any) -> tuple[httpx.Response, float]:
        """The answer, and how many milliseconds it took."""
        started = time.monotonic()
        try:
            response = await self._send(method, path, **request)
        except httpx.HTTPError as error:
            self._count(path, failed=True)
            raise _unanswered(error) from error
        failed = response.status_code not in _ANSWERS and not response.is_success
        self._count(path, failed=failed)
        if response.status_code < 500:
            self._answered_at = time.monotonic()
        if response.is_success:
            return response, (self._answered_at - started) * 1000
        raise _refused(response)

    def _count(self, path: str, *, failed: bool) -> None:
        if path != "/status":
            self.calls = Calls(self.calls.answered + (not failed), self.calls.failed + failed)

    async def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send it, and once more on a fresh connection when the one we kept had come to its end.

        That happens as certificates rotate: the connection is closed as we use it, or answers 401.
        Reads are safe to repeat, and so is placing an order, by its key.
        """
        try:
            response = await self._client.request(method, path, **request)
        except (ServerRefused, RefusedByServer, NoIdentityError):
            raise  # nothing that a second connection would change
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            return await self._client.request(method, path, **request)
        if response.status_code == 401:
            return await self._client.request(method, path, **request)
        return response


def _parse(model: type[M], response: httpx.Response) -> M:
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise OrdersFailure(
            502,
            Reason.DEPENDENCY_UNAVAILABLE,
            "orders gave an answer we can't read",
            f"{error.error_count()} faults in the answer to {response.request.url.path}.",
            unknown=response.request.method == "POST",
        ) from error


def _unanswered(error: httpx.HTTPError) -> OrdersFailure:
    match error:
        case ServerRefused():
            return OrdersFailure(
                502, error.reason, "The frontend refused the server that answered as orders", error.detail
            )
        case RefusedByServer():
            return OrdersFailure(502, error.reason, "orders refused the frontend's certificate", error.detail)
        case NoIdentityError():
            return OrdersFailure(503, error.reason, "The frontend has no identity now", error.detail)
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
            return OrdersFailure(
                503, Reason.DEPENDENCY_UNAVAILABLE, "orders can't be reached", "No connection was made."
            )
        case httpx.ReadTimeout():
            return OrdersFailure(
                503,
                Reason.DEPENDENCY_UNAVAILABLE,
                "orders did not answer in time",
                "The request was sent, no answer came.",
                unknown=True,
            )
        case _:
            return OrdersFailure(
                503,
                Reason.DEPENDENCY_UNAVAILABLE,
                "The connection to orders broke",
                "The request was sent, no answer came.",
                unknown=True,
            )


def _refused(response: httpx.Response) -> OrdersFailure:
    """Read a problem document (RFC 9457) of orders; anything else gets a plain description."""
    status = response.status_code
    try:
        document = response.json()
    except ValueError:
        document = {}
    if not isinstance(document, dict):
        document = {}
    behind, order = document.get("downstream"), document.get("order")
    try:
        order_id = UUID(_text(order, "id")) if isinstance(order, dict) else None
    except ValueError:
        order_id = None
    callee = _text(behind, "service") if isinstance(behind, dict) else ""
    try:
        errors = _FIELD_ERRORS.validate_python(document.get("errors", ()))
    except ValidationError:
        errors = ()
    return OrdersFailure(
        _our_status(status),
        _text(document, "reason") or Reason.HTTP_ERROR,
        _text(document, "title") or f"orders answered {status}",
        _text(document, "detail"),
        caller=PEER if callee else SERVICE,  # what orders could not do may be a hop further
        callee=callee or PEER,
        unknown=status >= 500 and order_id is None,
        order_id=order_id,
        errors=errors,
    )


def _text(document: Mapping[str, object], member: str) -> str:
    value = document.get(member)
    return value if isinstance(value, str) else ""


def _our_status(status: int) -> int:
    """What a browser gets when orders answered `status`: its own faults as they are, ours as 502 or 503."""
    if status in _ANSWERS:
        return status
    return 503 if status in (429, 503, 504) else 502
