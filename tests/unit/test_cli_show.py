"""`ztmtls show`: the identity of a process, as the Workload API tells it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.cli_process import answer, environment, ztmtls
from ztmtls.cli.output import Style, duration, expiry
from ztmtls.cli.show import changes
from ztmtls.ids import SpiffeId
from ztmtls.svid import X509Context
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi, WorkloadIdentity

ORDERS, ADMIN = "spiffe://zt.example/orders", "spiffe://zt.example/orders-admin"


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example", upstream=True)


@pytest.fixture
async def orders(ca: CertificateAuthority) -> AsyncIterator[Workload]:
    async with WorkloadApi() as api:
        workload = await api.add_workload(
            "orders",
            ORDERS,
            WorkloadIdentity(SpiffeId.parse(ADMIN), "admin"),
            ca=ca,
            federates_with=[CertificateAuthority("partner.example")],
            svid_ttl=300,
        )
        workload.allow(uid=os.geteuid())
        yield workload


async def show(workload: Workload, *arguments: str, **variables: str) -> Any:
    return await asyncio.to_thread(ztmtls, "show", "--endpoint", workload.endpoint, *arguments, **variables)


async def test_svids_chain_and_bundles_are_shown(orders: Workload, ca: CertificateAuthority) -> None:
    done = await show(orders)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"SVID {ORDERS} (default)"
    assert f"SVID {ADMIN}" in lines
    assert "  hint     admin" in lines
    assert f"  serial   {orders.svid.serial}" in lines
    assert re.search(r"^  until    .* UTC, in [45] min", done.stdout, re.MULTILINE)
    assert sum(line.startswith("  issuer   ") for line in lines) == 2
    assert lines.index("Bundle zt.example: 1 authority") < lines.index("Bundle partner.example: 1 authority")
    assert "\x1b" not in done.stdout


async def test_json_holds_the_same(orders: Workload, ca: CertificateAuthority) -> None:
    document = answer(await show(orders, "--json"))

    first, second = document["svids"]
    assert (first["id"], first["default"], first["hint"]) == (ORDERS, True, "")
    assert (second["id"], second["default"], second["hint"]) == (ADMIN, False, "admin")
    assert first["serial"] == orders.svid.serial
    assert [len(svid["chain"]) for svid in document["svids"]] == [2, 2]
    left = datetime.fromisoformat(first["not_after"]) - datetime.now(UTC)
    assert first["seconds_left"] == pytest.approx(left.total_seconds(), abs=30)
    assert list(document["bundles"]) == ["zt.example", "partner.example"]
    assert (
        document["bundles"]["zt.example"][0]["subject"] == ca.bundle.authorities[0].subject.rfc4514_string()
    )
    assert document["state"] == "serving"


async def test_endpoint_comes_from_the_environment(orders: Workload) -> None:
    done = await asyncio.to_thread(ztmtls, "show", "--json", SPIFFE_ENDPOINT_SOCKET=orders.endpoint)

    assert answer(done)["svids"][0]["id"] == ORDERS


async def test_no_key_is_ever_printed(orders: Workload) -> None:
    for arguments in ((), ("--json",)):
        done = await show(orders, *arguments)
        numbers = [svid.key.private_numbers() for svid in orders.svids]
        for number in numbers:
            value = number.private_value  # type: ignore[union-attr]
            assert f"{value:x}" not in done.stdout.lower()
            assert str(value) not in done.stdout
        assert "PRIVATE" not in done.stdout


async def test_denied_workload_is_told_at_once(orders: Workload) -> None:
    await orders.disallow()

    done = await show(orders, "--timeout", "50")

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ztmtls: no identity from unix:/")
    assert "PERMISSION_DENIED" in done.stderr
    assert "ztmtls doctor" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_silent_agent_ends_by_the_timeout(orders: Workload) -> None:
    orders.hang()

    done = await show(orders, "--timeout", "0.5")

    assert done.returncode == 1
    assert "within 0.5 s: no SVID has arrived yet" in done.stderr


async def test_update_that_is_no_good_is_told(orders: Workload) -> None:
    orders.push(bundle=CertificateAuthority("zt.example").bundle)

    done = await show(orders, "--timeout", "1.5")

    assert done.returncode == 1
    assert "our own SVID does not verify" in done.stderr


@pytest.mark.parametrize(
    ("variables", "arguments", "named"),
    [({}, [], "SPIFFE_ENDPOINT_SOCKET"), ({}, ["--endpoint", "orders.sock"], "--endpoint")],
)
def test_address_that_is_none_is_wrong_use(
    variables: dict[str, str], arguments: list[str], named: str
) -> None:
    done = ztmtls("show", *arguments, **variables)

    assert done.returncode == 2
    assert done.stderr.startswith(f"ztmtls: {named}: ")


# -- Watching -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def watching(workload: Workload, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ztmtls", "show", "--watch", "--endpoint", workload.endpoint, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment(), limit=1 << 20,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def next_document(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    return json.loads(await asyncio.wait_for(process.stdout.readline(), 30))


async def test_watch_prints_each_update_as_a_line_and_ends_by_ctrl_c(
    orders: Workload, ca: CertificateAuthority
) -> None:
    async with watching(orders, "--json") as process:
        first = await next_document(process)
        before = orders.svid.serial
        orders.rotate()
        renewed = await next_document(process)
        ca.prepare()
        prepared = await next_document(process)
        orders.redact()
        withdrawn = await next_document(process)
        process.send_signal(signal.SIGINT)
        _, complaints = await asyncio.wait_for(process.communicate(), 30)

    assert (first["changes"], first["svids"][0]["serial"]) == ([], before)
    assert len(renewed["changes"]) == 2
    assert renewed["changes"][0].startswith(
        f"SVID renewed: {ORDERS}, serial {before} is now {renewed['svids'][0]['serial']}, valid for 5 min"
    )
    assert [change[:30] for change in prepared["changes"]] == ["authority added to zt.example:"]
    assert (withdrawn["state"], withdrawn["reason"]) == ("denied", "identity_denied")
    assert process.returncode == 130
    assert b"Traceback" not in complaints
    assert b"PERMISSION_DENIED" in complaints


async def test_watch_tells_people_when_the_identity_runs_out(
    orders: Workload, ca: CertificateAuthority
) -> None:
    now = datetime.now(UTC)
    orders.push(ca.issue(ORDERS, not_after=now + timedelta(seconds=4)))
    async with watching(orders) as process:
        assert process.stdout is not None
        printed = b""
        async with asyncio.timeout(30):
            while b"no identity any more: identity_expired" not in printed:
                printed += await process.stdout.readline()

    assert printed.startswith(f"SVID {ORDERS}\n".encode())


async def test_reader_that_goes_away_ends_the_watch_quietly(orders: Workload) -> None:
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m ztmtls show --watch --json --endpoint {orders.endpoint} | head -1; "
        "echo ${PIPESTATUS[0]}",
        executable="/bin/bash", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    await process.stdout.readline()
    # The next thing it writes finds nobody.
    async with asyncio.timeout(30):
        ended = asyncio.create_task(process.communicate())
        while not ended.done():
            orders.rotate()
            await asyncio.wait({ended}, timeout=0.2)
        printed, complaints = await ended

    assert (printed, complaints) == (b"1\n", b"")


def test_changes_name_what_came_and_went(ca: CertificateAuthority) -> None:
    partner = CertificateAuthority("partner.example")
    admin = ca.issue(ADMIN, hint="admin")
    old = ca.context(ca.issue(ORDERS), admin)
    bundles = {partner.trust_domain: partner.bundle, ca.trust_domain: ca.bundle}
    new = X509Context(2, (admin, ca.issue("spiffe://zt.example/new")), bundles)

    found = changes(old, new)

    assert [" ".join(change.split()[:3]) for change in found] == [
        "SVID added: spiffe://zt.example/new,",
        f"SVID removed: {ORDERS},",
        "default is now",
        "trust domain added:",
        "authority added to",
    ]
    assert [change.split(":")[0] for change in changes(new, old)][-1] == "trust domain removed"
    assert changes(old, old) == []


# -- How things are written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"), (0.9, "0 s"), (43, "43 s"), (60, "1 min"), (125, "2 min 5 s"), (3600, "1 h"),
        (3605, "1 h"), (3660, "1 h 1 min"), (86400, "1 d"), (90061, "1 d 1 h"), (86460, "1 d"),
    ],
)  # fmt: skip
def test_duration_in_two_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_expiry_is_absolute_and_relative() -> None:
    now = datetime(2026, 5, 1, 12, tzinfo=UTC)

    assert expiry(now + timedelta(seconds=43), now) == "2026-05-01 12:00:43 UTC, in 43 s"
    assert expiry(now - timedelta(hours=2), now) == "2026-05-01 10:00:00 UTC, expired 2 h ago"


class _Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False),
    ],
)  # fmt: skip
def test_colours_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert ("\x1b" in Style(_Terminal()).good("x")) is coloured  # type: ignore[arg-type]
    with Path(os.devnull).open("w") as file:
        assert "\x1b" not in Style(file).good("x")


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
async def test_colours_of_the_command_on_a_real_terminal(
    orders: Workload, no_color: str, coloured: bool
) -> None:
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ztmtls", "show", "--endpoint", orders.endpoint,
        stdout=theirs, env=environment(NO_COLOR=no_color, TERM="xterm"),
    )  # fmt: skip
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # a terminal whose program has gone ends like this
        while chunk := await asyncio.to_thread(os.read, ours, 65536):
            printed += chunk
    os.close(ours)

    assert await process.wait() == 0
    assert (b"\x1b[32m" in printed) is coloured


async def test_text_from_the_agent_can_not_drive_the_terminal(orders: Workload) -> None:
    orders.fail_next(grpc.StatusCode.INTERNAL, None, details="\x1b[2J\x07 oops")

    done = await show(orders, "--timeout", "1")

    assert "oops" in done.stderr
    assert "\x1b" not in done.stderr
