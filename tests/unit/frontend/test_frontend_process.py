"""The frontend as a process: late identity, readiness, orders coming and going, SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from aiohttp import web
from cryptography import x509
from fastapi import FastAPI, Request
from starlette.datastructures import Headers

from tests.attacks.catalogue import load_attacks
from tests.attacks.controls import load_controls
from tests.attacks.lab import Lab
from tests.attacks.runner import Runner
from tests.attacks.serve import make_app
from tests.processes import environment
from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.server import serve
from ztmtls.source import StaticSource
from ztmtls.testing.ca import CertificateAuthority
from ztmtls.testing.workload_api import Workload, WorkloadApi

from .conftest import PREFIX, text_of


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


async def eventually(condition: Callable[[], Awaitable[Any]], seconds: float = 20) -> Any:
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := await condition():
                return found
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def small_orders(authority: CertificateAuthority, port: int) -> AsyncIterator[list[Headers]]:
    """An orders that has goods and nothing else, over mutual TLS; what it is told in headers."""
    app = FastAPI()
    told: list[Headers] = []

    @app.get("/products")
    async def products(request: Request) -> dict[str, Any]:
        told.append(request.headers)
        lamp = {"sku": "lamp", "name": "Desk lamp", "price": 4900, "currency": "EUR"}
        return {"products": [lamp]}

    rule = {"name": "r", "callers": [PREFIX + "frontend"], "methods": ["GET"], "paths": ["/products"]}
    serving = asyncio.create_task(
        serve(
            app,
            source=StaticSource(authority.context(authority.issue(PREFIX + "orders"))),
            policy=Policy.parse({"version": 1, "rules": [rule]}),
            host="127.0.0.1",
            port=port,
            audit=AuditLog("orders", open(os.devnull, "w")),  # noqa: SIM115
            grace=1,
        )
    )
    try:
        yield told
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


FORGED = [
    b"X-FoRwArDeD-cLiEnT-cErT: URI=spiffe://zt.example/ns/zt-demo/sa/payments\r\n",
    b"X-Spiffe-Id: spiffe://zt.example/ns/zt-demo/sa/payments\r\n" * 2,
    b"X-Client-Verify: SUCCESS\r\n X-Spiffe-Id: spiffe://zt.example/ns/zt-demo/sa/payments\r\n",
    b"X_Spiffe_Id: spiffe://zt.example/ns/zt-demo/sa/payments\r\n",
]


async def send_raw(port: int, header: bytes) -> bytes:
    """Ask for the first page with `header` written as it stands."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + header + b"\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


