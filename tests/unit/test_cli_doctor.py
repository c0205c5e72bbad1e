"""`ztmtls doctor`: for each thing that can be in the way, the check that names it and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from spiffe._proto import workload_pb2, workload_pb2_grpc

from tests.unit.cli_process import REPOSITORY, answer, environment, ztmtls
from ztmtls.__main__ import main
from ztmtls.audit import AuditLog
from ztmtls.authz import Authorizer, Policy, exact
from ztmtls.listen import bind
from ztmtls.server import serve
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi

ORDERS, PAYMENTS = "spiffe://zt.example/orders", "spiffe://zt.example/payments"
NOBODY = 65534


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example")


@pytest.fixture
async def orders(ca: CertificateAuthority) -> AsyncIterator[Workload]:
    async with WorkloadApi() as api:
        workload = await api.add_workload("orders", ORDERS, ca=ca)
        workload.allow(uid=os.geteuid())
        yield workload


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: those of pytest are too long for sockets, and closed to other users."""
    path = Path(tempfile.mkdtemp(prefix="zt-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def doctor(endpoint: object, *arguments: object, timeout: float = 20) -> tuple[int, list[Any]]:
    """The exit status and the checks. It runs in this process: a new one for each test takes long."""
    options = ("--json", "--endpoint", endpoint, "--timeout", timeout, *arguments)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = await asyncio.to_thread(main, ["doctor", *map(str, options)])
    document = json.loads(printed.getvalue())
    assert document["ok"] is (status == 0)
    assert all(check["advice"] for check in document["checks"] if check["status"] in ("fail", "warn"))
    return status, document["checks"]


def only(checks: list[Any], status: str) -> Any:
    """The one check that ended like this."""
    (found,) = [check for check in checks if check["status"] == status]
    return found


async def failure(endpoint: object, *arguments: object, timeout: float = 20) -> Any:
    """The check that failed; all before it were fine, and nothing else failed."""
    status, checks = await doctor(endpoint, *arguments, timeout=timeout)
    assert status == 1
    return only(checks, "fail")


async def test_healthy_workload_has_nothing_in_the_way(orders: Workload) -> None:
    status, checks = await doctor(orders.endpoint, "--expect", ORDERS)

    assert status == 0
    assert [(check["name"], check["status"]) for check in checks] == [
        (name, "ok")
        for name in (
            "endpoint",
            "socket",
            "listener",
            "grpc",
            "agent",
            "clock",
            "svid",
            "identity",
            "bundles",
        )
    ]
    assert orders.svid.serial in next(c["text"] for c in checks if c["name"] == "svid")


async def test_report_for_people(orders: Workload) -> None:
    done = await asyncio.to_thread(ztmtls, "doctor", SPIFFE_ENDPOINT_SOCKET=orders.endpoint)

    assert done.returncode == 0
    assert done.stdout.startswith(f"ok    endpoint  SPIFFE_ENDPOINT_SOCKET names {orders.endpoint}\n")
    assert done.stdout.endswith("\nnothing is in the way\n")
    assert "\x1b" not in done.stdout
    assert f"{orders.svid.key.private_numbers().private_value:x}" not in done.stdout  # type: ignore[union-attr]


# -- The way to the agent -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["", "orders.sock", "http://127.0.0.1:1", "unix:relative", "tcp://host:1"]
)
async def test_address_that_is_none(endpoint: str) -> None:
    found = await failure(endpoint)

    assert (found["name"], found["reason"]) == ("endpoint", "invalid_endpoint")
    assert "unix:/run/spire/agent.sock" in found["advice"]


def test_variable_that_is_not_set() -> None:
    done = ztmtls("doctor")

    assert done.returncode == 1
    assert "SPIFFE_ENDPOINT_SOCKET: no Workload API address" in done.stdout
    assert done.stdout.endswith("1 failed\n")


async def test_socket_that_is_not_there(folder: Path) -> None:
    (folder / "other.sock").touch()
    (folder / "link.sock").symlink_to("/gone")

    missing = await failure(f"unix:{folder}/agent.sock")
    dangling = await failure(f"unix:{folder}/link.sock")
    no_directory = await failure(f"unix:{folder}/no/such/agent.sock")
    file_between = await failure(f"unix:{folder}/other.sock/agent.sock")

    assert {missing["name"], dangling["name"], no_directory["name"], file_between["name"]} == {"socket"}
    assert missing["text"] == f"{folder}/agent.sock does not exist"
    assert "'other.sock'" in missing["advice"]
    assert "it is a link to /gone, which is not there" in dangling["text"]
    assert no_directory["text"] == f"the directory {folder}/no does not exist"
    assert file_between["text"] == f"{folder}/other.sock is not a directory"


async def test_plain_file_in_place_of_the_socket(folder: Path) -> None:
    (folder / "agent.sock").touch()

    found = await failure(f"unix:{folder}/agent.sock")

    assert (found["name"], found["text"]) == (
        "socket",
        f"{folder}/agent.sock is a plain file, not a socket",
    )


async def test_socket_that_a_dead_agent_left(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{folder}/agent.sock")

    found = await failure(f"unix:{folder}/agent.sock")

    assert (found["name"], found["text"]) == ("listener", f"nobody listens at {folder}/agent.sock")
    assert "left its socket behind" in found["advice"]


async def test_nobody_listens_on_tcp() -> None:
    with bind("127.0.0.1", 0, "PORT") as sock:
        port = sock.getsockname()[1]

    found = await failure(f"tcp://127.0.0.1:{port}")

    assert (found["name"], found["text"]) == ("listener", f"nobody listens at 127.0.0.1:{port}")


AS_NOBODY = f"""
import os, sys
from ztmtls.__main__ import main
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
sys.exit(main(["doctor", "--json", *sys.argv[1:]]))
"""


def _as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as an ordinary user in no group of ours, who need not be able to read this environment."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@as_root
def test_directory_that_is_closed_to_us_is_named_with_its_mode(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(f"{closed}/agent.sock")
        agent.listen()
        Path(f"{closed}/agent.sock").chmod(0o777)

        refused = answer(_as_nobody("--endpoint", f"unix:{closed}/agent.sock"))
        closed.chmod(0o755)
        open_to_all = answer(_as_nobody("--endpoint", f"unix:{closed}/agent.sock", "--timeout", "0.5"))

    found = only(refused["checks"], "fail")
    assert found["name"] == "socket"
    assert found["text"].startswith(
        f"{closed} is closed to us: it is drwx------ of root:root, and we are user "
    )
    assert "without search (x)" in found["text"]
    assert [c["status"] for c in open_to_all["checks"] if c["name"] in ("socket", "listener")] == ["ok", "ok"]


@as_root
def test_socket_that_is_closed_to_us(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(f"{folder}/agent.sock")
        Path(f"{folder}/agent.sock").chmod(0o755)

        found = only(answer(_as_nobody("--endpoint", f"unix:{folder}/agent.sock"))["checks"], "fail")

    assert f"{folder}/agent.sock is closed to us: it is srwxr-xr-x of root:root" in found["text"]
    assert "without write (w)" in found["text"]


# -- Who listens there ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def listening(path: Path, answer: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
    server = await asyncio.start_unix_server(answer, path)
    try:
        yield f"unix:{path}"
    finally:
        server.close()


async def test_another_protocol_on_the_socket(folder: Path) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with listening(folder / "http.sock", http) as endpoint:
        found = await failure(endpoint)

    assert found["name"] == "grpc"
    assert "does not speak gRPC" in found["text"]


async def test_listener_that_says_nothing(folder: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with listening(folder / "silent.sock", silent) as endpoint:
        found = await failure(endpoint, timeout=1)

    assert found["name"] == "grpc"
    assert "said nothing within the deadline" in found["text"]


async def test_another_grpc_service_on_the_socket(folder: Path) -> None:
    server = grpc.aio.server()
    server.add_insecure_port(f"unix:{folder}/other.sock")
    await server.start()
    try:
        found = await failure(f"unix:{folder}/other.sock")
    finally:
        await server.stop(None)

    assert found["name"] == "agent"
    assert "no Workload API: it answers UNIMPLEMENTED" in found["text"]


async def test_agent_that_does_not_know_us(orders: Workload) -> None:
    await orders.disallow()

    found = await failure(orders.endpoint)

    assert (found["name"], found["reason"]) == ("agent", "identity_denied")
    assert "PERMISSION_DENIED: no identity issued" in found["text"]
    for selector in (f"unix:uid:{os.geteuid()}", f"unix:gid:{os.getegid()}", "unix:path:/"):
        assert selector in found["advice"]


async def test_agent_that_hangs(orders: Workload) -> None:
    orders.hang()

    found = await failure(orders.endpoint, timeout=1)

    assert found["name"] == "agent"
    assert "did not answer within the deadline" in found["text"]


@pytest.mark.parametrize(
    ("code", "detail", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request", "refuses the call itself"),
        (grpc.StatusCode.UNAVAILABLE, "server is away", "answers UNAVAILABLE: server is away"),
        (grpc.StatusCode.INTERNAL, "\x1b[2J", r"answers INTERNAL: \x1b[2J"),
    ],
)
async def test_agent_that_refuses(
    orders: Workload, code: grpc.StatusCode, detail: str, expected: str
) -> None:
    orders.fail_next(code, None, details=detail)

    found = await failure(orders.endpoint)

    assert found["name"] == "agent"
    assert expected in found["text"]


async def test_stream_that_ends_at_once(folder: Path) -> None:
    class Ending(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
        async def FetchX509SVID(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
            for nothing in ():
                yield nothing

    server = grpc.aio.server()
    workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(Ending(), server)
    server.add_insecure_port(f"unix:{folder}/agent.sock")
    await server.start()
    try:
        found = await failure(f"unix:{folder}/agent.sock")
    finally:
        await server.stop(None)

    assert (found["name"], found["reason"]) == ("agent", "no_identity")


async def test_message_without_an_svid(orders: Workload) -> None:
    orders.push_raw(workload_pb2.X509SVIDResponse())

    found = await failure(orders.endpoint)

    assert (found["name"], found["text"]) == ("svid", "it holds no SVID")


# -- The SVID -------------------------------------------------------------------------------------------


async def test_svid_of_the_future_means_a_wrong_clock(orders: Workload, ca: CertificateAuthority) -> None:
    now = datetime.now(UTC)
    orders.push(ca.issue(ORDERS, not_before=now + timedelta(minutes=5), not_after=now + timedelta(minutes=9)))

    status, checks = await doctor(orders.endpoint)

    assert status == 1
    found = {check["name"]: check for check in checks if check["status"] == "fail"}
    assert found["clock"]["reason"] == found["svid"]["reason"] == "not_yet_valid"
    assert "behind the authority" in found["clock"]["text"]
    assert "NTP" in found["clock"]["advice"]


@pytest.mark.parametrize(
    ("case", "reason"), [("expired", "expired"), ("other bundle", "untrusted_authority")]
)
async def test_svid_that_does_not_verify(
    orders: Workload, ca: CertificateAuthority, case: str, reason: str
) -> None:
    now = datetime.now(UTC)
    if case == "expired":
        orders.push(ca.issue(ORDERS, not_before=now - timedelta(hours=2), not_after=now - timedelta(hours=1)))
    else:
        orders.push(bundle=CertificateAuthority("zt.example").bundle)

    found = await failure(orders.endpoint)

    assert (found["name"], found["reason"]) == ("svid", reason)


async def test_svid_that_should_have_been_renewed_is_a_warning(
    orders: Workload, ca: CertificateAuthority
) -> None:
    now = datetime.now(UTC)
    orders.push(ca.issue(ORDERS, not_before=now - timedelta(hours=1), not_after=now + timedelta(minutes=2)))

    status, checks = await doctor(orders.endpoint)

    assert status == 0
    assert only(checks, "warn")["name"] == "svid"


async def test_identity_that_is_not_the_expected_one(orders: Workload) -> None:
    found = await failure(orders.endpoint, "--expect", PAYMENTS)

    assert found["name"] == "identity"
    assert found["text"] == f"we expect to be {PAYMENTS}, and are {ORDERS}"


async def test_expected_identity_that_is_not_the_default_is_a_warning(
    orders: Workload, ca: CertificateAuthority
) -> None:
    orders.push(ca.issue(PAYMENTS), ca.issue(ORDERS))

    status, checks = await doctor(orders.endpoint, "--expect", ORDERS)

    assert status == 0
    assert only(checks, "warn")["name"] == "identity"


async def test_broken_bundle_of_another_domain_is_a_warning(orders: Workload) -> None:
    orders.push_raw(orders.build_response(federated={"spiffe://partner.example": b"broken"}))

    status, checks = await doctor(orders.endpoint)

    assert status == 0
    assert "partner.example dropped" in only(checks, "warn")["text"]


# -- The policy -----------------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(
        f"version: 1\nrules:\n  - {{name: r, callers: ['{ORDERS}'], methods: [POST], paths: [/payments]}}\n"
    )
    return path


async def test_policy_app_and_request_are_checked(orders: Workload) -> None:
    caller = "spiffe://zt.example/ns/zt-demo/sa/frontend"
    arguments = (
        "--policy",
        REPOSITORY / "services/orders/src/orders/policy.yaml",
        "--app",
        "orders.app:router",
    )
    asked = ("--peer", caller, "--method", "GET", "--path")

    status, checks = await doctor(orders.endpoint, *arguments, *asked, "/orders")
    denied = await failure(orders.endpoint, *arguments, *asked, "/order")

    assert status == 0
    assert [check["name"] for check in checks][-3:] == ["policy", "app", "request"]
    assert checks[-1]["text"].endswith("allowed by rule frontend-reads-orders")
    assert (denied["name"], denied["reason"]) == ("request", "route_not_allowed")
    assert "the nearest rule is frontend-reads-orders" in denied["advice"]


async def test_faults_of_policy_and_fit_are_named(orders: Workload, policy: Path) -> None:
    status, checks = await doctor(orders.endpoint, "--policy", policy, "--app", "orders.app:router")
    policy.write_text("version: 1\nrules: []\n")
    broken = await failure(orders.endpoint, "--policy", policy)

    assert status == 1
    assert f"{policy}:3: rule 'r': no route of the application takes /payments" in [c["text"] for c in checks]
    assert broken["reason"] == "invalid_policy"
    assert broken["text"].startswith(f"{policy}:2: 'rules' must be")


async def test_policy_is_checked_without_an_agent(policy: Path) -> None:
    status, checks = await doctor("unix:/nowhere/agent.sock", "--policy", policy)

    assert status == 1
    assert [(c["name"], c["status"]) for c in checks] == [
        ("endpoint", "ok"),
        ("socket", "fail"),
        ("policy", "ok"),
    ]


async def test_app_that_hangs_at_import_ends_by_the_deadline(
    orders: Workload, policy: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow_app.py").write_text("import threading\nthreading.Event().wait()\n")

    done = await asyncio.to_thread(
        ztmtls, "doctor", "--json", "--endpoint", orders.endpoint, "--policy", policy,
        "--app", "slow_app:app", "--timeout", 2, cwd=tmp_path,
    )  # fmt: skip

    assert done.returncode == 1
    assert "was not made within the deadline" in only(answer(done)["checks"], "fail")["text"]


# -- A handshake with a server --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(source: StaticSource, allowed_peers: Authorizer | None = None) -> AsyncIterator[str]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no request is sent")

    rules = [{"name": "r", "callers": [ORDERS], "methods": ["GET"], "paths": ["/"]}]
    with bind("127.0.0.1", 0, "PORT") as probe:
        port = probe.getsockname()[1]
    up = asyncio.Event()
    server = asyncio.create_task(
        serve(
            app, source=source, policy=Policy.parse({"version": 1, "rules": rules}), host="127.0.0.1",
            port=port, audit=AuditLog("payments", io.StringIO()), allowed_peers=allowed_peers,
            on_serving=up.set,
        )
    )  # fmt: skip
    await asyncio.wait_for(up.wait(), 20)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


async def test_handshake_with_the_right_server(orders: Workload, ca: CertificateAuthority) -> None:
    async with serving(StaticSource(ca.context(ca.issue(PAYMENTS)))) as address:
        status, checks = await doctor(orders.endpoint, "--connect", address, "--peer", PAYMENTS)

    assert status == 0
    assert [check["name"] for check in checks][-3:] == ["connect", "server", "caller"]
    assert f"we accept the server: {PAYMENTS}" in checks[-2]["text"]
    assert checks[-1]["text"] == f"the server accepts us as {ORDERS}"


async def test_server_with_another_identity(orders: Workload, ca: CertificateAuthority) -> None:
    async with serving(StaticSource(ca.context(ca.issue("spiffe://zt.example/imposter")))) as address:
        found = await failure(orders.endpoint, "--connect", address, "--peer", PAYMENTS)

    assert (found["name"], found["reason"]) == ("server", "wrong_server_identity")
    assert "spiffe://zt.example/imposter" in found["text"]


async def test_server_of_a_domain_that_we_do_not_trust(orders: Workload) -> None:
    other = CertificateAuthority("other.example")
    async with serving(StaticSource(other.context(other.issue("spiffe://other.example/x")))) as address:
        found = await failure(orders.endpoint, "--connect", address, "--peer", "spiffe://other.example/x")

    assert (found["name"], found["reason"]) == ("server", "untrusted_authority")


async def test_server_that_does_not_trust_us(orders: Workload, ca: CertificateAuthority) -> None:
    other = CertificateAuthority("other.example")
    orders.set_federation(other)
    async with serving(StaticSource(other.context(other.issue("spiffe://other.example/x")))) as address:
        found = await failure(orders.endpoint, "--connect", address, "--peer", "spiffe://other.example/x")

    assert (found["name"], found["reason"]) == ("caller", "refused_by_server")
    assert found["text"].startswith("the server refuses our certificate: ")


async def test_server_whose_allow_list_leaves_us_out(orders: Workload, ca: CertificateAuthority) -> None:
    source = StaticSource(ca.context(ca.issue(PAYMENTS)))
    async with serving(source, exact("spiffe://zt.example/frontend")) as address:
        found = await failure(orders.endpoint, "--connect", address, "--peer", PAYMENTS)

    assert (found["name"], found["reason"]) == ("caller", "refused_by_server")
    assert "allowed_peers" in found["advice"]


@contextlib.asynccontextmanager
async def tcp(answer: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_server_without_tls(orders: Workload) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with tcp(http) as address:
        found = await failure(orders.endpoint, "--connect", address, "--peer", PAYMENTS)

    assert (found["name"], found["reason"]) == ("server", "not_tls")


async def test_server_that_says_nothing(orders: Workload) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass
        writer.close()

    async with tcp(silent) as address:
        found = await failure(orders.endpoint, "--connect", address, "--peer", PAYMENTS, timeout=3)

    assert (found["name"], found["reason"]) == ("server", "tls_failure")


async def test_server_that_is_not_there(orders: Workload) -> None:
    with bind("127.0.0.1", 0, "PORT") as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"

    found = await failure(orders.endpoint, "--connect", address, "--peer", PAYMENTS)
    no_name = await failure(orders.endpoint, "--connect", "no-such-host.invalid:1", "--peer", PAYMENTS)

    assert found["name"] == no_name["name"] == "connect"


async def test_without_an_identity_there_is_no_handshake(orders: Workload) -> None:
    await orders.disallow()

    status, checks = await doctor(orders.endpoint, "--connect", "127.0.0.1:1", "--peer", PAYMENTS)

    assert status == 1
    assert only(checks, "skip")["name"] == "connect"


# -- Use ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--expect", "orders"], "--expect: 'orders' does not begin with"),
        (["--app", "a:b"], "--app: name the policy"),
        (["--method", "GET"], "--method and --path: give both"),
        (["--policy", "p", "--peer", ORDERS, "--path", "/"], "--method and --path: give both"),
        (["--peer", ORDERS], "--peer: give --method and --path too, or --connect"),
        (["--connect", "127.0.0.1:1"], "--connect: name the SPIFFE ID"),
        (["--connect", "127.0.0.1", "--peer", ORDERS], "must be HOST:PORT"),
        (["--connect", "::1:1", "--peer", ORDERS], "must be HOST:PORT"),
        (["--connect", "a:70000", "--peer", ORDERS], "must be HOST:PORT"),
        (
            ["--connect", "a:1", "--peer", ORDERS, "--policy", "p", "--method", "GET", "--path", "/"],
            "ask them apart",
        ),
        (["--timeout", "0"], "argument --timeout"),
    ],
)
def test_wrong_use(arguments: list[str], expected: str) -> None:
    done = ztmtls("doctor", *arguments)

    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stdout == ""


async def test_ctrl_c_ends_it_at_once_and_quietly(orders: Workload) -> None:
    orders.hang()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ztmtls", "doctor", "--endpoint", orders.endpoint, "--timeout", "60",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment(),
    )  # fmt: skip
    await orders.wait_for_calls(1, timeout=30)

    process.send_signal(signal.SIGINT)
    printed, complaints = await asyncio.wait_for(process.communicate(), 30)

    assert process.returncode == 130
    assert complaints == b""
    assert b"listener" in printed
