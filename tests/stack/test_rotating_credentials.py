"""`ztmtls.secrets` and `ztmtls.database` together, as a service uses them: the role of infra/workload.yaml,
the rotation function, a real PostgreSQL, and every kind of trouble between them.

Each test begins with requests that work, makes one kind of trouble, sees what becomes of requests meanwhile,
ends the trouble, and sees everything well again: in the same process, with the same objects.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from ztdev.aws.issuer import TokenFile
from ztdev.ports import choose_free_ports
from ztmtls import aws_clients, aws_credentials
from ztmtls.database import DatabaseTarget, NoDatabase, check, create_engine, database_use, keep_fresh
from ztmtls.lifecycle import beside
from ztmtls.reasons import Reason, Refusal
from ztmtls.secrets import RotatingSecret, SecretError, identity_from_env

from .faults import Fault, FaultyAws, Service, broken, cut, half, hanging, slow, throttled
from .rotation import STEPS, Rotated, rotations

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

ORDERS = ("orders_app", "orders_app_clone")


# -- the rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("credentials")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(state: Path) -> AsyncIterator[tuple[Rotated, FaultyAws]]:
    [port] = choose_free_ports(1)
    async with rotations(state, names=[f"127.0.0.1:{port}"]) as both:
        orders = both["orders"]
        async with FaultyAws(port, gate=int(orders.cloud.endpoint_url.rpartition(":")[2])) as aws:
            yield orders, aws


@pytest_asyncio.fixture(loop_scope="module")
async def orders(running: tuple[Rotated, FaultyAws]) -> Rotated:
    await running[0].begin_anew()
    return running[0]


@pytest_asyncio.fixture(loop_scope="module")
async def aws(running: tuple[Rotated, FaultyAws]) -> AsyncIterator[FaultyAws]:
    proxy = running[1]
    yield proxy
    proxy.trouble.clear()
    proxy.calls.clear()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that hangs is given up after a second, not five."""
    monkeypatch.setattr(aws_clients, "READ_TIMEOUT", 1.0)


