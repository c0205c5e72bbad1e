"""The rotation function, deployed by CloudFormation and called through Lambda, against a real PostgreSQL.

The tests call the four steps as Secrets Manager does. Each begins with a database whose passwords are the
secret's, and leaves whatever state it likes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.session
import psycopg
import pytest
import pytest_asyncio
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from rotate_db_credentials import database
from rotate_db_credentials.rotation import Rotation
from rotate_db_credentials.secret import DatabaseSecret
from ztdev.aws.cloud import STACK_NAME, default_template

from .rotation import STEPS, Rotated, rotations

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rotation")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(state: Path) -> AsyncIterator[dict[str, Rotated]]:
    async with rotations(state) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def orders(both: dict[str, Rotated]) -> Rotated:
    await both["orders"].begin_anew()
    return both["orders"]


@pytest_asyncio.fixture(loop_scope="module")
async def payments(both: dict[str, Rotated]) -> Rotated:
    await both["payments"].begin_anew()
    return both["payments"]


# -- a whole rotation


async def test_a_rotation_replaces_user_and_password_and_leaves_the_old_login_working(
    orders: Rotated,
) -> None:
    before = await orders.value()
    before_version = next(v for v, labels in (await orders.stages()).items() if "AWSCURRENT" in labels)

    token = await orders.rotate()

    after = await orders.value()
    assert after["username"] == DatabaseSecret.from_json(json.dumps(before), "it").twin
    assert re.fullmatch("[A-Za-z0-9]{40}", after["password"])
    unchanged = {"engine", "host", "port", "dbname", "masterarn"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert set(after) == unchanged | {"username", "password"}
    assert await orders.login(after) == after["username"]
    assert await orders.login(before) == before["username"]
    stages = await orders.stages()
    assert stages[token] == ["AWSCURRENT"]
    assert stages[before_version] == ["AWSPREVIOUS"]


async def test_two_rotations_come_back_to_the_first_user_with_another_password(orders: Rotated) -> None:
    first = await orders.value()

    await orders.rotate()
    second = await orders.value()
    await orders.rotate()
    third = await orders.value()

    assert third["username"] == first["username"] != second["username"]
    assert len({value["password"] for value in (first, second, third)}) == 3
    assert await orders.login(third) == first["username"]
    assert await orders.login(second)
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        await orders.login(first)


async def test_each_service_is_rotated_by_its_own_function(both: dict[str, Rotated], orders: Rotated) -> None:
    await both["payments"].begin_anew()
    before = await orders.value()

    await both["payments"].rotate()

    assert await orders.value() == before
    assert await both["payments"].login(await both["payments"].value())


# -- cut off, and run again


@pytest.mark.parametrize("reached", range(len(STEPS)))
async def test_a_rotation_cut_off_between_steps_harms_nobody_and_goes_on(
    orders: Rotated, reached: int
) -> None:
    before = await orders.value()
    token = await orders.begin()
    await orders.rotate(token, STEPS[:reached])

    assert await orders.value() == before
    assert await orders.login(before)
    await orders.rotate(token)  # Secrets Manager begins with the first step again

    assert (await orders.stages())[token] == ["AWSCURRENT"]
    assert await orders.login(await orders.value())


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_is_run_twice_does_no_more_than_once(orders: Rotated, step: str) -> None:
    token = await orders.begin()
    reached = STEPS.index(step) + 1
    await orders.rotate(token, STEPS[:reached])
    stage = "AWSCURRENT" if step == "finishSecret" else "AWSPENDING"
    value, stages = await orders.value(stage), await orders.stages()

    await orders.step(step, token)

    assert await orders.value(stage) == value
    assert await orders.stages() == stages
    await orders.rotate(token, STEPS[reached:])
    assert await orders.login(await orders.value())


async def test_every_step_after_the_last_changes_nothing(orders: Rotated) -> None:
    token = await orders.rotate()
    value, stages = await orders.value(), await orders.stages()

    await orders.rotate(token)

    assert (await orders.value(), await orders.stages()) == (value, stages)
    assert await orders.login(value)


class CutOff(Exception):
    """The process ends here."""


class Dying:
    """Secrets Manager as the function sees it, until the call after which the function dies."""

    def __init__(self, client: Any, operation: str, before: bool) -> None:
        self._client, self._operation, self._before = client, operation, before

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def call(**parameters: Any) -> Any:
            if operation == self._operation and self._before:
                raise CutOff
            answer = getattr(self._client, operation)(**parameters)
            if operation == self._operation:
                raise CutOff
            return answer

        return call


@pytest.mark.parametrize(
    ("step", "operation", "before"),
    [
        ("createSecret", "get_random_password", False),
        ("createSecret", "put_secret_value", True),
        ("createSecret", "put_secret_value", False),
        ("setSecret", "get_secret_value", False),
        ("finishSecret", "update_secret_version_stage", True),
        ("finishSecret", "update_secret_version_stage", False),  # AWSCURRENT moved, AWSPENDING still there
    ],
)
async def test_a_step_that_dies_at_a_call_to_aws_is_run_again(
    orders: Rotated, step: str, operation: str, before: bool
) -> None:
    token = await orders.begin()
    await orders.rotate(token, STEPS[: STEPS.index(step)])
    client = Dying(orders.client("secretsmanager"), operation, before)
    with pytest.raises(CutOff):
        await asyncio.to_thread(Rotation(client, orders.secret_id, token, orders.postgres.ca_file).run, step)

    assert await orders.login(await orders.value())
    await orders.rotate(token)

    assert (await orders.stages())[token] == ["AWSCURRENT"]
    assert await orders.login(await orders.value())


async def test_a_value_that_was_put_before_the_step_died_is_kept(orders: Rotated) -> None:
    token = await orders.begin()
    client = Dying(orders.client("secretsmanager"), "put_secret_value", before=False)
    with pytest.raises(CutOff):
        await asyncio.to_thread(
            Rotation(client, orders.secret_id, token, orders.postgres.ca_file).run, "createSecret"
        )
    put = await orders.value("AWSPENDING")

    await orders.rotate(token)

    assert await orders.value() == put


async def test_a_step_that_died_after_it_changed_the_password_is_run_again(
    orders: Rotated, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await orders.rotate(None, ("createSecret",))
    real = database.set_password

    def die_afterwards(connection: database.Connection, secret: DatabaseSecret) -> None:
        real(connection, secret)
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(database, "set_password", die_afterwards)
        client = orders.client("secretsmanager")
        with pytest.raises(CutOff):
            await asyncio.to_thread(
                Rotation(client, orders.secret_id, token, orders.postgres.ca_file).run, "setSecret"
            )
    assert await orders.login(await orders.value("AWSPENDING"))
    assert await orders.login(await orders.value())

    await orders.rotate(token)

    assert await orders.login(await orders.value())


async def test_two_runs_of_a_rotation_at_once_agree(orders: Rotated) -> None:
    token = await orders.begin()

    for step in STEPS:
        done = await asyncio.gather(*(orders.invoke(step, token) for _ in range(3)))
        # Only a step that AWS refused because another run was quicker may fail, and not for good.
        assert {one.reason for one in done} <= {None, "aws_refused", "version_not_pending"}
        assert any(one.error is None for one in done)

    await orders.step("finishSecret", token)
    assert (await orders.stages())[token] == ["AWSCURRENT"]
    assert await orders.login(await orders.value())


async def test_a_rotation_that_was_given_up_is_followed_by_a_new_one(orders: Rotated) -> None:
    stuck = await orders.rotate(None, STEPS[:2])
    with pytest.raises(ClientError, match="not complete"):
        await orders.begin()
    await orders.give_up(stuck)

    token = await orders.rotate()

    assert (await orders.stages())[token] == ["AWSCURRENT"]
    assert await orders.login(await orders.value())
    assert (await orders.invoke("finishSecret", stuck)).reason in ("version_unknown", "version_not_pending")


# -- whose event it is


async def test_only_a_pending_version_of_a_secret_that_is_rotated_is_worked_on(orders: Rotated) -> None:
    previous = next(version for version, labels in (await orders.stages()).items() if "AWSCURRENT" in labels)
    token = await orders.rotate()
    assert (await orders.stages())[previous] == ["AWSPREVIOUS"]
    value, stages = await orders.value(), await orders.stages()

    for step in STEPS:
        assert (await orders.invoke(step, secrets.token_hex(16))).reason == "version_unknown"
        assert (await orders.invoke(step, previous)).reason == "version_not_pending"

    assert (await orders.value(), await orders.stages()) == (value, stages)
    assert token in stages


async def test_a_secret_that_is_not_set_up_for_rotation_is_left_alone(
    state: Path, both: dict[str, Rotated]
) -> None:
    """A secret made beside the stack: DescribeSecret says nothing of a rotation."""
    orders = both["orders"]
    secret = await asyncio.to_thread(
        orders.client("secretsmanager").create_secret,
        Name="zt-demo/another/db",
        SecretString=json.dumps(await orders.value()),
    )
    token = secrets.token_hex(16)
    client = orders.client("secretsmanager")
    await asyncio.to_thread(
        client.put_secret_value,
        SecretId=secret["ARN"],
        ClientRequestToken=token,
        SecretString="{}",
        VersionStages=["AWSPENDING"],
    )
    rotation = Rotation(client, secret["ARN"], token, orders.postgres.ca_file)

    for step in STEPS:
        with pytest.raises(Exception, match="rotation_not_enabled"):
            await asyncio.to_thread(rotation.run, step)


async def test_another_services_secret_is_out_of_reach(orders: Rotated, payments: Rotated) -> None:
    token = await payments.begin()

    for step in STEPS:
        refused = await orders.invoke(step, token, SecretId=payments.secret_id)
        assert refused.error == "aws_refused: describe_secret: AccessDeniedException"

    await payments.rotate(token)


@pytest.mark.parametrize(
    "changes",
    [
        {"Step": "dropSecret"},
        {"Step": "_stages"},
        {"Step": None},
        {"Step": ["createSecret"]},
        {"SecretId": ""},
        {"ClientRequestToken": 1},
    ],
)
async def test_what_is_no_event_of_secrets_manager_is_refused(
    orders: Rotated, changes: dict[str, Any]
) -> None:
    token = await orders.begin()
    await orders.step("createSecret", token)
    value = await orders.value("AWSPENDING")

    refused = await orders.invoke("createSecret", token, **changes)

    assert refused.reason == "event_malformed"
    assert await orders.value("AWSPENDING") == value


# -- trouble


async def test_a_password_that_was_withdrawn_early_is_healed_by_the_next_rotation(orders: Rotated) -> None:
    current = await orders.value()
    await orders.postgres.set_password(current["username"], secrets.token_hex(20))
    with pytest.raises(psycopg.OperationalError):
        await orders.login(current)

    await orders.rotate()

    assert await orders.login(await orders.value())


async def test_a_pending_password_that_was_changed_behind_its_back_is_not_promoted(orders: Rotated) -> None:
    before = await orders.value()
    token = await orders.rotate(None, STEPS[:2])
    pending = await orders.value("AWSPENDING")
    await orders.postgres.set_password(pending["username"], secrets.token_hex(20))

    for step in ("testSecret", "finishSecret"):
        assert (await orders.invoke(step, token)).reason == "login_refused"

    assert await orders.value() == before
    await orders.rotate(token)
    assert await orders.value() == pending
    assert await orders.login(pending)


async def test_while_the_database_is_down_nothing_is_promoted_and_the_next_try_works(orders: Rotated) -> None:
    before = await orders.value()
    token = await orders.rotate(None, ("createSecret",))
    await orders.postgres.stop()
    try:
        for step in STEPS[1:]:
            assert (await orders.invoke(step, token)).reason == "database_unavailable"
        assert await orders.value() == before
        assert (await orders.stages())[token] == ["AWSPENDING"]
    finally:
        await orders.postgres.start()

    await orders.rotate(token)

    assert await orders.login(await orders.value())


async def test_a_server_that_cannot_prove_its_name_gets_no_password(orders: Rotated) -> None:
    token = await orders.rotate(None, ("createSecret",))
    trusted = orders.postgres.ca_file.read_bytes()
    await orders.postgres.rotate_authority()
    rotated = orders.postgres.ca_file.read_bytes()
    orders.postgres.ca_file.write_bytes(trusted)
    try:
        for step in STEPS[1:]:
            refused = await orders.invoke(step, token)
            assert refused.reason == "database_unavailable"
            assert "certificate verify failed" in str(refused.error)
        orders.postgres.ca_file.unlink()
        assert (await orders.invoke("setSecret", token)).reason == "ca_file_missing"
    finally:
        orders.postgres.ca_file.write_bytes(rotated)

    await orders.rotate(token)

    assert await orders.login(await orders.value())


async def test_a_twin_without_the_roles_of_the_other_is_not_promoted(orders: Rotated) -> None:
    before = await orders.value()
    token = await orders.rotate(None, STEPS[:2])
    twin = (await orders.value("AWSPENDING"))["username"]
    async with orders.postgres.administrator() as administrator:
        await administrator.execute(f"REVOKE orders_rw FROM {twin}")  # type: ignore[call-overload]
    try:
        for step in ("testSecret", "finishSecret"):
            refused = await orders.invoke(step, token)
            assert refused.reason == "grants_missing"
            assert "orders_rw" in str(refused.error)
        assert await orders.value() == before
    finally:
        await orders.postgres.ensure_service("orders")

    await orders.rotate(token)

    assert await orders.login(await orders.value())


async def restore(rotated: Rotated, value: dict[str, Any]) -> None:
    await rotated.put(value, "AWSCURRENT", secrets.token_hex(16))


@pytest.mark.parametrize(
    "fault",
    [
        *({name: None} for name in ("engine", "host", "port", "dbname", "username", "password", "masterarn")),
        {"engine": "mysql"},
        {"port": "5432x"},
        {"port": 0},
        {"port": True},
        {"username": 'orders_app"; DROP'},
        {"username": ""},
        {"username": "a" * 60},
        {"password": 7},
        {"host": "/var/run/postgresql"},
        {"dbname": "orders host=elsewhere"},
    ],
    ids=str,
)
async def test_a_malformed_secret_is_refused_by_name_and_never_promoted(
    orders: Rotated, fault: dict[str, Any]
) -> None:
    good = await orders.value()
    await restore(orders, {name: value for name, value in (good | fault).items() if value is not None})
    current = await orders.value()
    try:
        token = await orders.begin()
        refused = await orders.invoke("createSecret", token)
        if refused.error is None:  # only setSecret needs it
            refused = await orders.invoke("setSecret", token)
        assert refused.reason == "secret_malformed"
        assert set(fault) & set(re.findall(r"\w+", str(refused.error)))
        for step in STEPS[2:]:
            assert (await orders.invoke(step, token)).error is not None
        assert await orders.value() == current
        await orders.give_up(token)
    finally:
        await restore(orders, good)

    await orders.rotate()

    assert await orders.login(await orders.value())


@pytest.mark.parametrize("text", ["CANARY-not-json", '["CANARY"]', '"CANARY"', "CANARY{"])
async def test_a_secret_that_is_no_json_object_is_not_quoted(orders: Rotated, text: str) -> None:
    good = await orders.value()
    await orders.put(text, "AWSCURRENT", secrets.token_hex(16))
    token = await orders.begin()
    try:
        refused = await orders.invoke("createSecret", token)
    finally:
        await orders.give_up(token)
        await restore(orders, good)

    assert refused.reason == "secret_malformed"
    assert "CANARY" not in f"{refused.error}{refused.log}"


@pytest.mark.parametrize("member", ["host", "port", "dbname", "username", "masterarn"])
async def test_a_pending_version_for_another_database_or_user_is_refused(
    orders: Rotated, member: str
) -> None:
    current = await orders.value()
    pending = DatabaseSecret.from_json(json.dumps(current), "it").for_twin("x" * 40)
    other = {
        "host": "localhost",
        "port": 1,
        "dbname": "payments",
        "username": "orders_owner",
        "masterarn": "x",
    }
    token = await orders.begin()
    await orders.put(json.loads(pending.to_json()) | {member: other[member]}, "AWSPENDING", token)

    for step in STEPS:
        assert (await orders.invoke(step, token)).reason == "secrets_disagree"

    assert await orders.value() == current


async def test_a_secret_cannot_send_the_rotation_login_to_another_server(orders: Rotated) -> None:
    """Whoever may write the secret does not get the rotator's login by naming another host."""
    good = await orders.value()
    await restore(orders, good | {"host": "localhost"})
    token = await orders.begin()
    try:
        await orders.step("createSecret", token)
        refused = await orders.invoke("setSecret", token)
    finally:
        await orders.give_up(token)
        await restore(orders, good)

    assert refused.reason == "secrets_disagree"


