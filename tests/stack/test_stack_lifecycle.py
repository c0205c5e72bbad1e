"""The stack comes up, carries an order, heals, and goes without leaving anything behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ztdev.options import SERVICES
from ztdev.processes import PROC, ProcessRef, port_is_free
from ztdev.shop import Visitor
from ztdev.stack import BackgroundStack

UP_WITHIN = 90.0


def ztdev(
    *arguments: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of `ztdev` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ztdev", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=UP_WITHIN,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
    )


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def eventually(condition: Callable[[], Any], within: float = 30.0, what: str = "the condition") -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about in {within:.0f} s"
        time.sleep(0.02)


def processes_of(state: Path) -> list[str]:
    """Every process that has to do with a state directory: by arguments, environment or working directory."""
    needle = os.fsencode(state)
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            texts = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
            texts.append(os.fsencode(os.readlink(entry / "cwd")))
            if any(needle in text for text in texts):
                found.append(f"{entry.name}: {texts[0].replace(bytes(1), b' ').decode()}")
    return found


def state_of(state: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        data = json.loads((state / "state.json").read_text())
        assert isinstance(data, dict)
        return data
    return {}


class Traces:
    """What a running stack could leave behind."""

    def __init__(self, state: Path) -> None:
        self.state = state
        data = state_of(state)
        self.sockets = Path(data["sockets"])
        self.ports: dict[str, int] = data["ports"]
        self.processes = {entry["name"]: ProcessRef.parse(entry["ref"]) for entry in data["processes"]}
        assert {*SERVICES, "postgres", "cloud"} <= set(self.processes)
        assert all(process is not None and process.alive() for process in self.processes.values())
        assert sorted(path.name for path in self.sockets.glob("*.sock")) == [
            "control.sock",
            "frontend.sock",
            "orders.sock",
            "payments.sock",
        ]

    def processes_are_gone(self) -> bool:
        return not any(process and process.alive() for process in self.processes.values())

    def assert_nothing_is_left(self) -> None:
        assert self.processes_are_gone()
        assert processes_of(self.state) == []
        assert not self.sockets.exists()
        assert [name for name, port in self.ports.items() if not port_is_free(port)] == []
        assert list((self.state / "tokens").rglob("token")) == []


class Foreground:
    """`ztdev up` in the foreground, as in a terminal of its own."""

    def __init__(self, state: Path, log: Path) -> None:
        self.state = state
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ztdev", "up", "--free-ports", "--state", str(state)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, phase: str) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.output
            return state_of(self.state).get("phase") == phase

        eventually(reached, UP_WITHIN, f"phase {phase}")

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state"
    yield path
    if path.exists():
        ztdev("down", "--if-running", "--state", path)


@pytest.fixture
def foreground(state: Path, tmp_path: Path) -> Iterator[Foreground]:
    running = Foreground(state, tmp_path / "output")
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.wait()


# -- one stack for many tests


def test_order_is_paid_and_both_sides_of_each_hop_agree(stack: BackgroundStack) -> None:
    with Visitor(stack.urls.page) as visitor:
        document = visitor.order()

    assert document["order"]["status"] == "paid"
    hops = {(link["from"], link["to"]): link for link in document["links"]}
    assert set(hops) == {("frontend", "orders"), ("orders", "payments")}
    for (caller, callee), link in hops.items():
        near, far = link["seen_by_caller"], link["seen_by_callee"]
        for own, seen, name in ((near["own"], far["peer"], caller), (far["own"], near["peer"], callee)):
            assert own["id"] == seen["id"] == f"spiffe://zt.example/ns/zt-demo/sa/{name}"
            assert own["serial"] == seen["serial"]
        assert far["rule"]
        assert far["tls_version"] == "TLSv1.3"
    assert {(use["service"], use["user"]) for use in document["databases"]} == {
        ("orders", "orders_app"),
        ("payments", "payments_app"),
    }


def test_decisions_on_an_order_are_in_the_audit_logs_of_both_callees(stack: BackgroundStack) -> None:
    before = {service: len(stack.audit(service)) for service in ("orders", "payments")}
    with Visitor(stack.urls.page) as visitor:
        visitor.order()
    for caller, callee in (("frontend", "orders"), ("orders", "payments")):
        line = stack.wait_for_audit(callee, after=before[callee], event="request", method="POST")
        assert line["decision"] == "allow"
        assert line["peer_id"].endswith(f"/sa/{caller}")


@pytest.mark.parametrize("service", SERVICES)
def test_killed_service_is_started_again_and_orders_work(stack: BackgroundStack, service: str) -> None:
    process = stack.process(service)
    pid, restarts = process.pid, process.restarts
    process.kill()
    eventually(lambda: process.pid not in (None, pid), what=f"a new process of {service}")
    for each in SERVICES:
        stack.process(each).wait_ready()
    assert process.restarts == restarts + 1
    with Visitor(stack.urls.page) as visitor:
        assert visitor.order()["order"]["status"] == "paid"


@pytest.mark.parametrize("part", ["postgres", "cloud"])
def test_killed_dependency_is_started_again_and_orders_work(stack: BackgroundStack, part: str) -> None:
    running = getattr(stack, part)
    pid = running.pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: running.pid not in (None, pid), what=f"a new process of {part}")
    if part == "cloud":
        # It has come back with new passwords: sessions that were open would hide that.
        for role in ("orders_app", "payments_app"):
            stack.run(stack.postgres.end_sessions(role))

    def order_is_paid() -> bool:
        with contextlib.suppress(Exception), Visitor(stack.urls.page) as visitor:
            return bool(visitor.order()["order"]["status"] == "paid")
        return False

    eventually(order_is_paid, 60, "a paid order")


def test_services_know_what_they_need_and_nothing_of_the_caller(stack: BackgroundStack) -> None:
    allowed = {
        *("PATH", "LANG", "LC_ALL", "TZ", "HOME", "TMPDIR", "PYTHONUNBUFFERED"),
        *("SPIFFE_ENDPOINT_SOCKET", "SPIFFE_ID", "HOST", "PORT", "PROBE_HOST", "PROBE_PORT", "LOG_LEVEL"),
        *("HTTP", "LOOP", "DRAIN_SECONDS", "GRACE_SECONDS"),
    }
    database = {"DB_HOST", "DB_PORT", "DB_NAME", "DB_CA_FILE", "DB_SECRET_ID"} | {
        *("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_REGION", "AWS_ENDPOINT_URL"),
    }
    own = {
        "frontend": {"MODE", "ORDERS_URL", "ORDERS_SPIFFE_ID", "LAB_SOCKET", "PROOF_FILE"},
        "orders": {"PAYMENTS_URL", "PAYMENTS_SPIFFE_ID"} | database,
        "payments": database,
    }
    for service in SERVICES:
        text = (PROC / str(stack.process(service).pid) / "environ").read_text()
        names = {pair.partition("=")[0] for pair in text.split("\0") if pair}
        assert names <= allowed | own[service]
        assert own[service] <= names


# -- commands


def test_up_order_down_leaves_nothing_and_the_next_up_finds_the_order(state: Path) -> None:
    # Given a stack in the background of a shell whose environment holds what services must not see
    shell = {
        "AWS_ACCESS_KEY_ID": "AKIDINTHESHELL",
        "AWS_PROFILE": "work",
        "HTTPS_PROXY": "http://192.0.2.1:1",
    }
    started = succeeds(ztdev("up", "--detach", "--free-ports", "--state", state, environment=shell))
    traces = Traces(state)
    assert state_of(state)["urls"]["page"] in started
    report = json.loads(succeeds(ztdev("status", "--json", "--state", state, environment=shell)))
    assert report["ready"] is True
    assert all(process["ready"] for process in report["processes"])

    # When an order is placed and the stack is stopped
    placed = json.loads(succeeds(ztdev("order", "--json", "--state", state, environment=shell)))
    assert placed["order"]["status"] == "paid"
    assert "orders" in succeeds(ztdev("logs", "--state", state))
    succeeds(ztdev("down", "--state", state))

    # Then nothing is left but the data
    traces.assert_nothing_is_left()
    assert ztdev("status", "--state", state).returncode == 3
    assert ztdev("down", "--state", state).returncode == 3
    assert ztdev("down", "--if-running", "--state", state).returncode == 0

    # And the next stack has the order, and carries another one
    succeeds(ztdev("up", "--detach", "--free-ports", "--state", state))
    with Visitor(state_of(state)["urls"]["page"]) as visitor:
        found = visitor.read(f"/orders/{placed['order']['id']}")
        assert found["order"] == placed["order"]
        assert found["databases"] == placed["databases"]
        visitor.order()
    refused = ztdev("up", "--free-ports", "--state", state)
    assert refused.returncode == 4
    assert "ztdev down" in refused.stderr
    traces = Traces(state)
    succeeds(ztdev("down", "--state", state))
    traces.assert_nothing_is_left()


def test_ctrl_c_stops_in_order_and_leaves_nothing(foreground: Foreground) -> None:
    foreground.wait_until("ready")
    traces = Traces(foreground.state)
    foreground.interrupt()
    assert foreground.process.wait(60) == 0, foreground.output
    traces.assert_nothing_is_left()
    stopped = [foreground.output.index(f"stop {name}") for name in (*SERVICES, "PostgreSQL")]
    assert stopped == sorted(stopped)
    assert "Traceback" not in foreground.output


def test_ctrl_c_while_starting_leaves_nothing(foreground: Foreground) -> None:
    eventually(lambda: "PostgreSQL" in foreground.output, UP_WITHIN, "a database")
    foreground.interrupt()
    assert foreground.process.wait(60) == 130, foreground.output
    assert processes_of(foreground.state) == []
    assert state_of(foreground.state)["phase"] == "stopped"
    assert "Traceback" not in foreground.output


def test_second_ctrl_c_does_not_wait_for_a_service_that_hangs(foreground: Foreground) -> None:
    foreground.wait_until("ready")
    traces = Traces(foreground.state)
    hanging = traces.processes["orders"]
    assert hanging is not None
    hanging.signal(signal.SIGSTOP)

    foreground.interrupt()
    foreground.wait_until("stopping")
    foreground.interrupt()

    # The grace of a service alone is longer than this.
    assert foreground.process.wait(8) == 0, foreground.output
    traces.assert_nothing_is_left()


def test_supervisor_that_is_killed_takes_its_children_along(foreground: Foreground) -> None:
    foreground.wait_until("ready")
    traces = Traces(foreground.state)
    foreground.process.kill()
    foreground.process.wait()
    eventually(traces.processes_are_gone, what="the end of every child")

    # The sockets of a killed supervisor are still there; the next one removes them and starts.
    assert traces.sockets.exists()
    succeeds(ztdev("up", "--detach", "--free-ports", "--state", foreground.state))
    succeeds(ztdev("order", "--state", foreground.state))
    traces = Traces(foreground.state)
    succeeds(ztdev("down", "--state", foreground.state))
    traces.assert_nothing_is_left()


def test_taken_port_is_named_with_its_owner_and_its_setting(state: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        refused = ztdev("up", "--free-ports", "--port", str(port), "--state", state)
    assert refused.returncode == 5
    assert f"Port {port} for the page for people is in use by" in refused.stderr
    assert str(os.getpid()) in refused.stderr
    assert "--port N" in refused.stderr
    assert processes_of(state) == []


def test_state_directory_that_cannot_be_used_is_explained(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    refused = ztdev("up", "--state", blocked)
    assert refused.returncode == 6
    assert "--state DIR" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_unknown_thing_cannot_be_ordered(stack: BackgroundStack) -> None:
    refused = ztdev("order", "no-such-thing=1", "--url", stack.urls.page)
    assert refused.returncode == 1
    assert "There is no no-such-thing. One can order:" in refused.stderr


def test_page_that_does_not_answer_is_explained() -> None:
    refused = ztdev("order", "--url", "http://127.0.0.1:1")
    assert refused.returncode == 1
    assert "Is the stack up?" in refused.stderr


def test_demo_shows_an_order_two_refusals_and_a_rotation(tmp_path: Path) -> None:
    shown = succeeds(ztdev("demo", environment={"TMPDIR": str(tmp_path)}))
    assert "caller_not_allowed" in shown
    assert "no_certificate" in shown
    assert "two calls refused" in shown
    for service in ("orders", "payments"):
        assert f"{service}_app → {service}_app_clone" in shown
        assert f"paid  {service} as {service}_app_clone" in shown
    assert list(tmp_path.iterdir()) == []


def test_probe_port_serves_probes_only(stack: BackgroundStack) -> None:
    for service in SERVICES:
        probes = stack.urls.probes[service]
        assert httpx.get(f"{probes}/livez").status_code == 200
        assert httpx.get(f"{probes}/orders").status_code == 404
