"""`ztmtls.testing.harness` as a suite runs it: a process that knows nothing but the agent's address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from tests.mtls.conftest import free_port
from tests.processes import environment
from ztmtls.testing import CertificateAuthority, Workload

from .conftest import DOMAIN, OURS, PEER, conformance
from .peers import HOST, call, plain_server


@contextlib.asynccontextmanager
async def started(endpoint: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ztmtls.testing.harness",
        env=environment(SPIFFE_ENDPOINT_SOCKET=endpoint),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            await process.communicate()


@dataclass
class Harness:
    """A harness that is ready: its ports, and what a suite asks it."""

    process: asyncio.subprocess.Process
    x509_port: int
    control_port: int

    async def ask(self, method: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        url = f"http://{HOST}:{self.control_port}{path}"
        async with aiohttp.ClientSession() as session, session.request(method, url, **body) as response:
            return response.status, await response.json()

    async def dial(self, port: int) -> tuple[int, dict[str, Any]]:
        return await self.ask("POST", "/v1/x509/dial", json={"address": f"{HOST}:{port}"})


async def said(process: asyncio.subprocess.Process) -> list[str]:
    """The lines that it prints up to READY."""
    lines: list[str] = []
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while not lines or lines[-1] != "READY":
            line = await process.stdout.readline()
            if not line:
                assert process.stderr is not None
                raise AssertionError((await process.stderr.read()).decode())
            lines.append(line.decode().removesuffix("\n"))
    return lines


@pytest.fixture
async def harness(workload: Workload) -> AsyncIterator[Harness]:
    workload.allow(uid=os.getuid())
    async with started(workload.endpoint) as process:
        values = dict(line.split("=") for line in (await said(process))[:-1])
        assert values.pop("SPIFFE_HARNESS_VERSION") == "1"
        yield Harness(process, int(values["SPIFFE_X509_PORT"]), int(values["SPIFFE_CONTROL_PORT"]))


@conformance("EP-1")
async def test_ready_only_after_the_first_svid(workload: Workload) -> None:
    workload.hang()
    workload.allow(uid=os.getuid())
    async with started(workload.endpoint) as process:
        reading = asyncio.create_task(said(process))
        await workload.wait_for_calls(1, 30)
        assert not reading.done()

        workload.resume()

        assert (await reading)[-1] == "READY"


async def test_x509_port_names_whom_it_accepts_and_drops_the_others(
    harness: Harness, ca: CertificateAuthority
) -> None:
    answer = await call(harness.x509_port, ca.issue(PEER), ca.bundle)
    assert answer.line == PEER

    assert (await call(harness.x509_port, CertificateAuthority(DOMAIN).issue(PEER), ca.bundle)).line == ""
    assert (await call(harness.x509_port, ca.issue(PEER, is_ca=True), ca.bundle)).line == ""


async def test_dial_tells_accepted_from_rejected_from_not_reached(
    harness: Harness, ca: CertificateAuthority
) -> None:
    async with plain_server(ca.issue(PEER), ca.bundle) as port:
        assert await harness.dial(port) == (200, {"status": "ok", "spiffe_id": PEER})
    for wrong in (CertificateAuthority(DOMAIN).issue(PEER), ca.issue(PEER, uris=["https://zt.example/"])):
        async with plain_server(wrong, ca.bundle) as port:
            status, answer = await harness.dial(port)
            assert (status, answer["status"]) == (422, "rejected")

    status, answer = await harness.dial(free_port())
    assert (status, answer["status"]) == (500, "error")


@pytest.mark.parametrize("body", [{}, {"address": 1}, {"address": "nowhere"}, []])
async def test_request_that_is_none_is_an_error_and_no_rejection(harness: Harness, body: Any) -> None:
    status, answer = await harness.ask("POST", "/v1/x509/dial", json=body)

    assert (status, answer["status"]) == (500, "error")


async def test_what_it_is(harness: Harness) -> None:
    status, info = await harness.ask("GET", "/v1/info")
    assert (status, info["sdk"]) == (200, "ztmtls")


async def test_jwt_svids_are_fetched_and_validated(harness: Harness) -> None:
    status, answer = await harness.ask("POST", "/v1/jwt/fetch", json={"audience": ["conformance"]})
    assert (status, answer["status"]) == (200, "ok")
    (svid,) = answer["svids"]
    assert svid["spiffe_id"] == OURS

    body = {"token": svid["token"], "audience": "conformance"}
    status, answer = await harness.ask("POST", "/v1/jwt/validate", json=body)
    assert (status, answer["spiffe_id"], answer["claims"]["sub"]) == (200, OURS, OURS)

    status, answer = await harness.ask("POST", "/v1/jwt/validate", json=body | {"audience": "another"})
    assert (status, answer["status"]) == (422, "rejected")


@conformance("XS-3")
async def test_rotation_needs_no_restart(
    harness: Harness, workload: Workload, ca: CertificateAuthority
) -> None:
    before = (await call(harness.x509_port, ca.issue(PEER), ca.bundle)).leaf
    new = workload.rotate()

    leaf = before
    async with asyncio.timeout(10):
        while leaf == before:
            leaf = (await call(harness.x509_port, ca.issue(PEER), ca.bundle)).leaf

    assert leaf == new.leaf


async def test_sigterm_ends_it_while_others_hang(harness: Harness) -> None:
    dialled = asyncio.Event()
    mute = await asyncio.start_server(lambda *_: dialled.set(), HOST, 0)
    dialling = asyncio.create_task(harness.dial(mute.sockets[0].getsockname()[1]))
    silent = [await asyncio.open_connection(HOST, port) for port in (harness.x509_port, harness.control_port)]
    async with asyncio.timeout(5):
        await dialled.wait()

    harness.process.send_signal(signal.SIGTERM)

    async with asyncio.timeout(5):
        assert await harness.process.wait() == 0
    with pytest.raises(aiohttp.ClientError):
        await dialling
    mute.close()
    for _, writer in silent:
        writer.close()


@conformance("EP-4")
async def test_address_that_can_not_be_used_ends_it_with_a_reason(workload: Workload) -> None:
    workload.allow(uid=os.getuid())
    async with started(workload.endpoint) as process:
        await said(process)
    async with started(f"unix://localhost{workload.path}") as process:
        out, err = await process.communicate()

    assert process.returncode == 2
    assert out == b""
    assert b"invalid_endpoint" in err
