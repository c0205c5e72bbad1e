"""What goes over the wire. Money is an integer number of minor units (cents)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_AMOUNT = 100_000_000

Amount = Annotated[int, Field(strict=True, gt=0, le=MAX_AMOUNT)]
Currency = Literal["EUR"]
PaymentStatus = Literal["charged", "partly_refunded", "refunded"]
UtcTime = Annotated[datetime, AfterValidator(lambda time: time.astimezone(UTC))]
HopDict = dict[str, Any]
"""A `ztmtls.hop.HopView` as JSON."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChargeRequest(_Request):
    """Body of ``POST /payments``."""

    order_id: UUID
    amount: Amount
    currency: Currency


class RefundRequest(_Request):
    """Body of ``POST /payments/{payment_id}/refunds``."""

    amount: Amount


class Payment(BaseModel):
    """A charge and what has been given back of it."""

    id: UUID
    order_id: UUID
    amount: int
    currency: Currency
    status: PaymentStatus
    refunded: int
    created_at: UtcTime


class Refund(BaseModel):
    """One refund of a payment."""

    id: UUID
    payment_id: UUID
    amount: int
    created_at: UtcTime


class PaymentAnswer(BaseModel):
    """A payment with the evidence of the request that asked for it."""

    payment: Payment
    seen_by_callee: HopDict
    database: dict[str, Any]


class RefundAnswer(PaymentAnswer):
    """A refund and the payment as it stood right after it."""

    refund: Refund


class StatusAnswer(BaseModel):
    """How this service stands: identity, credentials, database, and the hop that asked."""

    service: str
    identity: dict[str, Any]
    credentials: dict[str, Any]
    database: dict[str, Any] | None
    decisions: dict[str, Any]
    seen_by_callee: HopDict
    downstream: list[dict[str, Any]]