async def test_a_secret_cannot_name_another_login_to_set_passwords_with(orders: Rotated) -> None:
    good = await orders.value()
    owner = orders.cloud.outputs["OrdersOwnerSecretArn"]
    await restore(orders, good | {"masterarn": owner})
    token = await orders.begin()
    try:
        await orders.step("createSecret", token)
        refused = await orders.invoke("setSecret", token)
    finally:
        await orders.give_up(token)
        await restore(orders, good)

    assert refused.error == "aws_refused: get_secret_value: AccessDeniedException"


async def test_the_trial_of_a_schedule_passes_when_the_current_login_works(orders: Rotated) -> None:
    """Secrets Manager tries testSecret with a copy when a schedule is set up; a copy is not a rotation."""
    current = await orders.value()
    token = await orders.begin()
    await orders.put(current, "AWSPENDING", token)

    assert (await orders.invoke("testSecret", token)).error is None
    assert (await orders.invoke("setSecret", token)).reason == "secrets_disagree"

    await orders.postgres.set_password(current["username"], secrets.token_hex(20))
    assert (await orders.invoke("testSecret", token)).reason == "login_refused"


# -- the rotation login


@contextmanager
def rotator(orders: Rotated, password: str) -> Iterator[psycopg.Connection[Any]]:
    with orders.connect("orders_rotator", password) as connection:
        yield connection


