"""Every attack against the stack, by the same function as `make attack`; and people order meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.attacks.catalogue import load_attacks
from tests.attacks.lab import Attack, Lab, prove
from ztdev.shop import Visitor
from ztdev.stack import BackgroundStack

ATTACKS = load_attacks()


@pytest.fixture(scope="module", autouse=True)
def orders_go_on(stack: BackgroundStack) -> Iterator[None]:
    """One order after the other, from the first attack to the last: each must be paid."""
    stop = threading.Event()
    outcomes: list[str] = []

    def order() -> None:
        with Visitor(stack.urls.page) as visitor:
            while not stop.is_set():
                try:
                    outcomes.append(visitor.order()["order"]["status"])
                except Exception as error:
                    outcomes.append(f"{type(error).__name__}: {error}")
                stop.wait(0.1)

    thread = threading.Thread(target=order, name="orders")
    thread.start()
    yield
    stop.set()
    thread.join(30)
    assert outcomes
    assert [outcome for outcome in outcomes if outcome != "paid"] == []


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.id for attack in ATTACKS])
def test_attack(stack: BackgroundStack, attack: Attack) -> None:
    proof = stack.run(prove(attack, Lab(stack.stack)), timeout=100)
    assert proof.ok, proof.fault
    assert proof.audited