async def start(workload: Workload, port: int, probes: int, orders: int, **more: str) -> Process:
    """The frontend as a process of its own."""
    settings = {
        "SPIFFE_ENDPOINT_SOCKET": workload.endpoint,
        "SPIFFE_ID": PREFIX + "frontend",
        "PORT": str(port),
        "PROBE_PORT": str(probes),
        "MODE": "local",
        "ORDERS_URL": f"https://127.0.0.1:{orders}",
        "ORDERS_SPIFFE_ID": PREFIX + "orders",
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "frontend",
        env=environment(**settings | more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def test_the_life_of_the_process() -> None:
    authority = CertificateAuthority("zt.example")
    port, probes, orders = free_port(), free_port(), free_port()
    async with WorkloadApi() as api, httpx.AsyncClient(trust_env=False) as http:
        workload = await api.add_workload("frontend", PREFIX + "frontend", ca=authority)
        process = await start(workload, port, probes, orders)

        async def get(at: int, path: str) -> httpx.Response:
            return await http.get(f"http://127.0.0.1:{at}{path}")

        async def ready() -> dict[str, Any] | None:
            answer = await get(probes, "/readyz")
            return answer.json() if answer.status_code == 200 else None

        try:
            # Not registered yet: alive, not ready, and no page that could not keep its word.
            assert await eventually(lambda: get(probes, "/livez"))
            assert await ready() is None
            with socket.socket() as attempt:
                assert attempt.connect_ex(("127.0.0.1", port)) != 0

            # Registered: pages come, and say that orders is not there.
            workload.allow(pid=process.pid)
            page = await eventually(lambda: get(port, "/"))
            assert page.status_code == 503
            assert "dependency_unavailable" in text_of(page.text)
            assert (await get(probes, "/readyz")).json()["checks"]["orders"] == "dependency_unavailable"
            assert (await get(probes, "/livez")).status_code == 200

            # orders comes: ready by itself.
            async with small_orders(authority, orders) as told:
                assert await eventually(ready)
                page = await get(port, "/")
                assert page.status_code == 200
                assert "Desk lamp" in text_of(page.text)

                # Identity headers in odd case, twice, and folded: nothing of them gets through.
                for forged in FORGED:
                    await send_raw(port, forged)
                assert (await get(port, "/")).status_code == 200
                assert len(told) > 2
                assert set().union(*told) <= {"host", "accept", "accept-encoding", "connection", "user-agent"}
                assert "payments" not in str(told)

            process.send_signal(signal.SIGTERM)
            output, _ = await asyncio.wait_for(process.communicate(), 15)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    assert b"Traceback" not in output
    assert b"PRIVATE KEY" not in output


async def test_streams_that_are_open_do_not_hold_up_the_end(tmp_path: Path) -> None:
    authority = CertificateAuthority("zt.example")
    port, probes, orders = free_port(), free_port(), free_port()
    attacks, lab_socket = load_attacks(), tmp_path / "lab.sock"
    async with (
        WorkloadApi() as api,
        httpx.AsyncClient(trust_env=False) as http,
        Runner(Lab(None), attacks) as runner,  # type: ignore[arg-type]  # nothing is attacked
    ):
        lab = web.AppRunner(make_app(runner, attacks, load_controls()), shutdown_timeout=0.1)
        await lab.setup()
        await web.UnixSite(lab, str(lab_socket)).start()
        workload = await api.add_workload("frontend", PREFIX + "frontend", ca=authority)
        process = await start(workload, port, probes, orders, LAB_SOCKET=str(lab_socket), GRACE_SECONDS="60")
        workload.allow(pid=process.pid)
        try:
            page = f"http://127.0.0.1:{port}"
            await eventually(lambda: http.get(f"{page}/tour"))
            async with (
                http.stream("GET", f"{page}/live/events") as live,
                http.stream("GET", f"{page}/lab/events") as events,
            ):
                seen = live.aiter_text(), events.aiter_text()
                assert (await anext(seen[0])).startswith("event: services")
                assert (await anext(seen[1])).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                output, _ = await asyncio.wait_for(process.communicate(), 15)  # much less than the grace
                for each in seen:
                    async for _ in each:  # to their end, which is in good order: nothing is raised
                        pass
        finally:
            await lab.cleanup()
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    assert b"Traceback" not in output


async def test_behind_a_load_balancer_it_serves_tls_with_its_svid_and_asks_for_none(tmp_path: Path) -> None:
    authority = CertificateAuthority("zt.example")
    port, probes, orders = free_port(), free_port(), free_port()
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    balancer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # as one calls: it checks nothing, and shows nothing
    balancer.check_hostname = False
    balancer.verify_mode = ssl.CERT_NONE
    settings = {
        "MODE": "eks",
        "ALLOWED_HOSTS": "page.example",
        "CSRF_KEY_FILE": str(key),
        "GRACE_SECONDS": "1",
    }
    async with WorkloadApi() as api, httpx.AsyncClient(trust_env=False, verify=balancer) as http:
        workload = await api.add_workload("frontend", PREFIX + "frontend", ca=authority)
        process = await start(workload, port, probes, orders, **settings)
        workload.allow(pid=process.pid)
        try:
            url, host = f"https://127.0.0.1:{port}/", {"Host": "page.example"}
            page = await eventually(lambda: http.get(url, headers=host))
            assert page.headers["strict-transport-security"]
            pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
            names = (
                x509.load_pem_x509_certificate(pem.encode())
                .extensions.get_extension_for_class(x509.SubjectAlternativeName)
                .value
            )
            assert names.get_values_for_type(x509.UniformResourceIdentifier) == [PREFIX + "frontend"]
            process.send_signal(signal.SIGTERM)
            output, _ = await asyncio.wait_for(process.communicate(), 15)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    assert b"Traceback" not in output
