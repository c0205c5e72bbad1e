"""From a wish to a paid order: what each outcome of the payment makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from orders.checkout import Checkout, reconcile
from orders.models import Order
from orders.payments import Charged, Declined, Outcome, Payments, Refused, Unknown
from orders.schemas import Link, OrderRequest
from orders.store import Orders
from ztmtls.reasons import Reason

REQUEST = OrderRequest.model_validate({"items": [{"sku": "mug-stoneware", "quantity": 1}]})
LINK = Link(source="orders", target="payments", method="POST", path="/payments")
CHARGED = Charged(uuid4(), LINK, {"service": "payments"})
DECLINED = Declined(Reason.PAYMENT_DECLINED, "over the limit", LINK)
REFUSED = Refused(Reason.WRONG_SERVER_IDENTITY, "somebody else", None, LINK)
UNKNOWN = Unknown("no answer")


@dataclass
class FakeOrders:
    """Keeps orders in memory and writes down what was asked of it."""

    orders: dict[str, Order] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    async def place(self, caller: str, key: str, *_: object) -> tuple[Order, bool]:
        new = key not in self.orders
        if new:
            self.orders[key] = Order(id=uuid4(), status="pending", total=1800)
        return self.orders[key], new

    def _find(self, order_id: UUID) -> Order:
        return next(order for order in self.orders.values() if order.id == order_id)

    async def paid(self, order_id: UUID, charged: Charged) -> Order:
        self.calls.append("paid")
        order = self._find(order_id)
        order.status, order.payment_id = "paid", charged.payment_id
        return order

    async def declined(self, order_id: UUID, outcome: Declined | Refused) -> Order:
        self.calls.append("declined")
        order = self._find(order_id)
        if order.status == "pending":
            order.status, order.reason = "declined", str(outcome.reason)
        return order

    async def unsettled(self, order_id: UUID) -> Order:
        self.calls.append("unsettled")
        return self._find(order_id)

    async def take_due(self, limit: int) -> Sequence[Order]:
        self.calls.append("take_due")
        return [order for order in self.orders.values() if order.status == "pending"][:limit]


@dataclass
class FakePayments:
    outcomes: list[Outcome]
    asked: list[tuple[UUID, int]] = field(default_factory=list)

    async def charge(self, order_id: UUID, amount: int) -> Outcome:
        self.asked.append((order_id, amount))
        return self.outcomes.pop(0)


def _checkout(*outcomes: Outcome) -> tuple[Checkout, FakeOrders, FakePayments]:
    orders, payments = FakeOrders(), FakePayments(list(outcomes))
    return Checkout(cast(Orders, orders), cast(Payments, payments)), orders, payments


async def _place(checkout: Checkout, key: str = "k") -> Any:
    return await checkout.place("spiffe://zt.example/frontend", key, REQUEST, LINK)


async def test_a_charged_order_is_paid_and_never_charged_again() -> None:
    checkout, _, payments = _checkout(CHARGED)

    first = await _place(checkout)
    second = await _place(checkout)

    assert (first.order.status, first.new, second.new) == ("paid", True, False)
    assert second.order is first.order
    assert payments.asked == [(first.order.id, 1800)]


@pytest.mark.parametrize(
    ("outcome", "status", "call"),
    [
        (DECLINED, "declined", "declined"),
        (REFUSED, "declined", "declined"),
        (UNKNOWN, "pending", "unsettled"),
    ],
)
async def test_what_becomes_of_a_new_order(outcome: Outcome, status: str, call: str) -> None:
    checkout, orders, _ = _checkout(outcome)

    placed = await _place(checkout)

    assert placed.order.status == status
    assert orders.calls == [call]
    assert placed.refused is (outcome if outcome is REFUSED else None)


async def test_an_unknown_outcome_is_asked_again_by_the_same_order() -> None:
    checkout, _, payments = _checkout(UNKNOWN, CHARGED)

    first = await _place(checkout)
    second = await _place(checkout)

    assert (second.order.status, second.new) == ("paid", False)
    assert payments.asked == [(first.order.id, 1800)] * 2


async def test_a_refusal_does_not_close_an_order_that_was_in_doubt() -> None:
    checkout, _, _ = _checkout(UNKNOWN, REFUSED)
    await _place(checkout)

    second = await _place(checkout)

    assert second.refused is REFUSED
    assert second.order.status == "pending"


async def test_settling_takes_only_what_is_certain() -> None:
    checkout, orders, _ = _checkout(UNKNOWN, UNKNOWN, REFUSED, CHARGED)
    for key in ("one", "two"):
        await _place(checkout, key)
    orders.calls.clear()

    assert await checkout.settle_due() == 2

    assert orders.calls == ["take_due", "paid"]
    assert sorted(order.status for order in orders.orders.values()) == ["paid", "pending"]


async def test_one_order_that_fails_to_settle_holds_up_no_other() -> None:
    checkout, orders, _ = _checkout(UNKNOWN, UNKNOWN, cast(Outcome, None), CHARGED)
    for key in ("one", "two"):
        await _place(checkout, key)

    assert await checkout.settle_due() == 2

    assert sorted(order.status for order in orders.orders.values()) == ["paid", "pending"]


async def test_the_reconciler_survives_failures() -> None:
    worked = asyncio.Event()

    class Failing:
        calls = 0

        async def settle_due(self, limit: int = 10) -> int:
            self.calls += 1
            if self.calls <= 2:
                raise RuntimeError("the database is away")
            worked.set()
            return 0

    task = asyncio.create_task(reconcile(cast(Checkout, Failing()), interval=0.001))
    async with asyncio.timeout(5):
        await worked.wait()
    assert not task.done()
    task.cancel()
