"""What goes over the wire. Prices come from the catalogue, never from a client; money is minor units."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Currency = Literal["EUR"]
OrderStatus = Literal["pending", "paid", "declined"]
UtcTime = Annotated[datetime, AfterValidator(lambda time: time.astimezone(UTC))]
HopDict = dict[str, Any]
"""A `ztmtls.hop.HopView` as JSON."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WantedItem(_Request):
    """So many of one product."""

    sku: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    quantity: Annotated[int, Field(strict=True, ge=1, le=99)]


def _each_once(items: list[WantedItem]) -> list[WantedItem]:
    if len({item.sku for item in items}) < len(items):
        raise ValueError("a product may stand in one line only")
    return items


class OrderRequest(_Request):
    """Body of ``POST /orders``."""

    items: Annotated[list[WantedItem], Field(min_length=1, max_length=20), AfterValidator(_each_once)]


class Product(BaseModel):
    """A product of the catalogue."""

    model_config = ConfigDict(from_attributes=True)

    sku: str
    name: str
    description: str
    price: int
    currency: Currency


class OrderItem(BaseModel):
    """A line of an order, at the price of the moment it was placed."""

    model_config = ConfigDict(from_attributes=True)

    sku: str
    name: str
    quantity: int
    unit_price: int


class Order(BaseModel):
    """An order. `reason` says why it is not paid: a stable code, or null."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    items: list[OrderItem]
    total: int
    currency: Currency
    status: OrderStatus
    reason: str | None
    payment_id: UUID | None
    created_at: UtcTime


class Link(BaseModel):
    """One hop of the chain behind an order, as both of its ends verified it."""

    source: str = Field(serialization_alias="from")
    target: str = Field(serialization_alias="to")
    method: str
    path: str
    seen_by_caller: HopDict | None = None
    seen_by_callee: HopDict | None = None
    duration_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON-able mapping."""
        return self.model_dump(mode="json", by_alias=True)


class OrderAnswer(BaseModel):
    """An order with the stored evidence of its placing."""

    order: Order
    links: list[dict[str, Any]]
    databases: list[dict[str, Any]]


class OrderView(OrderAnswer):
    """The same, read later: `this_request` is the hop that read it."""

    this_request: HopDict


class OrdersAnswer(BaseModel):
    """Orders of this caller, newest first."""

    orders: list[Order]
    seen_by_callee: HopDict


class ProductsAnswer(BaseModel):
    """The catalogue."""

    products: list[Product]
    seen_by_callee: HopDict


class StatusAnswer(BaseModel):
    """How this service and those behind it stand. `links` are the hops this answer took."""

    service: str
    identity: dict[str, Any]
    credentials: dict[str, Any]
    database: dict[str, Any] | None
    decisions: dict[str, Any]
    seen_by_callee: HopDict
    downstream: list[dict[str, Any]]
    links: list[dict[str, Any]]