@pytest_asyncio.fixture(loop_scope="module")
async def rotator_password(orders: Rotated) -> str:
    answer = await orders.secrets_manager("get_secret_value", SecretId=orders.rotator_id)
    password: str = json.loads(answer["SecretString"])["password"]
    return password


def verifier(connection: psycopg.Connection[Any], user: str, password: str) -> str:
    return connection.pgconn.encrypt_password(password.encode(), user.encode(), b"scram-sha-256").decode()


SET = "SELECT rotation.set_password(%s, %s)"


async def test_the_rotation_login_sets_the_passwords_of_the_twins_and_of_nobody_else(
    orders: Rotated, rotator_password: str
) -> None:
    with rotator(orders, rotator_password) as connection:
        for twin in ("orders_app", "orders_app_clone"):
            new = secrets.token_hex(20)
            connection.execute(SET, [twin, verifier(connection, twin, new)])
            assert await orders.login({"username": twin, "password": new}) == twin

        for other in (
            "orders_owner",
            "orders_rotator",
            "orders_passwords",
            "orders_rw",
            "payments_app",
            "postgres",
            "nobody",
            "",
            None,
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(SET, [other, verifier(connection, "x", "x")])


async def test_passwords_that_are_set_at_once_take_their_turn(orders: Rotated, rotator_password: str) -> None:
    def set_some() -> None:
        with rotator(orders, rotator_password) as connection:
            for _ in range(30):
                connection.execute(SET, ["orders_app_clone", verifier(connection, "orders_app_clone", "x")])

    await asyncio.gather(*(asyncio.to_thread(set_some) for _ in range(4)))

    assert await orders.login({"username": "orders_app_clone", "password": "x"}) == "orders_app_clone"


@pytest.mark.parametrize(
    "bad", ["", None, "a password", "md5" + "0" * 32, "SCRAM-SHA-256$4096:x", "{v}'", "{v}\n"]
)
async def test_only_a_scram_verifier_can_be_set(
    orders: Rotated, rotator_password: str, bad: str | None
) -> None:
    value = await orders.value()
    with rotator(orders, rotator_password) as connection:
        good = verifier(connection, "orders_app", "x")
        connection.execute(SET, ["orders_app_clone", verifier(connection, "orders_app_clone", "x")])

        with pytest.raises(psycopg.errors.InvalidParameterValue):
            connection.execute(SET, [value["username"], bad.replace("{v}", good) if bad else bad])


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM public.things",
        "INSERT INTO public.things DEFAULT VALUES",
        "SELECT rolpassword FROM pg_authid",
        "SET ROLE orders_app",
        "SET ROLE orders_app_clone",
        "SET ROLE orders_owner",
        "SET ROLE orders_passwords",
        "SET SESSION AUTHORIZATION orders_app",
        "ALTER ROLE orders_app PASSWORD 'x'",
        "ALTER ROLE orders_app NOLOGIN",
        "ALTER ROLE orders_app VALID UNTIL '2000-01-01'",
        "ALTER ROLE orders_app RENAME TO other",
        "ALTER ROLE orders_app SET search_path = x",
        "DROP ROLE orders_app_clone",
        "GRANT orders_app TO orders_rotator WITH INHERIT TRUE, SET TRUE",
        "GRANT orders_rw TO orders_rotator",
        "GRANT orders_passwords TO orders_rotator",
        "CREATE ROLE mine",
        "CREATE DATABASE mine",
        "CREATE SCHEMA mine",
        "CREATE TABLE public.mine (id int)",
        "CREATE TABLE rotation.mine (id int)",
        "CREATE TEMPORARY TABLE mine (id int)",
        "CREATE OR REPLACE FUNCTION rotation.set_password(text, text) RETURNS void LANGUAGE sql AS ''",
        "DROP FUNCTION rotation.set_password",
        "SELECT pg_read_file('/etc/passwd')",
    ],
)
async def test_the_rotation_login_can_do_nothing_else(
    orders: Rotated, rotator_password: str, statement: str
) -> None:
    with rotator(orders, rotator_password) as connection:
        connection.execute(SET, ["orders_app_clone", verifier(connection, "orders_app_clone", "x")])

        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)  # type: ignore[call-overload]


