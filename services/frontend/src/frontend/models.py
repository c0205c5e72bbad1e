"""What orders tells the frontend, checked at the edge: a malformed answer is refused, not half shown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field


class Model(BaseModel):
    """Frozen; members a newer orders may add are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Product(Model):
    """Something one can order. `price` is in minor units."""

    sku: str
    name: str
    description: str = ""
    price: int
    currency: str


class OrderItem(Model):
    """One line of an order. `unit_price` is in minor units."""

    sku: str
    name: str
    quantity: int
    unit_price: int


class Order(Model):
    """An order as orders has stored it. `total` is in minor units."""

    id: UUID
    items: tuple[OrderItem, ...]
    total: int
    currency: str
    status: Literal["paid", "pending", "declined"]
    reason: str | None = None
    payment_id: UUID | None = None
    created_at: AwareDatetime


class Certificate(Model):
    """What identifies one certificate: the SPIFFE ID in it, its serial number (hex), when it ends."""

    id: str
    serial: str
    not_after: AwareDatetime


class Verified(Certificate):
    """A certificate that the other side checked, and the serial number of the authority it relied on."""

    authority: str = ""

    @property
    def plain(self) -> Certificate:
        """Without the authority, which only the verifying side knows: what both sides can say."""
        return Certificate(id=self.id, serial=self.serial, not_after=self.not_after)


class View(Model):
    """One side's view of a hop (`ztmtls.hop.HopView` as JSON)."""

    side: Literal["caller", "callee"]
    own: Certificate
    peer: Verified
    tls_version: str
    cipher: str
    generation: int = 0
    connection: str = ""
    rule: str | None = None

    @property
    def session(self) -> tuple[str, str]:
        """TLS version and cipher."""
        return self.tls_version, self.cipher


class Link(Model):
    """One call of a service by another, as each side saw it."""

    caller: str = Field(validation_alias="from", serialization_alias="from")
    callee: str = Field(validation_alias="to", serialization_alias="to")
    method: str
    path: str
    seen_by_caller: View | None = None
    seen_by_callee: View | None = None
    duration_ms: float | None = None


class DatabaseUse(Model):
    """Which database served a request, as which user, with which version of which secret."""

    service: str = ""
    database: str
    user: str
    secret_id: str
    secret_version: str | None = None
    tls_version: str | None = None
    tls_cipher: str | None = None


class PlacedOrder(Model):
    """An order and the evidence that orders stored when it was placed."""

    order: Order
    links: tuple[Link, ...] = ()
    databases: tuple[DatabaseUse, ...] = ()
    this_request: View | None = None
    """What orders saw of the request that this answers."""


class FieldError(Model):
    """One field that orders did not accept, e.g. ``items[0].quantity``."""

    field: str
    message: str


def now() -> datetime:
    """The time, aware, in UTC."""
    return datetime.now(UTC)
