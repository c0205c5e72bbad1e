"""The runner of the page's lab: order, stopping, and what listeners hear. The attacks are small ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from tests.attacks.catalogue import load_attacks
from tests.attacks.lab import Answer, Attack, Lab, Proof, Report, Target
from tests.attacks.runner import Runner, UnknownAttack

ATTACKS = load_attacks()[:3]
FIRST, SECOND, THIRD = (attack.id for attack in ATTACKS)


class Proving:
    """In the place of `prove`: each attack is refused, and goes on when it is let go."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, attack: Attack, lab: Lab, report: Report) -> Proof:
        self.begun.append(attack.id)
        proof = Proof(attack=attack.id, control=attack.first.control, reason=attack.first.reason)
        report("attempt", proof)
        await self.go.acquire()
        report("refused", replace(proof, refused=True))
        return replace(proof, refused=True, ablation="succeeds")


@pytest.fixture
def proving() -> Proving:
    return Proving()


@pytest.fixture
async def runner(proving: Proving) -> AsyncIterator[Runner]:
    async with Runner(Lab(None), ATTACKS, proving) as runner:  # type: ignore[arg-type]  # nothing is attacked
        yield runner


async def until(runner: Runner, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    async with asyncio.timeout(5):
        async for _ in runner.changes(heartbeat=5):
            if holds(state := runner.state()):
                return state
    raise AssertionError


async def test_attacks_run_one_at_a_time_in_the_order_in_which_they_were_pressed(
    runner: Runner, proving: Proving
) -> None:
    runner.press([SECOND, FIRST])
    runner.press([FIRST, THIRD])  # FIRST waits already
    state = await until(runner, lambda state: state["running"])
    assert state["running"]["attack"] == SECOND
    assert state["waiting"] == [FIRST, THIRD]
    for _ in range(3):
        proving.go.release()
    state = await until(runner, lambda state: len(state["proofs"]) == 3 and not state["running"])
    assert proving.begun == [SECOND, FIRST, THIRD]
    assert all(proof["refused"] for proof in state["proofs"].values())


async def test_an_attack_that_runs_is_not_queued_again_and_one_that_ran_is(
    runner: Runner, proving: Proving
) -> None:
    runner.press([FIRST])
    await until(runner, lambda state: state["running"])
    runner.press([FIRST])
    assert runner.state()["waiting"] == []
    proving.go.release()
    await until(runner, lambda state: state["proofs"] and not state["running"])
    runner.press([FIRST])
    await until(runner, lambda state: state["running"])
    assert proving.begun == [FIRST, FIRST]


async def test_stop_forgets_those_that_wait_and_lets_the_one_under_way_end(
    runner: Runner, proving: Proving
) -> None:
    runner.press([FIRST, SECOND])
    await until(runner, lambda state: state["running"])
    runner.stop()
    proving.go.release()
    state = await until(runner, lambda state: state["proofs"] and not state["running"])
    assert list(state["proofs"]) == [FIRST]
    assert state["waiting"] == []


async def test_an_unknown_attack_is_refused_and_nothing_of_its_list_runs(
    runner: Runner, proving: Proving
) -> None:
    with pytest.raises(UnknownAttack, match="make-coffee"):
        runner.press([FIRST, "make-coffee"])
    assert runner.state()["waiting"] == []
    assert proving.begun == []


async def test_a_listener_gets_everything_first_and_then_only_what_is_new(
    runner: Runner, proving: Proving
) -> None:
    proving.go.release()
    runner.press([FIRST])
    await until(runner, lambda state: state["proofs"] and not state["running"])
    async with asyncio.timeout(5):
        changes = runner.changes(heartbeat=5)
        assert list((await anext(changes) or {})["proofs"]) == [FIRST]
        runner.press([SECOND])
        assert (await anext(changes) or {})["proofs"] == {}


async def test_what_an_attack_waited_for_may_be_cancelled_and_the_runner_goes_on() -> None:
    async def cancelled(lab: Lab, target: Target) -> Answer:
        raise asyncio.CancelledError

    async def rightful(lab: Lab, target: Target) -> Answer:
        return Answer(status=200)

    nowhere = Target("nowhere", 0, list)
    broken = replace(
        ATTACKS[0], rightful=rightful, attempt=cancelled, door=lambda lab, left_out: nullcontext(nowhere)
    )
    async with Runner(Lab(None), [broken]) as runner:  # type: ignore[arg-type]
        for _ in range(2):
            runner.press([FIRST])
            state = await until(runner, lambda state: state["proofs"] and not state["running"])
            assert "CancelledError" in state["proofs"][FIRST]["fault"]
            assert not state["proofs"][FIRST]["refused"]


async def test_a_listener_hears_a_heartbeat_when_nothing_changes(runner: Runner) -> None:
    async with asyncio.timeout(5):
        changes = runner.changes(heartbeat=0.01)
        assert (await anext(changes) or {})["waiting"] == []
        assert await anext(changes) is None