@pytest.mark.parametrize("login", ["orders_app", "orders_owner"])
async def test_no_other_login_sets_passwords(orders: Rotated, login: str) -> None:
    await orders.postgres.set_password(login, "theirs")
    with orders.connect(login, "theirs") as connection:
        connection.execute("SELECT count(*) FROM things")

        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(SET, ["orders_app_clone", verifier(connection, "orders_app_clone", "x")])


async def test_the_rotation_login_does_not_reach_the_other_database(
    orders: Rotated, rotator_password: str
) -> None:
    with rotator(orders, rotator_password):
        pass

    with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
        orders.connect("orders_rotator", rotator_password, dbname="payments")


async def test_no_role_can_become_the_one_that_alters(orders: Rotated) -> None:
    async with orders.postgres.administrator() as connection:
        cursor = await connection.execute(
            "SELECT rolcanlogin, rolsuper, rolcreaterole,"
            " (SELECT count(*) FROM pg_auth_members WHERE roleid = pg_roles.oid)"
            " FROM pg_roles WHERE rolname = 'orders_passwords'"
        )
        assert await cursor.fetchone() == (False, False, True, 0)
        cursor = await connection.execute(
            "SELECT roleid::regrole::text, admin_option, inherit_option, set_option FROM pg_auth_members"
            " WHERE member = 'orders_passwords'::regrole ORDER BY 1"
        )
        assert await cursor.fetchall() == [
            ("orders_app", True, False, False),
            ("orders_app_clone", True, False, False),
        ]


