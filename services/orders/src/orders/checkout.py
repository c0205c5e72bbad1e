"""From a wish to a paid order: write it down, have it charged, write down what came of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from .models import Order
from .payments import Charged, Declined, Outcome, Payments, Refused
from .schemas import Link, OrderRequest
from .store import Orders

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    """An order that was asked for. `refused` is set when payments would not take the call."""

    order: Order
    new: bool
    refused: Refused | None = None


class Checkout:
    """Places orders for callers, and settles those whose payment was left open."""

    def __init__(self, orders: Orders, payments: Payments) -> None:
        self._orders = orders
        self._payments = payments

    async def place(self, caller: str, key: str, request: OrderRequest, arrival: Link) -> Placed:
        """Place an order once per key and have it paid. Asked again, a pending order is tried again."""
        order, new = await self._orders.place(caller, key, request, arrival)
        if order.status != "pending":
            return Placed(order, new)
        outcome = await self._payments.charge(order.id, order.total)
        refused = outcome if isinstance(outcome, Refused) else None
        if refused is not None and not new:
            # Whoever placed it may have been charged: that this call was refused says nothing of theirs.
            return Placed(order, new, refused)
        return Placed(await self._settle(order, outcome), new, refused)

    async def settle_due(self, limit: int = 10) -> int:
        """Settle pending orders whose time has come; returns how many were looked at.

        All at once: an order is ours for a little longer than one charge may take.
        """
        due = await self._orders.take_due(limit)
        results = await asyncio.gather(*map(self._settle_late, due), return_exceptions=True)
        for order, result in zip(due, results, strict=True):
            if isinstance(result, Exception):
                logger.warning("order %s stays pending: %s: %s", order.id, type(result).__name__, result)
        return len(due)

    async def _settle_late(self, order: Order) -> None:
        outcome = await self._payments.charge(order.id, order.total)
        if isinstance(outcome, Charged | Declined):
            settled = await self._settle(order, outcome)
            logger.info("order %s is %s after all", order.id, settled.status)
        else:
            logger.warning("order %s stays pending: %s", order.id, outcome.detail)

    async def _settle(self, order: Order, outcome: Outcome) -> Order:
        match outcome:
            case Charged():
                return await self._orders.paid(order.id, outcome)
            case Declined() | Refused():
                return await self._orders.declined(order.id, outcome)
            case _:
                logger.warning("order %s is pending: %s", order.id, outcome.detail)
                return await self._orders.unsettled(order.id)


async def reconcile(checkout: Checkout, interval: float = 2.0) -> None:
    """Settle what is due, for ever, every `interval` seconds. A failure is logged and the work goes on."""
    while True:
        try:
            while await checkout.settle_due():
                pass
        except Exception as error:
            logger.warning("reconciling goes on after %s: %s", type(error).__name__, error)
        await asyncio.sleep(interval)
