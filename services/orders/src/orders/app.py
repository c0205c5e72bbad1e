"""The HTTP side of orders: what a verified caller may ask, and the evidence it gets back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response

from ztmtls.fastapi import Hop, IdempotencyKey, Peer, Problem, install
from ztmtls.reasons import Reason

from . import models
from .checkout import Checkout
from .payments import SERVICE as PAYMENTS
from .payments import Payments, Refused
from .schemas import (
    HopDict,
    Link,
    Order,
    OrderAnswer,
    OrderRequest,
    OrdersAnswer,
    OrderView,
    Product,
    ProductsAnswer,
    StatusAnswer,
)
from .store import Orders

StatusReport = Callable[[], Awaitable[dict[str, Any]]]
"""Tells identity, credentials and database of this process, as in `StatusAnswer`."""

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes work with."""

    orders: Orders
    checkout: Checkout
    payments: Payments
    status_report: StatusReport


def create_app(parts: Parts) -> FastAPI:
    """Build the application. It expects `ztmtls.server` in front: without a verified peer it answers 403."""
    app = FastAPI(title="orders", openapi_url=None, redirect_slashes=False)
    install(app)
    app.state.parts = parts
    app.include_router(router)
    return app


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsOfApp = Annotated[Parts, Depends(_parts)]


@router.get("/products")
async def products(hop: Hop, parts: PartsOfApp) -> ProductsAnswer:
    """The catalogue with its prices."""
    found = await parts.orders.products()
    return ProductsAnswer(
        products=[Product.model_validate(product) for product in found], seen_by_callee=hop.as_dict()
    )


@router.post("/orders", status_code=201)
async def place(
    peer: Peer, hop: Hop, key: IdempotencyKey, body: OrderRequest, parts: PartsOfApp, response: Response
) -> OrderAnswer:
    """Place an order once per key: 201 when it is new, 200 when repeated, 202 while payment is open."""
    arrival = Link(
        source=peer.id.path.rpartition("/")[2],
        target="orders",
        method="POST",
        path="/orders",
        seen_by_callee=hop.as_dict(),
    )
    placed = await parts.checkout.place(str(peer.id), key, body, arrival)
    if placed.refused is not None:
        raise _refused_by_payments(placed.refused, placed.order)
    if not placed.new:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    if placed.order.status == "pending":
        response.status_code = 202
    return OrderAnswer(**_answer(placed.order))


@router.get("/orders")
async def newest(
    peer: Peer, hop: Hop, parts: PartsOfApp, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> OrdersAnswer:
    """This caller's orders, newest first."""
    found = await parts.orders.newest(str(peer.id), limit)
    return OrdersAnswer(orders=[Order.model_validate(order) for order in found], seen_by_callee=hop.as_dict())


@router.get("/orders/{order_id}")
async def show(order_id: UUID, peer: Peer, hop: Hop, parts: PartsOfApp) -> OrderView:
    """One order of this caller, with the evidence stored when it was placed."""
    order = await parts.orders.find(str(peer.id), order_id)
    return OrderView(**_answer(order), this_request=hop.as_dict())


@router.get("/status")
async def status(hop: Hop, parts: PartsOfApp) -> StatusAnswer:
    """Where this service and the one behind it stand."""
    downstream, link = await parts.payments.status()
    return StatusAnswer(
        service="orders",
        seen_by_callee=hop.as_dict(),
        downstream=[downstream],
        links=[link.as_dict()],
        **await parts.status_report(),
    )


def _answer(order: models.Order) -> dict[str, Any]:
    return {"order": Order.model_validate(order), "links": order.links, "databases": order.databases}


def _refused_by_payments(refused: Refused, order: models.Order) -> Problem:
    evidence: dict[str, HopDict | Any] = OrderAnswer(**_answer(order)).model_dump(mode="json")
    closed = order.status == "declined"
    return Problem(
        503 if refused.reason is Reason.NO_IDENTITY else 502,
        refused.reason,
        "The call to payments was refused",
        f"{refused.detail}. "
        + ("Nothing was charged, and the order is closed." if closed else f"The order is {order.status}."),
        downstream={
            "service": PAYMENTS,
            "status": refused.status,
            "reason": str(refused.reason),
            "detail": refused.detail,
        },
        **evidence,
    )
