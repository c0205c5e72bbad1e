"""The fixtures of tests/mtls, an agent, and a service as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from tests.conformance.peers import HOST, plain_context
from tests.mtls.conftest import CALLER, SERVER, ca, caller, free_port, served, server_source
from ztmtls.source import X509Source
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi

__all__ = ["ca", "caller", "served", "server_source"]  # fixtures

SERVICE = Path(__file__).with_name("small_service.py")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
async def api() -> AsyncIterator[WorkloadApi]:
    async with WorkloadApi() as api:
        yield api


@contextlib.asynccontextmanager
async def identity(
    api: WorkloadApi, ca: CertificateAuthority, name: str, spiffe_id: str, ttl: float = 3600.0
) -> AsyncIterator[tuple[Workload, X509Source]]:
    """A workload of the agent, and its source in this process, which has got its identity."""
    workload = await api.add_workload(name, spiffe_id, ca=ca, svid_ttl=ttl)
    workload.allow(pid=os.getpid())
    async with X509Source(workload.endpoint) as source:
        await source.ready(15)
        yield workload, source


@dataclass
class Service:
    """A service in a process of its own; `log` is what it has written to stderr."""

    process: asyncio.subprocess.Process
    port: int
    probe_port: int
    log: bytearray

    async def probe(self, path: str) -> httpx.Response | None:
        """What its probe port answers, None when nobody listens."""
        no_trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # plain HTTP: loading the public CAs would cost
        async with httpx.AsyncClient(trust_env=False, verify=no_trust, timeout=5.0) as client:
            with contextlib.suppress(httpx.ConnectError):
                return await client.get(f"http://127.0.0.1:{self.probe_port}{path}")
        return None

    async def answers(self, path: str, status: int, timeout: float = 60.0) -> httpx.Response:
        """Wait for `status` of a probe."""
        async with asyncio.timeout(timeout):
            while True:
                answer = await self.probe(path)
                if answer is not None and answer.status_code == status:
                    return answer
                await asyncio.sleep(0.05)

    async def listens(self) -> bool:
        """True when its mTLS port accepts connections."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.close()
            return True
        return False

    async def ended(self, timeout: float = 60.0) -> int:
        """Wait for the end of the process; its status."""
        async with asyncio.timeout(timeout):
            return await self.process.wait()

    @property
    def said(self) -> str:
        return self.log.decode(errors="replace")


@contextlib.asynccontextmanager
async def service(
    endpoint: str | None, *, startup_timeout: float = 0.0, workload: Workload | None = None, **more: str
) -> AsyncIterator[Service]:
    """Run tests/cases/small_service.py; `workload` is the identity that it may have, at once."""
    port, probe_port = free_port(), free_port()
    environment = (
        os.environ
        | {"PYTHONPATH": str(REPOSITORY)}
        | more
        | ({} if endpoint is None else {"SPIFFE_ENDPOINT_SOCKET": endpoint})
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, SERVICE, SERVER, str(port), str(probe_port), str(startup_timeout)),
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd=more.get("TMPDIR"),
    )
    if workload is not None:
        workload.allow(pid=process.pid)
    started = Service(process, port, probe_port, bytearray())
    reading = asyncio.create_task(_read(process, started.log))
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading


async def _read(process: asyncio.subprocess.Process, log: bytearray) -> None:
    assert process.stderr is not None
    while chunk := await process.stderr.read(65536):
        log += chunk


async def leaf_of(running: Service, ca: CertificateAuthority) -> x509.Certificate:
    """What it presents on a new connection."""
    context = plain_context(ssl.PROTOCOL_TLS_CLIENT, ca.issue(CALLER), ca.bundle)
    _, writer = await asyncio.open_connection(HOST, running.port, ssl=context)
    try:
        return x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(True))
    finally:
        writer.transport.abort()
