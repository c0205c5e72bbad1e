"""Orders in the database. Each method is one transaction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import Select, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.selectable import TypedReturnsRows

from ztmtls.database import database_use
from ztmtls.fastapi import Problem, key_reused
from ztmtls.idempotency import fingerprint
from ztmtls.reasons import Reason
from ztmtls.transactions import Database

from . import SERVICE
from .models import Order, OrderItem, Product
from .payments import Charged, Declined, Refused
from .schemas import Link, OrderRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEFT_ALONE = timedelta(seconds=30)
"""An order just placed is its request's business for so long: longer than that may take."""

FIRST_REPEAT = timedelta(seconds=5)
LONGEST_REPEAT = timedelta(minutes=5)


class Orders:
    """The orders of all callers. A caller reaches its own only."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def products(self) -> Sequence[Product]:
        """The catalogue, by name."""
        return await self._database.run(lambda session: _all(session, select(Product).order_by(Product.name)))

    async def place(self, caller: str, key: str, request: OrderRequest, arrival: Link) -> tuple[Order, bool]:
        """Write the order down as pending, once per key. True when it is new.

        Raises `Problem` 422 for a product that is not there and for a reused key.
        """
        digest = fingerprint("order", request.model_dump(mode="json"))

        async def work(session: AsyncSession) -> tuple[Order, bool]:
            order = await session.scalar(_by_key(caller, key))
            if order is None:
                items = await _priced(session, request)
                order = await session.scalar(
                    insert(Order)
                    .values(
                        caller=caller,
                        idempotency_key=key,
                        fingerprint=digest,
                        total=sum(item.quantity * item.unit_price for item in items),
                        currency="EUR",
                        next_attempt_at=func.now() + LEFT_ALONE,
                        links=[arrival.as_dict()],
                        databases=[await _database_use(session)],
                    )
                    .on_conflict_do_nothing(index_elements=["caller", "idempotency_key"])
                    .returning(Order)
                )
                if order is not None:
                    for item in items:
                        item.order_id = order.id
                    session.add_all(items)
                    await session.flush()
                    await session.refresh(order, ["items"])
                    return order, True
                order = (await session.scalars(_by_key(caller, key))).one()
            if order.fingerprint != digest:
                raise key_reused()
            return order, False

        return await self._database.run(work)

    async def paid(self, order_id: UUID, charged: Charged) -> Order:
        """Record the payment. A payment wins over whatever was thought of the order before."""

        async def work(session: AsyncSession) -> Order:
            order = await _locked(session, order_id)
            if order.status != "paid":
                order.status, order.reason, order.payment_id = "paid", None, charged.payment_id
                order.links = [*order.links, charged.link.as_dict()]
                order.databases = [*order.databases, charged.database]
                order.settled_at = await session.scalar(select(func.now()))
            elif order.payment_id != charged.payment_id:
                logger.error("order %s is paid by %s and %s", order_id, order.payment_id, charged.payment_id)
            return order

        return await self._database.run(work)

    async def declined(self, order_id: UUID, outcome: Declined | Refused) -> Order:
        """Close a pending order: nothing was charged, and nothing will be."""

        async def work(session: AsyncSession) -> Order:
            order = await _locked(session, order_id)
            if order.status == "pending":
                order.status, order.reason = "declined", str(outcome.reason)
                order.links = [*order.links, outcome.link.as_dict()]
                order.settled_at = await session.scalar(select(func.now()))
            return order

        return await self._database.run(work)

    async def unsettled(self, order_id: UUID) -> Order:
        """Leave a pending order to the reconciler, which takes it up shortly."""

        async def work(session: AsyncSession) -> Order:
            order = await _locked(session, order_id)
            if order.status == "pending":
                order.reason = str(Reason.PAYMENT_UNKNOWN)
                order.next_attempt_at = func.now() + FIRST_REPEAT
                await session.flush()
                await session.refresh(order)
            return order

        return await self._database.run(work)

    async def take_due(self, limit: int) -> Sequence[Order]:
        """Take pending orders whose time has come, for this process alone.

        Rows that a replica is taking at this moment are skipped, and taking moves an order's next time
        on, by more than an attempt lasts and further each time. So no two work on one order, and one
        that its taker left behind comes up again.
        """
        due = (
            select(Order.id)
            .where(Order.status == "pending", Order.next_attempt_at <= func.now())
            .order_by(Order.next_attempt_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        doublings = func.least(Order.attempts, 10)
        pause = func.least(LONGEST_REPEAT, 2 * FIRST_REPEAT * func.power(2, doublings))
        taken = (
            update(Order)
            .where(Order.id.in_(due))
            .values(attempts=Order.attempts + 1, next_attempt_at=func.now() + pause)
            .returning(Order)
        )
        return await self._database.run(lambda session: _all(session, taken))

    async def find(self, caller: str, order_id: UUID) -> Order:
        """One order. Raises `Problem` 404 when this caller has no such order."""
        found = await self._database.run(
            lambda session: _all(session, select(Order).where(Order.id == order_id, Order.caller == caller))
        )
        if not found:
            raise Problem(404, Reason.NOT_FOUND, "No such order", "This caller has no such order.")
        return found[0]

    async def newest(self, caller: str, limit: int) -> Sequence[Order]:
        """The caller's newest orders."""
        query = select(Order).where(Order.caller == caller)
        return await self._database.run(
            lambda session: _all(session, query.order_by(Order.created_at.desc(), Order.id).limit(limit))
        )

    async def database_use(self) -> dict[str, Any]:
        """Who we are to the database at this moment."""
        return await self._database.run(_database_use)


async def _database_use(session: AsyncSession) -> dict[str, Any]:
    return {"service": SERVICE, **await database_use(await session.connection())}


async def _all(session: AsyncSession, query: TypedReturnsRows[T]) -> Sequence[T]:
    return (await session.scalars(query)).all()


def _by_key(caller: str, key: str) -> Select[Order]:
    return select(Order).where(Order.caller == caller, Order.idempotency_key == key)


async def _locked(session: AsyncSession, order_id: UUID) -> Order:
    return (await session.scalars(select(Order).where(Order.id == order_id).with_for_update())).one()


async def _priced(session: AsyncSession, request: OrderRequest) -> list[OrderItem]:
    """The wanted items at today's prices. Raises `Problem` 422 for a product that is not there."""
    wanted = [item.sku for item in request.items]
    found = {p.sku: p for p in await session.scalars(select(Product).where(Product.sku.in_(wanted)))}
    faults = [
        {"field": f"items[{n}].sku", "message": "there is no such product"}
        for n, sku in enumerate(wanted)
        if sku not in found
    ]
    if faults:
        names = ", ".join(fault["field"] for fault in faults)
        raise Problem(
            422, Reason.INVALID_REQUEST, "The request is not valid", f"Look at: {names}", errors=faults
        )
    return [
        OrderItem(
            position=position,
            sku=item.sku,
            name=found[item.sku].name,
            quantity=item.quantity,
            unit_price=found[item.sku].price,
        )
        for position, item in enumerate(request.items, start=1)
    ]
