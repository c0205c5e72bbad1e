"""Tables. What must hold about money is a constraint here, not a hope in the code."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The tables of the payments database."""

    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(constraint_name)s",
            "ck": "%(table_name)s_%(constraint_name)s",
            "ix": "%(table_name)s_%(column_0_name)s_idx",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - declared so by SQLAlchemy
        str: Text(),
        int: BigInteger(),
        datetime: DateTime(timezone=True),
    }


class Charge(Base):
    """Money taken for an order. `(caller, idempotency_key)` names it: that is what makes it once."""

    __tablename__ = "charges"
    __table_args__ = (
        UniqueConstraint("caller", "idempotency_key", name="key_once_per_caller"),
        CheckConstraint("caller LIKE 'spiffe://%'", name="caller_is_spiffe_id"),
        CheckConstraint("amount > 0", name="amount_positive"),
        CheckConstraint("currency = 'EUR'", name="currency_known"),
        CheckConstraint("refunded BETWEEN 0 AND amount", name="refunded_within_amount"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    caller: Mapped[str]
    idempotency_key: Mapped[str]
    fingerprint: Mapped[str]
    order_id: Mapped[UUID] = mapped_column(index=True)
    amount: Mapped[int]
    currency: Mapped[str]
    refunded: Mapped[int] = mapped_column(server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Refund(Base):
    """Money given back from a charge; `refunded_total` is the charge's sum of refunds after this one."""

    __tablename__ = "refunds"
    __table_args__ = (
        UniqueConstraint("caller", "idempotency_key", name="key_once_per_caller"),
        UniqueConstraint("charge_id", "refunded_total", name="total_once_per_charge"),
        CheckConstraint("amount > 0", name="amount_positive"),
        CheckConstraint("refunded_total >= amount", name="total_includes_amount"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    charge_id: Mapped[UUID] = mapped_column(ForeignKey("charges.id"))
    caller: Mapped[str]
    idempotency_key: Mapped[str]
    fingerprint: Mapped[str]
    amount: Mapped[int]
    refunded_total: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Entry(Base):
    """One line of the ledger: a charge adds, a refund takes away. Lines are only ever appended.

    `booked_by` is the database role that wrote the line, from the server itself.
    """

    __tablename__ = "entries"
    __table_args__ = (
        CheckConstraint(
            "(refund_id IS NULL AND amount > 0) OR (refund_id IS NOT NULL AND amount < 0)",
            name="charges_add_refunds_subtract",
        ),
        Index("entries_one_per_charge", "charge_id", unique=True, postgresql_where=text("refund_id IS NULL")),
        UniqueConstraint("refund_id", name="one_per_refund"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    charge_id: Mapped[UUID] = mapped_column(ForeignKey("charges.id"), index=True)
    refund_id: Mapped[UUID | None] = mapped_column(ForeignKey("refunds.id"))
    amount: Mapped[int]
    booked_by: Mapped[str] = mapped_column(server_default=func.session_user())
    booked_at: Mapped[datetime] = mapped_column(server_default=func.now())
