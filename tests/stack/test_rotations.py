"""The part of Secrets Manager that rotates: when it is due, again after a failure, cut off anywhere.

`Rotations` drives the deployed functions against a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from ztdev import rotation
from ztdev.rotation import ATTEMPTS, STEPS, RotationFailed, Rotations

from .rotation import SERVICES, Rotated, rotations

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


TWINS = {"orders_app": "orders_app_clone", "orders_app_clone": "orders_app"}


class Log(list[dict[str, Any]]):
    """What happened, in order."""

    def __call__(self, event: str, **facts: Any) -> None:
        self.append({"event": event, **facts})

    def of(self, event: str, **facts: Any) -> list[dict[str, Any]]:
        return [line for line in self if line["event"] == event and facts.items() <= line.items()]

    async def until(self, condition: Callable[[], Any], within: float = 30.0) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, list(self)
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Rotated]]:
    async with rotations(tmp_path_factory.mktemp("rotations")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def orders(both: dict[str, Rotated]) -> Rotated:
    await both["orders"].begin_anew()
    return both["orders"]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def by_hand(both: dict[str, Rotated], log: Log) -> Rotations:
    """Without a schedule."""
    return Rotations(both["orders"].cloud, SERVICES, 0, log)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "FIRST_PAUSE", 0.05)


async def pending(rotated: Rotated) -> list[str]:
    return [version for version, labels in (await rotated.stages()).items() if "AWSPENDING" in labels]


@contextlib.asynccontextmanager
async def running(scheduled: Rotations) -> AsyncIterator[None]:
    task = asyncio.create_task(scheduled.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


# -- on time


async def test_every_secret_is_rotated_when_it_is_due_and_says_when_that_is(
    both: dict[str, Rotated], log: Log
) -> None:
    for rotated in both.values():
        await rotated.begin_anew()
    before = {service: await rotated.value() for service, rotated in both.items()}
    scheduled = Rotations(both["orders"].cloud, SERVICES, 2, log)

    await scheduled.schedule()
    due = {
        service: (await rotated.secrets_manager("describe_secret"))["NextRotationDate"].timestamp()
        for service, rotated in both.items()
    }
    assert all(0 < moment - time.time() <= 2 for moment in due.values())
    assert log == []
    async with running(scheduled):
        await log.until(lambda: all(len(log.of("rotated", service=service)) >= 2 for service in SERVICES))

    for service, rotated in both.items():
        described = await rotated.secrets_manager("describe_secret")
        assert described["NextRotationDate"].timestamp() >= due[service] + 2
        assert described["LastRotatedDate"].timestamp() >= due[service]
        assert await rotated.value() != before[service]
        assert await rotated.login(await rotated.value())
    assert log.of("failed") == []


async def test_a_rotation_moves_the_next_one(both: dict[str, Rotated], orders: Rotated, log: Log) -> None:
    scheduled = Rotations(orders.cloud, SERVICES, 600, log)
    await scheduled.schedule()
    first = (await orders.secrets_manager("describe_secret"))["NextRotationDate"]

    await scheduled.rotate("orders")

    second = (await orders.secrets_manager("describe_secret"))["NextRotationDate"]
    assert first < second
    other = await both["payments"].secrets_manager("describe_secret")
    assert other["NextRotationDate"] < second


async def test_a_local_aws_that_comes_back_empty_gets_its_schedule_again(both: dict[str, Rotated]) -> None:
    orders, log = both["orders"], Log()
    scheduled = Rotations(orders.cloud, SERVICES, 600, log)

    async def next_date() -> Any:
        return (await orders.secrets_manager("describe_secret")).get("NextRotationDate")

    async with running(scheduled):
        await orders.cloud.stop()
        with pytest.raises(RotationFailed, match="The local AWS is not up"):
            await scheduled.rotate("orders")
        await orders.cloud.start()
        for rotated in both.values():
            rotated.clients.clear()
            rotator = await rotated.secrets_manager("get_secret_value", SecretId=rotated.rotator_id)
            password = json.loads(rotator["SecretString"])["password"]
            await rotated.postgres.set_password(f"{rotated.service}_rotator", password)
            await rotated.begin_anew()
        async with asyncio.timeout(30):
            while await next_date() is None:
                await asyncio.sleep(0.05)

    assert (await scheduled.rotate("orders")).after.user == "orders_app_clone"


async def test_two_that_ask_at_once_take_their_turn(orders: Rotated, by_hand: Rotations) -> None:
    before = await orders.value()

    one, two = await asyncio.gather(by_hand.rotate("orders"), by_hand.rotate("orders"))

    assert (one.after, two.after.user) == (two.before, before["username"])
    assert await orders.login(await orders.value())


# -- failures


async def test_a_rotation_whose_step_fails_is_tried_again_from_its_beginning(
    orders: Rotated, by_hand: Rotations, log: Log
) -> None:
    rotator = await orders.secrets_manager("get_secret_value", SecretId=orders.rotator_id)
    await orders.postgres.set_password("orders_rotator", "another")
    rotating = asyncio.create_task(by_hand.rotate("orders"))
    await log.until(lambda: log.of("step", step="setSecret", outcome="failed"))
    await orders.postgres.set_password("orders_rotator", json.loads(rotator["SecretString"])["password"])

    done = await rotating

    assert 1 < done.attempts <= ATTEMPTS
    assert "login_refused" in log.of("step", outcome="failed")[0]["detail"]
    assert len(log.of("step", step="createSecret", outcome="done")) == done.attempts
    assert {line["version"] for line in log} == {done.after.id}
    assert await orders.login(await orders.value()) == done.after.user


@pytest.mark.usefixtures("impatient")
async def test_a_rotation_that_goes_on_failing_is_given_up_and_the_next_begins_anew(
    orders: Rotated, by_hand: Rotations, log: Log
) -> None:
    before = await orders.value()
    rotator = await orders.secrets_manager("get_secret_value", SecretId=orders.rotator_id)
    await orders.postgres.set_password("orders_rotator", "another")

    with pytest.raises(RotationFailed, match=r"setSecret .* login_refused.* given up"):
        await by_hand.rotate("orders")

    assert len(log.of("step", step="setSecret", outcome="failed")) == ATTEMPTS
    assert len(log.of("given up")) == len(log.of("failed")) == 1
    assert await pending(orders) == []
    assert await orders.value() == before
    assert await orders.login(before)
    await orders.postgres.set_password("orders_rotator", json.loads(rotator["SecretString"])["password"])
    done = await by_hand.rotate("orders")
    assert not done.continued
    assert done.after.id != log.of("given up")[0]["version"]
    assert await orders.login(await orders.value()) == done.after.user


@pytest.mark.usefixtures("impatient")
async def test_a_version_that_cannot_be_finished_does_not_stand_in_the_way_for_ever(
    orders: Rotated, by_hand: Rotations, log: Log
) -> None:
    await by_hand.rotate("orders", cut_off_at="setSecret")
    value = await orders.value()
    twin = TWINS[value["username"]]
    by_somebody = value | {"username": twin, "password": secrets.token_hex(20)}
    await orders.put(by_somebody, "AWSCURRENT", secrets.token_hex(16))

    with pytest.raises(RotationFailed, match="secrets_disagree"):
        await by_hand.rotate("orders")

    assert await pending(orders) == []
    done = await by_hand.rotate("orders")
    assert (done.after.user, done.attempts) == (value["username"], 1)
    assert await orders.login(await orders.value())


@pytest.mark.parametrize("step", STEPS)
async def test_a_rotation_that_is_cut_off_changes_nothing_and_the_next_heals_it(
    orders: Rotated, by_hand: Rotations, log: Log, step: str
) -> None:
    before = await orders.value()

    cut = await by_hand.rotate("orders", cut_off_at=step)

    assert (cut.before, cut.cut_off_at) == (cut.after, step)
    assert await orders.value() == before
    assert await orders.login(before) == before["username"]
    assert [line["step"] for line in log.of("step")] == list(STEPS[: STEPS.index(step)])
    [left] = await pending(orders)
    healed = await by_hand.rotate("orders")
    assert (healed.continued, healed.after.id, healed.attempts) == (True, left, 1)
    assert await pending(orders) == []
    assert await orders.login(await orders.value()) == healed.after.user != before["username"]