# -- who may call it, and what it may call


async def test_a_service_cannot_call_the_function(orders: Rotated) -> None:
    assert (await orders.invoke("testSecret", await orders.begin())).reason == "version_not_pending"
    token = orders.cloud._issuer.token("zt-demo", "orders")
    session = botocore.session.Session()
    anonymous = session.create_client(
        "sts",
        region_name=orders.cloud.region,
        endpoint_url=orders.cloud.endpoint_url,
        config=Config(signature_version=UNSIGNED),
    )
    answer = await asyncio.to_thread(
        anonymous.assume_role_with_web_identity,
        RoleArn=orders.cloud.role_arn("orders"),
        RoleSessionName="test",
        WebIdentityToken=token,
    )
    keys = answer["Credentials"]
    service = session.create_client(
        "lambda",
        region_name=orders.cloud.region,
        endpoint_url=orders.cloud.endpoint_url,
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["SessionToken"],
    )

    with pytest.raises(ClientError, match="AccessDenied"):
        await asyncio.to_thread(service.invoke, FunctionName="zt-demo-rotate-orders", Payload=b"{}")


async def test_the_functions_credentials_cannot_be_computed(orders: Rotated) -> None:
    """The emulator alone makes them out of the names of the function and its role, which are no secret."""
    await orders.rotate()
    role = f"arn:aws:iam::{orders.cloud.account_id}:role/zt-demo-rotate-orders"
    digest = hashlib.sha256(f"{orders.function}:{role}".encode()).hexdigest()
    client = botocore.session.Session().create_client(
        "secretsmanager",
        region_name=orders.cloud.region,
        endpoint_url=orders.cloud.endpoint_url,
        aws_access_key_id=f"ASIA{digest[:16].upper()}",
        aws_secret_access_key=hashlib.sha256(f"secret:{digest}".encode()).hexdigest(),
        aws_session_token=hashlib.sha256(f"token:{digest}".encode()).hexdigest(),
    )

    with pytest.raises(ClientError, match=r"UnrecognizedClientException|InvalidClientTokenId"):
        await asyncio.to_thread(client.get_secret_value, SecretId=orders.secret_id)


