"""Every attack against the stack, by the same function as `make attack`; and people order meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.catalogue import load_attacks
from tests.attacks.lab import Attack, Lab, prove
from tests.orders_meanwhile import OrdersMeanwhile
from ztdev.stack import BackgroundStack

ATTACKS = load_attacks()


@pytest.fixture(scope="module", autouse=True)
def orders_go_on(stack: BackgroundStack) -> Iterator[None]:
    """One order after the other, from the first attack to the last: each must be paid."""
    orders = OrdersMeanwhile(stack.urls.page)
    with orders.going_on():
        yield
    assert orders.paid
    assert orders.failed == {}


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.id for attack in ATTACKS])
def test_attack(stack: BackgroundStack, attack: Attack) -> None:
    proof = stack.run(prove(attack, Lab(stack.stack)), timeout=100)
    assert proof.ok, proof.fault
    assert proof.audited
