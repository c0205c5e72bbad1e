"""Every attack against the stack: the same function as `make attack`."""

from __future__ import annotations

import pytest

from tests.attacks.catalogue import load_attacks
from tests.attacks.lab import Attack, Lab, prove
from ztdev.stack import BackgroundStack

ATTACKS = load_attacks()


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.id for attack in ATTACKS])
def test_attack(stack: BackgroundStack, attack: Attack) -> None:
    proof = stack.run(prove(attack, Lab(stack.stack)), timeout=100)
    assert proof.ok, proof.fault
