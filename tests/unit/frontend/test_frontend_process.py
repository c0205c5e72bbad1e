"""The frontend as a process: late identity, readiness, orders coming and going, SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.server import serve
from ztmtls.source import StaticSource
from ztmtls.testing.ca import CertificateAuthority
from ztmtls.testing.workload_api import WorkloadApi

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
async def small_orders(authority: CertificateAuthority, port: int) -> AsyncIterator[None]:
    """An orders that has goods and nothing else, over mutual TLS."""
    app = FastAPI()

    @app.get("/products")
    async def products() -> dict[str, Any]:
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
        yield
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_the_life_of_the_process() -> None:
    authority = CertificateAuthority("zt.example")
    port, probes, orders = free_port(), free_port(), free_port()
    async with WorkloadApi() as api, httpx.AsyncClient(trust_env=False) as http:
        workload = await api.add_workload("frontend", PREFIX + "frontend", ca=authority)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "frontend",
            env={
                "PATH": os.environ["PATH"],
                "SPIFFE_ENDPOINT_SOCKET": workload.endpoint,
                "SPIFFE_ID": PREFIX + "frontend",
                "PORT": str(port),
                "PROBE_PORT": str(probes),
                "MODE": "local",
                "ORDERS_URL": f"https://127.0.0.1:{orders}",
                "ORDERS_SPIFFE_ID": PREFIX + "orders",
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

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
            async with small_orders(authority, orders):
                assert await eventually(ready)
                page = await get(port, "/")
                assert page.status_code == 200
                assert "Desk lamp" in text_of(page.text)

            process.send_signal(signal.SIGTERM)
            output, _ = await asyncio.wait_for(process.communicate(), 15)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    assert b"Traceback" not in output
    assert b"PRIVATE KEY" not in output
