"""payments as a program: its settings, its command line, and what it waits for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from payments.migrations import MIGRATIONS
from payments.settings import Settings
from tests.processes import environment as own_environment
from ztmtls.database import NoDatabase
from ztmtls.lifecycle import StartupTimeout, wait_for
from ztmtls.migrations import DatabaseHealth
from ztmtls.reasons import Reason
from ztmtls.settings import MigrationSettings, load
from ztmtls.transactions import Database

NEWEST = MIGRATIONS.revisions()[0]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name in ("ca.pem", "token"):
        (tmp_path / name).write_text("-")
    return {
        "SPIFFE_ENDPOINT_SOCKET": f"unix:{tmp_path}/agent.sock",
        "SPIFFE_ID": "spiffe://zt.example/ns/zt-demo/sa/payments",
        "PORT": "8443",
        "PROBE_PORT": "8080",
        "DB_HOST": "127.0.0.1",
        "DB_NAME": "payments",
        "DB_CA_FILE": str(tmp_path / "ca.pem"),
        "DB_SECRET_ID": "zt-demo/payments/db",
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/zt-demo-payments",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
        "AWS_REGION": "eu-central-1",
    }


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    def run(*arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        told = {name: value for name, value in (environment | changes).items() if value is not None}
        return subprocess.run(
            [sys.executable, "-m", "payments", *arguments],
            env=own_environment(**told),
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def test_settings_come_from_the_environment(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    settings = load(Settings)
    migration = load(MigrationSettings)

    assert (settings.port, settings.db_port, settings.charge_limit) == (8443, 5432, 500_000)
    assert settings.policy_file.is_file()
    assert (migration.db_secret_id, migration.startup_timeout_seconds) == ("zt-demo/payments/db", 0)


def test_help_names_the_commands(run: Run) -> None:
    done = run("--help", PORT=None)

    assert done.returncode == 0
    assert "migrate" in done.stdout


def test_each_wrong_setting_is_one_line(run: Run) -> None:
    done = run(PORT=None, DB_CA_FILE="/nowhere/ca.pem", SPIFFE_ID="payments", CHARGE_LIMIT="-5")

    assert done.returncode == 78
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "CHARGE_LIMIT",
        "DB_CA_FILE",
        "PORT",
        "SPIFFE_ID",
    ]


def test_migrating_needs_no_identity(run: Run) -> None:
    done = run(
        "migrate", SPIFFE_ENDPOINT_SOCKET=None, SPIFFE_ID=None, PORT=None, PROBE_PORT=None, DB_NAME=None
    )

    assert done.returncode == 78
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["DB_NAME"]


def test_static_keys_beside_the_web_identity_stop_the_start(run: Run) -> None:
    done = run(AWS_ACCESS_KEY_ID="AKIAEXAMPLE", AWS_SECRET_ACCESS_KEY="CANARY")

    assert done.returncode == 1
    assert done.stderr.startswith("web_identity_conflict: ")
    assert "CANARY" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_without_an_aws_identity_nothing_is_started(run: Run, command: str) -> None:
    """Never with the node's role, whatever else the environment would lead an SDK to."""
    done = run(command, AWS_ROLE_ARN=None, AWS_WEB_IDENTITY_TOKEN_FILE=None)

    assert done.returncode == 1
    assert done.stderr.startswith("web_identity_missing: IRSA was not injected")


class FakeDatabase:
    """Answers the question for the schema's revision, or fails."""

    def __init__(self, *answers: str | Exception | None) -> None:
        self.answers = list(answers)

    async def run(self, work: Any) -> str | None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def _health(*answers: str | Exception | None) -> DatabaseHealth:
    return DatabaseHealth(cast(Database, FakeDatabase(*answers)), MIGRATIONS)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (NEWEST, None),
        ("9999", None),
        (None, f"migrations are pending: the schema is at None, this code needs {NEWEST}"),
        (NoDatabase(Reason.DATABASE_UNAVAILABLE, "away"), "database_unavailable"),
        (NoDatabase(Reason.SECRET_DENIED, "no"), "secret_denied"),
    ],
)
async def test_health_says_what_is_wrong(answer: str | Exception | None, fault: str | None) -> None:
    assert await _health(answer).check() == fault


async def test_health_does_not_ask_twice_in_a_moment() -> None:
    database = FakeDatabase(NEWEST, RuntimeError("asked again"))
    health = DatabaseHealth(cast(Database, database), MIGRATIONS)

    assert await asyncio.gather(*(health.check() for _ in range(5))) == [None] * 5


async def test_waiting_ends_when_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    answers = ["no database", "no database", None]

    async def check() -> str | None:
        return answers.pop(0)

    await wait_for(check, timeout=10)

    assert [record.getMessage() for record in caplog.records] == ["waiting: no database"]


async def test_waiting_gives_up_with_the_reason() -> None:
    async def check() -> str | None:
        return "migrations are pending"

    with pytest.raises(StartupTimeout, match=r"after 0\.05 s: migrations are pending"):
        await wait_for(check, timeout=0.05)