@pytest.mark.parametrize(
    ("operation", "parameters"),
    [
        ("list_functions", {}),
        ("create_function", {"FunctionName": "f", "Role": "r", "Code": {"ZipFile": b"x"}}),
        ("update_function_code", {"FunctionName": "zt-demo-rotate-orders", "ZipFile": b"x"}),
        ("invoke", {"FunctionName": "zt-demo-rotate-orders", "InvocationType": "Event"}),
        ("invoke", {"FunctionName": "zt-demo-rotate-orders", "Qualifier": "1"}),
        (
            "invoke",
            {"FunctionName": "arn:aws:lambda:eu-central-1:111122223333:function:zt-demo-rotate-orders"},
        ),
    ],
)
async def test_of_lambda_only_the_call_by_name_is_served(
    orders: Rotated, operation: str, parameters: dict[str, Any]
) -> None:
    assert (await orders.invoke("testSecret", secrets.token_hex(16))).error
    call = getattr(orders.client("lambda"), operation)

    with pytest.raises(ClientError) as refused:
        await asyncio.to_thread(call, **parameters)

    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403)


# -- the stack


async def test_an_update_of_the_stack_reaches_the_function_and_keeps_the_secrets(
    orders: Rotated, tmp_path: Path
) -> None:
    await orders.rotate()
    before = await orders.value()
    moved = tmp_path / "ca.pem"
    cloudformation = orders.client("cloudformation")

    async def update(ca_file: Path) -> None:
        changed = orders.cloud._parameters() | {"RotationCaFile": str(ca_file)}
        await asyncio.to_thread(
            cloudformation.update_stack,
            StackName=STACK_NAME,
            UsePreviousTemplate=True,
            Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in changed.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        async with asyncio.timeout(30):
            while await status() != "UPDATE_COMPLETE":
                await asyncio.sleep(0.05)

    async def status() -> str:
        answer = await asyncio.to_thread(cloudformation.describe_stacks, StackName=STACK_NAME)
        state: str = answer["Stacks"][0]["StackStatus"]
        assert state in ("UPDATE_IN_PROGRESS", "UPDATE_COMPLETE", "UPDATE_COMPLETE_CLEANUP_IN_PROGRESS")
        return state

    await update(moved)
    try:
        token = await orders.rotate(None, ("createSecret",))
        refused = await orders.invoke("setSecret", token)
        assert refused.error == f"ca_file_missing: {moved} does not exist"
        moved.write_bytes(orders.postgres.ca_file.read_bytes())
        await orders.rotate(token)
    finally:
        await update(orders.postgres.ca_file)

    assert await orders.value("AWSPREVIOUS") == before
    assert await orders.login(await orders.value())


async def test_a_stack_whose_package_is_missing_is_refused(state: Path, both: dict[str, Rotated]) -> None:
    cloud = both["orders"].cloud
    cloudformation = cloud.admin_client("cloudformation")
    changed = cloud._parameters() | {"RotationPackageKey": "no-such.zip", "NamePrefix": "another"}
    await asyncio.to_thread(
        cloudformation.create_stack,
        StackName="another",
        TemplateBody=default_template().read_text(),
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in changed.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )

    async with asyncio.timeout(30):
        while True:
            answer = await asyncio.to_thread(cloudformation.describe_stacks, StackName="another")
            if not answer["Stacks"][0]["StackStatus"].endswith("IN_PROGRESS"):
                break
            await asyncio.sleep(0.05)

    assert answer["Stacks"][0]["StackStatus"] == "ROLLBACK_COMPLETE"
    events = await asyncio.to_thread(cloudformation.describe_stack_events, StackName="another")
    assert "there is no package no-such.zip" in str(events["StackEvents"])
    await asyncio.to_thread(cloudformation.delete_stack, StackName="another")


# -- versions in the stand-in are AWS's


async def test_a_rotation_begins_with_an_empty_version(orders: Rotated) -> None:
    token = await orders.begin()

    assert (await orders.stages())[token] == ["AWSPENDING"]
    for which in ({"VersionStage": "AWSPENDING"}, {"VersionId": token}):
        with pytest.raises(ClientError, match="ResourceNotFoundException"):
            await orders.secrets_manager("get_secret_value", **which)


async def test_the_dates_of_rotation_are_told(orders: Rotated) -> None:
    began = time.time()
    await orders.rotate()
    told = await orders.secrets_manager("describe_secret")
    assert began <= told["LastRotatedDate"].timestamp() <= time.time()
    assert began <= told["NextRotationDate"].timestamp() - 86400 <= time.time()

    # The stand-in does not compute this one.
    rules = {"ScheduleExpression": "cron(0 4 * * ? *)"}
    await orders.secrets_manager("rotate_secret", RotateImmediately=False, RotationRules=rules)
    later = await orders.secrets_manager("describe_secret")
    assert "NextRotationDate" not in later
    assert later["LastRotatedDate"] == told["LastRotatedDate"]


async def test_a_version_keeps_its_value(orders: Rotated) -> None:
    token = await orders.begin()
    await orders.put({"a": 1}, "AWSPENDING", token)
    await orders.put({"a": 1}, "AWSPENDING", token)

    with pytest.raises(ClientError, match="ResourceExistsException"):
        await orders.put({"a": 2}, "AWSPENDING", token)

    assert await orders.value("AWSPENDING") == {"a": 1}


async def test_a_version_is_not_read_under_a_label_that_it_does_not_have(orders: Rotated) -> None:
    token = await orders.rotate()
    which = {"VersionId": token, "VersionStage": "AWSCURRENT"}
    assert await orders.secrets_manager("get_secret_value", **which)

    with pytest.raises(ClientError, match="InvalidRequestException"):
        await orders.secrets_manager("get_secret_value", **which | {"VersionStage": "AWSPREVIOUS"})


async def test_a_secret_without_a_function_is_not_rotated(orders: Rotated) -> None:
    assert await orders.begin()

    with pytest.raises(ClientError, match="InvalidRequestException"):
        await orders.secrets_manager("rotate_secret", SecretId=orders.rotator_id)


# -- nothing secret is told


async def test_no_password_is_in_any_log_or_answer(state: Path, both: dict[str, Rotated]) -> None:
    """Last: the logs of all tests before, and every password they read."""
    for rotated in both.values():
        await rotated.begin_anew()
        await rotated.rotate()
    told = "\n".join(text for rotated in both.values() for text in rotated.logs)
    told += (state / "postgres.log").read_text(errors="replace")
    told += (state / "aws.log").read_text(errors="replace")
    assert "set the password of orders_app" in told
    assert "orders_rotator@orders" in told

    passwords = set()
    for rotated in both.values():
        await rotated.value()
        passwords |= rotated.passwords
        answer = await rotated.secrets_manager("get_secret_value", SecretId=rotated.rotator_id)
        passwords.add(json.loads(answer["SecretString"])["password"])
    assert len(passwords) >= 4
    assert not [password for password in passwords if password in told]
    assert "SCRAM-SHA-256$" not in told
    assert "PASSWORD" not in told
