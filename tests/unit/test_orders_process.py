"""orders as a program: its settings and its command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import environment as own_environment

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    for name in ("ca.pem", "token"):
        (tmp_path / name).write_text("-")
    environment = {
        "SPIFFE_ENDPOINT_SOCKET": f"unix:{tmp_path}/agent.sock",
        "SPIFFE_ID": "spiffe://zt.example/ns/zt-demo/sa/orders",
        "PORT": "8443",
        "PROBE_PORT": "8080",
        "PAYMENTS_URL": "https://127.0.0.1:9443",
        "PAYMENTS_SPIFFE_ID": "spiffe://zt.example/ns/zt-demo/sa/payments",
        "DB_HOST": "127.0.0.1",
        "DB_NAME": "orders",
        "DB_CA_FILE": str(tmp_path / "ca.pem"),
        "DB_SECRET_ID": "zt-demo/orders/db",
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/zt-demo-orders",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
        "AWS_REGION": "eu-central-1",
    }

    def run(*arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        told = {name: value for name, value in (environment | changes).items() if value is not None}
        return subprocess.run(
            [sys.executable, "-m", "orders", *arguments],
            env=own_environment(**told),
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def _faults(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 78
    return sorted(line.partition(":")[0] for line in done.stderr.splitlines())


def test_help_names_the_commands(run: Run) -> None:
    done = run("--help", PORT=None)

    assert done.returncode == 0
    assert "migrate" in done.stdout


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9443", "https://127.0.0.1:9443/x", "https://a@b", "payments"]
)
def test_payments_is_reached_by_https_alone(run: Run, url: str) -> None:
    assert _faults(run(PAYMENTS_URL=url)) == ["PAYMENTS_URL"]


def test_payments_must_be_expected_to_be_a_workload(run: Run) -> None:
    assert _faults(run(PAYMENTS_SPIFFE_ID="spiffe://zt.example", DB_SECRET_ID="")) == [
        "DB_SECRET_ID",
        "PAYMENTS_SPIFFE_ID",
    ]


def test_migrating_needs_no_identity(run: Run) -> None:
    done = run("migrate", SPIFFE_ENDPOINT_SOCKET=None, SPIFFE_ID=None, PAYMENTS_URL=None, DB_NAME=None)

    assert _faults(done) == ["DB_NAME"]
