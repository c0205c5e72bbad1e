"""`ztdev rotate`, on a whole stack: what it says, who follows, and that a rotation cut off harms nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from ztdev import rotation
from ztdev.options import DATABASE_SERVICES, StackOptions
from ztdev.rotation import STEPS
from ztdev.shop import Visitor
from ztdev.stack import BackgroundStack

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundStack]:
    """A stack whose services look for new versions every second; its schedule is far away."""
    options = StackOptions(
        state_dir=tmp_path_factory.mktemp("shop"),
        free_ports=True,
        rotate_every=3600,
        environment={service: {"DB_SECRET_MAX_AGE_SECONDS": "1"} for service in DATABASE_SERVICES},
    )
    with BackgroundStack(options) as running:
        yield running


def rotate(shop: BackgroundStack | None, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    where = ["--state", str(shop.options.state_dir)] if shop else []
    return subprocess.run(
        [sys.executable, "-m", "ztdev", "rotate", *map(str, arguments), *where],
        capture_output=True,
        text=True,
        timeout=60,
    )


def reported(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    answer: list[dict[str, Any]] = json.loads(done.stdout)["rotations"]
    return answer


def order(shop: BackgroundStack) -> dict[str, dict[str, Any]]:
    """Order through the page; the database uses by service."""
    with Visitor(shop.urls.page) as visitor:
        document = visitor.order()
    assert document["order"]["status"] == "paid"
    return {use["service"]: use for use in document["databases"]}


def test_rotate_says_what_it_did_and_the_services_follow(shop: BackgroundStack) -> None:
    before = order(shop)

    done = reported(rotate(shop, "--json"))

    assert [each["service"] for each in done] == list(DATABASE_SERVICES)
    for each in done:
        service, new = each["service"], each["after"]
        assert each["before"]["id"] == before[service]["secret_version"]
        assert each["before"]["user"] == before[service]["user"] != new["user"]
        line = shop.wait_for_audit(service, event="credentials", decision="allow", version=new["id"])
        assert line["previous_version"] == each["before"]["id"]
    after = order(shop)
    for each in done:
        use = after[each["service"]]
        assert (use["user"], use["secret_version"]) == (each["after"]["user"], each["after"]["id"])


def test_rotate_of_one_service_leaves_the_other_alone(shop: BackgroundStack) -> None:
    [done] = reported(rotate(shop, "payments", "--json"))
    shop.wait_for_audit("payments", event="credentials", version=done["after"]["id"])

    told = rotate(shop, "payments")

    assert told.returncode == 0
    assert f"payments  {done['after']['user']} → {done['before']['user']}" in told.stdout
    assert f"version {done['after']['id'][:8]} → " in told.stdout
    assert order(shop)["orders"]["user"] == reported(rotate(shop, "orders", "--json"))[0]["before"]["user"]


@pytest.mark.parametrize("step", STEPS)
def test_rotate_cut_off_at_any_step_leaves_orders_paid_and_the_next_one_heals(
    shop: BackgroundStack, step: str
) -> None:
    [whole] = reported(rotate(shop, "payments", "--json"))
    shop.wait_for_audit("payments", event="credentials", version=whole["after"]["id"])
    assert order(shop)["payments"]["secret_version"] == whole["after"]["id"]

    told = rotate(shop, "payments", "--break", step)

    assert told.returncode == 0, told.stderr
    assert f"payments  cut off at {step}" in told.stdout
    assert f"still names {whole['after']['user']}" in told.stdout
    shop.run(shop.postgres.end_sessions(whole["after"]["user"]))  # new connections work, too
    assert order(shop)["payments"]["secret_version"] == whole["after"]["id"]
    [healed] = reported(rotate(shop, "payments", "--json"))
    assert healed["continued"]
    shop.wait_for_audit("payments", event="credentials", version=healed["after"]["id"])
    assert order(shop)["payments"]["secret_version"] == healed["after"]["id"]


def test_what_was_rotated_is_in_the_logs(shop: BackgroundStack) -> None:
    [done] = reported(rotate(shop, "orders", "--json"))

    logs = subprocess.run(
        [sys.executable, "-m", "ztdev", "logs", "rotation", "--state", str(shop.options.state_dir)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    version = f"(version {done['after']['id'][:8]})"
    told = [line for line in logs.stdout.splitlines() if version in line]
    assert f"setSecret done set the password of {done['after']['user']}" in "\n".join(told)
    assert told[-1].endswith(f"rotation orders rotated {done['after']['user']} {version}")


def test_a_rotation_that_fails_says_why(shop: BackgroundStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "FIRST_PAUSE", 0.05)
    assert rotate(shop, "orders").returncode == 0
    secret = shop.run(shop.cloud.secret_value("zt-demo/orders/db-rotator"))
    shop.run(shop.postgres.set_password("orders_rotator", "another"))
    try:
        refused = rotate(shop, "orders")
    finally:
        shop.run(shop.postgres.set_password("orders_rotator", secret["password"]))

    assert refused.returncode == 1
    assert "login_refused: orders_rotator at" in refused.stderr
    assert "given up" in refused.stderr
    assert order(shop)
    assert rotate(shop, "orders").returncode == 0


def test_wrong_use_and_no_stack_are_told_apart(shop: BackgroundStack, tmp_path: Path) -> None:
    assert rotate(shop, "payments").returncode == 0
    assert rotate(shop, "frontend").returncode == 2
    assert rotate(shop, "payments", "--break", "lunch").returncode == 2
    nobody = rotate(None, "payments", "--state", tmp_path)
    assert nobody.returncode == 3
    assert "No stack runs" in nobody.stderr


# -- by itself


def test_a_stack_on_a_schedule_rotates_by_itself_while_orders_are_paid(tmp_path: Path) -> None:
    options = StackOptions(state_dir=tmp_path / "state", free_ports=True, rotate_every=3)
    with BackgroundStack(options) as scheduled:
        seen: dict[str, set[str]] = {service: set() for service in DATABASE_SERVICES}
        deadline = time.monotonic() + 60
        while not all(len(versions) >= 3 for versions in seen.values()):
            assert time.monotonic() < deadline, seen
            for service, use in order(scheduled).items():
                seen[service].add(use["secret_version"])
        for service in DATABASE_SERVICES:
            audit = scheduled.audit(service)
            told = {line["version"] for line in audit if line["event"] == "credentials"}
            assert seen[service] <= told
            assert not [line for line in audit if line["decision"] == "deny"]


# -- what the page tells of it


def rotations_told(shop: BackgroundStack) -> dict[str, dict[str, Any]]:
    """What the status tells of each secret, by service, with the database user in use."""
    with Visitor(shop.urls.page) as visitor:
        services = visitor.status()["services"]
    return {
        each["service"]: each["credentials"] | {"user": each["database"]["user"]}
        for each in services
        if each["credentials"]
    }


def test_the_status_comes_up_the_chain_with_version_user_and_next_date(shop: BackgroundStack) -> None:
    began = datetime.now(UTC).replace(microsecond=0)  # AWS tells whole seconds
    done = {each["service"]: each for each in reported(rotate(shop, "--json"))}
    for service, each in done.items():
        shop.wait_for_audit(service, event="credentials", version=each["after"]["id"])
    order(shop)

    told = rotations_told(shop)

    assert set(told) == set(DATABASE_SERVICES)
    client = shop.cloud.admin_client("secretsmanager")
    for service, each in told.items():
        assert (each["version"], each["user"]) == (
            done[service]["after"]["id"],
            done[service]["after"]["user"],
        )
        assert began <= datetime.fromisoformat(each["created_at"]) <= datetime.now(UTC)
        due = client.describe_secret(SecretId=f"zt-demo/{service}/db")["NextRotationDate"]
        assert abs((datetime.fromisoformat(each["next_rotation_at"]) - due).total_seconds()) < 0.001
        assert 3500 < (due - began).total_seconds() < 3700


def test_without_a_schedule_the_status_says_so(stack: BackgroundStack) -> None:
    assert order(stack)

    for told in rotations_told(stack).values():
        assert (told["next_rotation_at"], told["last_error"]) == (None, None)
    page = httpx.get(f"{stack.urls.page}/status", headers={"Accept": "text/html"}, trust_env=False).text
    assert page.count("not scheduled") == len(DATABASE_SERVICES)