@pytest.fixture(autouse=True)
def nothing_is_told(
    running: tuple[Rotated, FaultyAws], state: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """No password is in any log, whatever the trouble."""
    caplog.set_level(logging.DEBUG)
    yield
    told = caplog.text + (state / "aws.log").read_text() + (state / "postgres.log").read_text()
    assert running[0].passwords
    for password in running[0].passwords:
        assert password not in told


@dataclass
class Process:
    """What a service has: its identity by the variables of IRSA, its secret, its engine."""

    token: TokenFile
    secret: RotatingSecret
    engine: AsyncEngine

    async def request(self) -> str:
        """One transaction. The answer is the user that it was done as."""
        async with self.engine.begin() as connection:
            await connection.execute(text("INSERT INTO things DEFAULT VALUES"))
            user = (await database_use(connection))["user"]
            assert user is not None
            return user

    async def until(self, state: str, within: float = 30.0) -> None:
        await until(lambda: self.secret.status()["state"] == state, f"secret is {state}", within)


Starts = Callable[..., Awaitable[Process]]


@pytest_asyncio.fixture(loop_scope="module")
async def start(orders: Rotated, aws: FaultyAws, tmp_path: Path) -> AsyncIterator[Starts]:
    """Starts a service's credentials and database. `max_age` as in `RotatingSecret`, rather short here."""
    async with AsyncExitStack() as stack:

        async def one(max_age: float = 1.0, background: bool = True, **options: Any) -> Process:
            token = await stack.enter_async_context(
                TokenFile(tmp_path / secrets.token_hex(4), orders.cloud._issuer, service_account="orders")
            )
            identity = identity_from_env(
                {
                    "AWS_ROLE_ARN": orders.cloud.role_arn("orders"),
                    "AWS_WEB_IDENTITY_TOKEN_FILE": str(token.path),
                    "AWS_REGION": orders.cloud.region,
                    "AWS_ENDPOINT_URL": aws.url,
                }
            )
            secret = RotatingSecret("zt-demo/orders/db", identity, endpoint_url=aws.url, max_age=max_age)
            if background:
                await stack.enter_async_context(secret)
            else:
                stack.callback(secret.close)
            engine = create_engine(secret, target(orders), **{"pool_size": 4, "max_overflow": 0, **options})
            stack.push_async_callback(engine.dispose)
            return Process(token, secret, engine)

        yield one


def target(orders: Rotated) -> DatabaseTarget:
    return DatabaseTarget(orders.postgres.host, orders.postgres.port, "orders", orders.postgres.ca_file)


async def until(condition: Callable[[], bool], what: str, within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass
class Load:
    """Requests without a pause, from several at once, and how they ended."""

    process: Process
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    async def work(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self.done[await self.process.request()] += 1
            except (Refusal, DBAPIError) as error:
                self.failures.append(str(error))
                await asyncio.sleep(0.05)
            self.slowest = max(self.slowest, time.monotonic() - began)

    async def more(self, user: str | None = None, number: int = 20) -> None:
        """Wait until so many more requests have been answered (as this user)."""

        def count() -> int:
            return self.done[user] if user else self.done.total()

        enough = count() + number
        await until(lambda: count() >= enough, f"{number} more requests as {user or 'anybody'}")


@asynccontextmanager
async def load(process: Process, clients: int = 6) -> AsyncIterator[Load]:
    """`clients` is more than the pool has connections."""
    given = Load(process)
    tasks = [asyncio.create_task(given.work()) for _ in range(clients)]
    try:
        await given.more()
        assert given.failures == []
        yield given
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended


async def sessions(orders: Rotated) -> dict[str, int]:
    """How many sessions each login of orders has."""
    async with orders.postgres.administrator() as connection:
        rows = await (
            await connection.execute(
                "SELECT usename, count(*) FROM pg_stat_activity WHERE usename = ANY(%s) GROUP BY usename",
                [list(ORDERS)],
            )
        ).fetchall()
    return {str(row[0]): int(row[1]) for row in rows}


async def until_sessions(orders: Rotated, condition: Callable[[dict[str, int]], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition(found := await sessions(orders)):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)


# -- rotation


async def test_rotations_under_load_fail_no_request_and_replace_every_connection(
    orders: Rotated, start: Starts
) -> None:
    process = await start()
    async with load(process) as requests:
        for _ in range(3):  # the third comes back to the first user, with another password
            await orders.rotate()
            user = (await orders.value())["username"]
            await requests.more(user)
            await until_sessions(orders, lambda found, user=user: set(found) == {user})  # type: ignore[misc]

        assert requests.failures == []
        assert set(requests.done) == set(ORDERS)


async def test_an_idle_service_follows_a_rotation_too(orders: Rotated, start: Starts) -> None:
    process = await start()
    async with beside(keep_fresh(process.engine, every=0.1)):
        await asyncio.gather(*(process.request() for _ in range(4)))
        before = (await orders.value())["username"]
        assert (await sessions(orders))[before] == 4

        await orders.rotate()

        await until_sessions(orders, lambda found: found.get(before, 0) == 0 and sum(found.values()) == 4)


async def test_a_request_that_is_cut_off_leaves_no_session_behind(orders: Rotated, start: Starts) -> None:
    """At any moment of opening its connection, and though nobody collects garbage."""
    process = await start()
    assert await process.request()
    began = time.monotonic()
    await process.engine.dispose()
    await process.request()
    takes = time.monotonic() - began
    gc.collect()
    gc.disable()
    try:
        for tenth in range(20):
            await process.engine.dispose()
            requests = [asyncio.create_task(process.request()) for _ in range(4)]
            await asyncio.sleep(takes * tenth / 10)
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
        await process.engine.dispose()
        await until_sessions(orders, lambda found: not found)
    finally:
        gc.enable()


async def test_a_transaction_that_is_open_during_a_rotation_is_not_cut(
    orders: Rotated, start: Starts
) -> None:
    process = await start()
    async with process.engine.begin() as connection:
        await connection.execute(text("INSERT INTO things DEFAULT VALUES"))
        before = await database_use(connection)
        token = await orders.rotate()
        await until(lambda: process.secret.status()["version"] == token, "the new version is known")
        assert await process.request() != before["user"]

        assert await database_use(connection) == before

    await until_sessions(orders, lambda found: before["user"] not in found)


async def test_the_status_tells_of_the_version_and_of_the_rotation(orders: Rotated, start: Starts) -> None:
    process = await start()
    token = await orders.rotate()
    await until(
        lambda: process.secret.status()["version"] == token and process.secret.status()["rotation_enabled"],
        "the status follows",
    )

    status = process.secret.status()

    assert abs(time.time() - _seconds(status["created_at"])) < 60
    assert _seconds(status["fetched_at"]) <= time.time() < _seconds(status["next_refresh_at"]) + 5
    assert (status["state"], status["last_error"]) == ("serving", None)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


# -- a password that the database does not take (any more)


async def test_a_password_withdrawn_before_the_secret_says_so_costs_patience_and_no_request(
    orders: Rotated, aws: FaultyAws, start: Starts
) -> None:
    process = await start(max_age=3600)
    value = await orders.value()
    async with load(process) as requests:
        new = value | {"password": secrets.token_hex(20)}
        orders.passwords.add(new["password"])
        began = time.monotonic()
        await orders.postgres.set_password(value["username"], new["password"])
        await orders.postgres.end_sessions(value["username"])
        await until(lambda: aws.count("GetSecretValue", since=began) >= 2, "AWS is asked again, twice")
        fresh = await start(max_age=3600)  # a replica that starts just now
        starting = asyncio.create_task(fresh.request())

        await orders.put(new, "AWSCURRENT", secrets.token_hex(16))

        await requests.more()
        assert await starting == value["username"]
        took = time.monotonic() - began
        # Two processes, each not more than once a second, and once at its start.
        assert aws.count("GetSecretValue", since=began) <= 2 * (took + 2)
        # A session that is ended fails what it was doing; no request fails for want of a login.
        assert [failure for failure in requests.failures if "database_" in failure] == []
        assert took < 10
    assert process.secret.status()["state"] == "serving"


async def test_a_password_that_no_version_has_is_told_and_the_next_version_heals_it(
    orders: Rotated, aws: FaultyAws, start: Starts
) -> None:
    process = await start(patience=0.2)
    assert await process.request()
    value = await orders.value()
    await orders.postgres.set_password(value["username"], secrets.token_hex(20))
    await orders.postgres.end_sessions(value["username"])

    await process.engine.dispose()

    with pytest.raises(NoDatabase) as refused:
        await process.request()

    assert refused.value.reason is Reason.DATABASE_DENIED
    assert await check(process.engine) == "database_denied"
    assert (
        process.secret.status()["state"] == "serving"
    )  # the secret can be read: it is not the one to repair

    await orders.rotate()

    await until_request(process, within=10)


async def until_request(process: Process, within: float = 10.0) -> str:
    deadline = time.monotonic() + within
    while True:
        try:
            return await process.request()
        except (Refusal, DBAPIError):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def another_password(orders: Rotated) -> str:
    """For the same user, whose name is returned, in the secret and in the database, which refuses the old one
    from now on."""
    value = await orders.value()
    new = value | {"password": secrets.token_hex(20)}
    orders.passwords.add(new["password"])
    await orders.put(new, "AWSCURRENT", secrets.token_hex(16))
    await orders.postgres.set_password(value["username"], new["password"])
    return value["username"]


@pytest.mark.parametrize("trouble", ["hangs", "throttles", "answers 503"])
async def test_a_refused_login_while_aws_is_in_trouble_is_told_in_bounded_time(
    orders: Rotated, aws: FaultyAws, start: Starts, trouble: str
) -> None:
    """The two at once: nobody waits for ever, nobody asks without end, and both may heal in any order."""
    process = await start(max_age=3600, patience=1.0)
    assert await process.request()
    user = await another_password(orders)
    await process.engine.dispose()
    aws.trouble["secretsmanager"] = TROUBLE[trouble]
    began = time.monotonic()

    answers = await asyncio.gather(*(process.request() for _ in range(4)), return_exceptions=True)

    took = time.monotonic() - began
    assert took < 12
    assert all(isinstance(answer, NoDatabase) for answer in answers), answers
    assert {answer.reason for answer in answers if isinstance(answer, NoDatabase)} == {Reason.DATABASE_DENIED}
    assert any("could not be read again" in str(answer) for answer in answers)
    assert aws.count("GetSecretValue", since=began) <= 2 * (took + 2)  # botocore tries each call twice

    aws.trouble.clear()

    assert await until_request(process) == user


async def test_no_session_gets_older_than_its_age_under_load_or_idle(orders: Rotated, start: Starts) -> None:
    process = await start()
    process.engine = create_engine(process.secret, target(orders), pool_size=4, max_overflow=0, max_age=1.0)
    oldest = 0.0

    async def watch(seconds: float) -> None:
        nonlocal oldest
        until = time.monotonic() + seconds
        async with orders.postgres.administrator() as connection:
            while time.monotonic() < until:
                row = await (
                    await connection.execute(
                        "SELECT coalesce(extract(epoch FROM max(clock_timestamp() - backend_start)), 0)"
                        " FROM pg_stat_activity WHERE usename = ANY(%s)",
                        [list(ORDERS)],
                    )
                ).fetchone()
                assert row is not None
                oldest = max(oldest, float(row[0]))
                await asyncio.sleep(0.05)

    async with beside(keep_fresh(process.engine, every=0.2)):
        async with load(process) as requests:
            await watch(3.0)
            assert requests.failures == []
        await watch(3.0)
    await process.engine.dispose()

    assert 0.5 < oldest < 2.0  # seconds: the age, what keep_fresh takes, and a busy machine


async def test_many_processes_that_lose_their_login_at_once_ask_once_each(
    orders: Rotated, aws: FaultyAws, start: Starts, state: Path
) -> None:
    """150 requests in three processes, and an AWS that throttles above five calls a second."""
    processes = [await start(max_age=3600, max_overflow=6) for _ in range(3)]
    for process in processes:
        assert await process.request()
    user = await another_password(orders)
    for process in processes:
        await process.engine.dispose()
    answered: list[float] = []

    async def five_a_second(service: Service) -> bytes | None:
        now = time.monotonic()
        if sum(moment > now - 1 for moment in answered) >= 5:
            return await throttled(service)
        answered.append(now)
        return None

    aws.trouble["secretsmanager"] = five_a_second
    logged = (state / "postgres.log").read_text().count("password authentication failed")
    began = time.monotonic()

    users = await asyncio.gather(*(process.request() for process in processes for _ in range(50)))

    assert set(users) == {user}
    assert time.monotonic() - began < 10
    assert aws.count("GetSecretValue", since=began) <= 2 * len(processes)
    failed = (state / "postgres.log").read_text().count("password authentication failed") - logged
    assert 1 <= failed <= 10 * len(processes)  # as many as a pool opens at once


# -- Secrets Manager in trouble

TROUBLE: dict[str, Fault] = {
    "throttles": throttled,
    "answers 503": broken,
    "hangs up": cut,
    "hangs up half-way": half,
    "hangs": hanging,
}


@pytest.mark.parametrize("trouble", TROUBLE)
async def test_trouble_of_secrets_manager_fails_no_request_and_ends_with_it(
    orders: Rotated, aws: FaultyAws, start: Starts, trouble: str
) -> None:
    process = await start()
    async with load(process) as requests:
        aws.trouble["secretsmanager"] = TROUBLE[trouble]
        await process.until("degraded")
        await process.engine.dispose()  # new connections are needed meanwhile
        token = await orders.rotate()  # which the service cannot know of
        await requests.more()
        assert process.secret.status()["last_error"] == "secret_unavailable"
        assert process.secret.status()["version"] != token

        aws.trouble.clear()

        await process.until("serving")
        assert process.secret.status()["version"] == token
        await requests.more((await orders.value())["username"])
        assert requests.failures == []


async def test_a_slow_secrets_manager_slows_no_request(
    orders: Rotated, aws: FaultyAws, start: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_clients, "READ_TIMEOUT", 5.0)
    process = await start(max_age=0.2)
    async with load(process) as requests:
        aws.trouble["secretsmanager"] = slow(2.0)
        calls = aws.count("GetSecretValue")
        await until(lambda: aws.count("GetSecretValue") > calls, "a slow read has begun")
        requests.slowest = 0.0
        began = time.monotonic()
        while time.monotonic() < began + 1.0:
            await process.secret.get()  # a caller waits for nothing, either
            await asyncio.sleep(0)
        assert requests.slowest < 1.5
        assert process.secret.status()["state"] == "serving"
        assert requests.failures == []


async def test_secrets_manager_that_is_not_there_is_waited_for(
    orders: Rotated, aws: FaultyAws, start: Starts
) -> None:
    process = await start()
    async with load(process) as requests:
        await aws.stop()
        try:
            await process.until("degraded")
            await requests.more()
        finally:
            await aws.start()

        await process.until("serving")
        assert requests.failures == []


async def test_a_role_that_loses_its_right_serves_on_and_says_so(orders: Rotated, start: Starts) -> None:
    """Refused by the policy itself, in the stand-in for IAM."""
    process = await start()
    async with load(process) as requests:
        async with without_the_right_to_read(orders):
            await process.until("degraded")
            await process.engine.dispose()
            await requests.more()
            status = process.secret.status()
            assert status["last_error"] == "secret_denied"
            assert orders.cloud.role_arn("orders") in status["detail"]

        await process.until("serving")
        assert requests.failures == []


@asynccontextmanager
async def without_the_right_to_read(orders: Rotated) -> AsyncIterator[None]:
    name = {"RoleName": "zt-demo-orders", "PolicyName": "read-own-database-secret"}
    iam = orders.client("iam")
    document = (await asyncio.to_thread(iam.get_role_policy, **name))["PolicyDocument"]
    await asyncio.to_thread(iam.delete_role_policy, **name)
    try:
        yield
    finally:
        await asyncio.to_thread(iam.put_role_policy, **name, PolicyDocument=json.dumps(document))


MALFORMED: dict[str, dict[str, Any] | str] = {
    "no JSON": "not JSON, and a password-CANARY in it",
    "no object": '["orders_app", "password-CANARY"]',
    "no user name": {"password": "password-CANARY"},
    "no password": {"username": "orders_app"},
    "password is null": {"username": "orders_app", "password": None},
    "password is a number": {"username": "orders_app", "password": 12345},
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_a_malformed_version_is_never_used_and_the_next_good_one_is(
    orders: Rotated, start: Starts, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    process = await start()
    good = await orders.value()
    async with load(process) as requests:
        await orders.put(MALFORMED[what], "AWSCURRENT", secrets.token_hex(16))
        try:
            await process.until("degraded")
            await process.engine.dispose()
            await requests.more()
            assert process.secret.status()["last_error"] == "secret_malformed"
        finally:
            repaired = secrets.token_hex(16)
            await orders.put(good, "AWSCURRENT", repaired)

        await process.until("serving")
        assert process.secret.status()["version"] == repaired
        assert requests.failures == []
    assert "password-CANARY" not in caplog.text


# -- STS in trouble


@pytest.mark.parametrize("trouble", TROUBLE)
async def test_a_start_while_sts_is_in_trouble_comes_through_when_it_ends(
    aws: FaultyAws, start: Starts, trouble: str
) -> None:
    assert await (await start()).request()
    aws.trouble["sts"] = TROUBLE[trouble]
    process = await start()
    await process.until("failed")
    assert process.secret.status()["last_error"] == "secret_unavailable"
    with pytest.raises(SecretError):
        await process.request()
    calls = aws.count("GetSecretValue")

    aws.trouble.clear()

    assert await until_request(process, within=20)
    assert process.secret.status()["state"] == "serving"
    assert aws.count("GetSecretValue") > calls


@pytest.mark.parametrize("trouble", TROUBLE)
async def test_trouble_of_sts_is_not_felt_while_the_last_credentials_are_good(
    aws: FaultyAws, start: Starts, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_credentials, "RENEW_AT", -1.0)  # they want to be renewed all the time
    monkeypatch.setattr(aws_credentials, "RENEW_RETRY", 0.2)
    process = await start()
    async with load(process) as requests:
        aws.trouble["sts"] = TROUBLE[trouble]
        tried, read = aws.count("AssumeRoleWithWebIdentity"), process.secret.reads["ok"]
        await until(lambda: aws.count("AssumeRoleWithWebIdentity") >= tried + 2, "renewals fail")
        await until(lambda: process.secret.reads["ok"] >= read + 2, "reads go on")
        assert set(process.secret.reads) == {"ok"}
        await requests.more()
        assert requests.failures == []


async def test_a_role_that_trusts_us_no_longer_is_told_and_heals(orders: Rotated, start: Starts) -> None:
    iam, role = orders.client("iam"), "zt-demo-orders"
    assert await (await start()).request()
    document = (await asyncio.to_thread(iam.get_role, RoleName=role))["Role"]["AssumeRolePolicyDocument"]
    other = json.dumps(document).replace(":orders", ":nobody")

    async def trust(policy: str) -> None:
        await asyncio.to_thread(iam.update_assume_role_policy, RoleName=role, PolicyDocument=policy)

    await trust(other)
    try:
        process = await start()
        await process.until("failed")
        status = process.secret.status()
        assert status["last_error"] == "web_identity_refused"
        assert "sub=system:serviceaccount:zt-demo:orders" in status["detail"]
    finally:
        await trust(json.dumps(document))

    assert await until_request(process, within=20)


@pytest.mark.parametrize("what", ["expired", "of another service", "forged", "missing", "empty"])
async def test_a_token_that_is_no_good_is_told_and_the_next_one_heals_it(
    orders: Rotated, aws: FaultyAws, start: Starts, what: str
) -> None:
    assert await (await start()).request()
    issuer = orders.cloud._issuer
    good = issuer.token("zt-demo", "orders")
    head, claims, _ = good.split(".")
    bad = {
        "expired": issuer.token("zt-demo", "orders", lifetime=-60),
        "of another service": issuer.token("zt-demo", "payments"),
        "forged": f"{head}.{claims}.{'A' * 342}",
        "empty": "",
    }
    process = await start(background=False)
    process.token.write(bad.get(what, good))
    if what == "missing":
        process.token.path.unlink()

    with pytest.raises(SecretError) as refused:
        await process.request()
    assert refused.value.reason is (
        Reason.WEB_IDENTITY_MISSING if what in ("missing", "empty") else Reason.WEB_IDENTITY_REFUSED
    )
    assert aws.count("GetSecretValue") <= 2  # of the first process: this one had nothing to sign with

    process.token.write(good)

    assert await until_request(process, within=20)


# -- the database in trouble


async def test_a_database_that_is_down_asks_nobody_for_another_password(
    orders: Rotated, aws: FaultyAws, start: Starts
) -> None:
    process = await start(max_age=3600)
    assert await process.request()
    await orders.postgres.stop()
    try:
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises((NoDatabase, DBAPIError)):
                await process.request()
        with pytest.raises(NoDatabase) as refused:
            await process.request()
        assert refused.value.reason is Reason.DATABASE_UNAVAILABLE
        assert await check(process.engine) == "database_unavailable"
        assert aws.count("GetSecretValue", since=began) == 0
        assert process.secret.status()["state"] == "serving"
    finally:
        await orders.postgres.start()

    assert await until_request(process)


async def test_a_database_with_another_authority_is_reached_when_its_ca_file_follows(
    orders: Rotated, start: Starts
) -> None:
    """The file is read at each new connection: no restart, no signal."""
    process = await start()
    assert await process.request()

    await orders.postgres.rotate_authority()  # certificate and CA file are exchanged
    await process.engine.dispose()

    assert await process.request()


async def test_everything_down_at_once_comes_back_in_any_order(
    orders: Rotated, aws: FaultyAws, start: Starts
) -> None:
    assert await (await start()).request()
    await aws.stop()
    await orders.postgres.stop()
    try:
        process = await start()
        await process.until("failed")
        with pytest.raises(SecretError):
            await process.request()
    finally:
        await orders.postgres.start()
        await aws.start()

    assert await until_request(process, within=20)
    assert process.secret.status()["state"] == "serving"


# -- a rotation that is cut off


@pytest.mark.parametrize("reached", range(1, len(STEPS)))
async def test_a_rotation_that_is_stuck_fails_no_request(
    orders: Rotated, start: Starts, reached: int
) -> None:
    process = await start()
    async with load(process) as requests:
        token = await orders.rotate(steps=STEPS[:reached])
        await process.engine.dispose()
        await orders.postgres.end_sessions((await orders.value())["username"])
        await process.secret.refresh()
        await requests.more()
        # The sessions that we ended fail what they were doing, and nothing fails for want of a login.
        assert [failure for failure in requests.failures if "database_" in failure] == []
        await orders.give_up(token)
