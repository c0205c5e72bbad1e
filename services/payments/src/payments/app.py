"""The HTTP side of payments: what a verified caller may ask, and the evidence it gets back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Request, Response

from ztmtls.fastapi import Hop, IdempotencyKey, IdempotencyKeyInPath, Peer, install

from .ledger import Ledger, Receipt
from .schemas import (
    ChargeRequest,
    Payment,
    PaymentAnswer,
    PaymentStatus,
    Refund,
    RefundAnswer,
    RefundRequest,
    StatusAnswer,
)

router = APIRouter()

StatusReport = Callable[[], Awaitable[dict[str, Any]]]
"""Tells identity, credentials and database of this process, as in `StatusAnswer`."""


def create_app(ledger: Ledger, status_report: StatusReport) -> FastAPI:
    """Build the application. It expects `ztmtls.server` in front: without a verified peer it answers 403."""
    app = FastAPI(title="payments", openapi_url=None, redirect_slashes=False)
    install(app)
    app.state.ledger = ledger
    app.state.status_report = status_report
    app.include_router(router)
    return app


def _ledger(request: Request) -> Ledger:
    ledger: Ledger = request.app.state.ledger
    return ledger


LedgerOfApp = Annotated[Ledger, Depends(_ledger)]


@router.post("/payments", status_code=201)
async def charge(
    peer: Peer, hop: Hop, key: IdempotencyKey, body: ChargeRequest, ledger: LedgerOfApp, response: Response
) -> PaymentAnswer:
    """Charge an order once per key: 201 the first time, 200 with the same payment ever after."""
    receipt = await ledger.charge(str(peer.id), key, body)
    _mark_replay(response, receipt)
    return PaymentAnswer(payment=_payment(receipt), seen_by_callee=hop.as_dict(), database=receipt.database)


@router.post("/payments/{payment_id}/refunds", status_code=201)
async def refund(
    payment_id: UUID,
    peer: Peer,
    hop: Hop,
    key: IdempotencyKey,
    body: RefundRequest,
    ledger: LedgerOfApp,
    response: Response,
) -> RefundAnswer:
    """Give back part or all of a payment, once per key."""
    receipt = await ledger.refund(str(peer.id), key, payment_id, body)
    _mark_replay(response, receipt)
    assert receipt.refund is not None
    return RefundAnswer(
        refund=Refund(
            id=receipt.refund.id,
            payment_id=receipt.refund.charge_id,
            amount=receipt.refund.amount,
            created_at=receipt.refund.created_at,
        ),
        payment=_payment(receipt),
        seen_by_callee=hop.as_dict(),
        database=receipt.database,
    )


@router.get("/payments/{payment_id}")
async def show(payment_id: UUID, peer: Peer, hop: Hop, ledger: LedgerOfApp) -> PaymentAnswer:
    """One payment of this caller, as it is now."""
    receipt = await ledger.find(str(peer.id), payment_id)
    return PaymentAnswer(payment=_payment(receipt), seen_by_callee=hop.as_dict(), database=receipt.database)


@router.get("/payments/by-key/{key}")
async def show_by_key(key: IdempotencyKeyInPath, peer: Peer, hop: Hop, ledger: LedgerOfApp) -> PaymentAnswer:
    """The payment behind a key of this caller: how to learn the outcome of an unanswered charge."""
    receipt = await ledger.find_by_key(str(peer.id), key)
    return PaymentAnswer(payment=_payment(receipt), seen_by_callee=hop.as_dict(), database=receipt.database)


@router.get("/status")
async def status(request: Request, hop: Hop) -> StatusAnswer:
    """Where this service stands; the end of the chain, so nothing downstream."""
    report: StatusReport = request.app.state.status_report
    return StatusAnswer(service="payments", seen_by_callee=hop.as_dict(), downstream=[], **await report())


def _mark_replay(response: Response, receipt: Receipt) -> None:
    if receipt.replayed:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"


def _payment(receipt: Receipt) -> Payment:
    charge = receipt.charge
    return Payment(
        id=charge.id,
        order_id=charge.order_id,
        amount=charge.amount,
        currency="EUR",
        status=_status(charge.amount, receipt.refunded),
        refunded=receipt.refunded,
        created_at=charge.created_at,
    )


def _status(amount: int, refunded: int) -> PaymentStatus:
    if refunded == 0:
        return "charged"
    return "refunded" if refunded == amount else "partly_refunded"
