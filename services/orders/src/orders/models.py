"""Tables. An order is written down before it is paid for, so that nothing paid can be forgotten."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

Evidence = list[dict[str, Any]]


class Base(DeclarativeBase):
    """The tables of the orders database."""

    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(constraint_name)s",
            "ck": "%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - declared so by SQLAlchemy
        str: Text(),
        int: BigInteger(),
        datetime: DateTime(timezone=True),
        Evidence: JSONB(),
    }


class Product(Base):
    """A product of the catalogue. Filled by migrations; the application may only read it."""

    __tablename__ = "products"
    __table_args__ = (
        CheckConstraint("price > 0", name="price_positive"),
        CheckConstraint("currency = 'EUR'", name="currency_known"),
    )

    sku: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    description: Mapped[str]
    price: Mapped[int]
    currency: Mapped[str]


class Order(Base):
    """An order and how far its payment is.

    ``pending`` → ``paid`` or ``declined``; a payment that turns out to exist wins over ``declined``.
    `next_attempt_at` is when the reconciler may take a pending order; taking it moves the time on.
    `links` and `databases` are the evidence of the placing.
    """

    __tablename__ = "orders"
    __table_args__ = (
        UniqueConstraint("caller", "idempotency_key", name="key_once_per_caller"),
        UniqueConstraint("payment_id", name="payment_once"),
        CheckConstraint("caller LIKE 'spiffe://%'", name="caller_is_spiffe_id"),
        CheckConstraint("status IN ('pending', 'paid', 'declined')", name="status_known"),
        CheckConstraint("(status = 'paid') = (payment_id IS NOT NULL)", name="paid_has_payment"),
        CheckConstraint("status <> 'declined' OR reason IS NOT NULL", name="declined_has_reason"),
        CheckConstraint("status <> 'paid' OR reason IS NULL", name="paid_needs_no_reason"),
        CheckConstraint("total > 0", name="total_positive"),
        CheckConstraint("currency = 'EUR'", name="currency_known"),
        Index("orders_pending_idx", "next_attempt_at", postgresql_where=text("status = 'pending'")),
        Index("orders_caller_created_at_idx", "caller", text("created_at DESC")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    caller: Mapped[str]
    idempotency_key: Mapped[str]
    fingerprint: Mapped[str]
    status: Mapped[str] = mapped_column(server_default=text("'pending'"))
    reason: Mapped[str | None]
    payment_id: Mapped[UUID | None]
    total: Mapped[int]
    currency: Mapped[str]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    next_attempt_at: Mapped[datetime]
    links: Mapped[Evidence]
    databases: Mapped[Evidence]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    settled_at: Mapped[datetime | None]

    items: Mapped[list[OrderItem]] = relationship(order_by="OrderItem.position", lazy="selectin")


class OrderItem(Base):
    """A line of an order, with the price of the moment. Lines never change."""

    __tablename__ = "order_items"
    __table_args__ = (
        UniqueConstraint("order_id", "sku", name="product_once_per_order"),
        CheckConstraint("quantity BETWEEN 1 AND 99", name="quantity_in_range"),
        CheckConstraint("unit_price > 0", name="unit_price_positive"),
    )

    order_id: Mapped[UUID] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey("products.sku"))
    name: Mapped[str]
    quantity: Mapped[int]
    unit_price: Mapped[int]
