"""What a run needs: a certificate authority, a Workload API, the server process, and clients of each kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from ztdev.ports import choose_free_ports
from ztmtls.client import AsyncClient
from ztmtls.source import X509Source
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi

from . import by_hand

DOMAIN = "bench.example"
SERVER, CALLER = f"spiffe://{DOMAIN}/server", f"spiffe://{DOMAIN}/caller"
FRIEND = "spiffe://friend.example/caller"
PORTS = ("ztmtls", "ssl", "plain")
KINDS = ("ztmtls", "ssl, httpx", "ssl, aiohttp", "plain, httpx")


class _Aiohttp:
    """As much of httpx's client as is used here, on aiohttp itself."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        self._url = url
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))

    async def get(self, path: str) -> aiohttp.ClientResponse:
        async with self._session.get(self._url + path) as response:
            await response.read()
            return response

    async def aclose(self) -> None:
        await self._session.close()

    async def __aenter__(self) -> _Aiohttp:
        return self

    async def __aexit__(self, *ignored: object) -> None:
        await self.aclose()


@dataclass
class Rig:
    """Everything that runs."""

    ca: CertificateAuthority
    friend_ca: CertificateAuthority
    server: Workload
    caller: Workload
    friend: Workload
    source: X509Source
    fixed: ssl.SSLContext
    ports: dict[str, int]
    callee: asyncio.subprocess.Process

    def url(self, kind: str) -> str:
        scheme = "http" if kind == "plain" else "https"
        return f"{scheme}://127.0.0.1:{self.ports[kind]}"

    def client(self, kind: str) -> httpx.AsyncClient | _Aiohttp:
        """What a user of each kind would write: with httpx, or with aiohttp, which ztmtls has underneath."""
        if kind == "ztmtls":
            return AsyncClient(self.source, peer=SERVER, base_url=self.url(kind))
        if kind == "ssl, aiohttp":
            return _Aiohttp(self.url("ssl"), self.fixed)
        verify: Any = self.fixed if kind == "ssl, httpx" else True
        return httpx.AsyncClient(verify=verify, base_url=self.url(kind.split(",")[0]), trust_env=False)

    async def measures(self) -> dict[str, Any]:
        """CPU seconds of the server so far, and its longest stall in seconds since the last call."""
        async with aiohttp.ClientSession() as session, session.get(self.url("plain") + "/measures") as got:
            found: dict[str, Any] = json.loads(await got.read())
            return found


@contextlib.asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    """Start everything; stop it at the end."""
    ca, friend_ca = CertificateAuthority(DOMAIN, ttl=86400), CertificateAuthority("friend.example", ttl=86400)
    ports = dict(zip(PORTS, choose_free_ports(len(PORTS)), strict=True))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        by_hand.write(Path(name), ca, {"server": SERVER, "client": CALLER})
        fixed = by_hand.context(Path(name), "client", ssl.Purpose.SERVER_AUTH)
        async with WorkloadApi() as api:
            server = await api.add_workload("server", SERVER, ca=ca, svid_ttl=3600.0)
            caller = await api.add_workload("caller", CALLER, ca=ca, svid_ttl=3600.0)
            friend = await api.add_workload("friend", FRIEND, ca=friend_ca, svid_ttl=3600.0)
            server.set_federation(friend_ca)
            friend.set_federation(ca)
            caller.allow(pid=os.getpid())
            callee = await start(
                "bench.callee",
                server,
                {
                    "BENCH_PORTS": json.dumps(ports),
                    "BENCH_TLS": name,
                    "BENCH_CALLER": CALLER,
                    "BENCH_FRIEND": FRIEND,
                },
            )
            try:
                async with X509Source(caller.endpoint) as source:
                    await source.ready(30)
                    made = Rig(ca, friend_ca, server, caller, friend, source, fixed, ports, callee)
                    await _until_up(made)
                    yield made
            finally:
                if callee.returncode is None:
                    callee.kill()
                await callee.wait()


async def start(
    module: str, workload: Workload, environment: dict[str, str] | None = None, *arguments: str, **more: Any
) -> asyncio.subprocess.Process:
    """A process of the benchmark that is `workload`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        env=os.environ | {"SPIFFE_ENDPOINT_SOCKET": workload.endpoint} | (environment or {}),
        **more,
    )
    workload.allow(pid=process.pid)
    return process


async def _until_up(made: Rig) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                for kind in KINDS:
                    async with made.client(kind) as client:
                        (await client.get("/")).raise_for_status()
                return
            except (httpx.TransportError, aiohttp.ClientError):
                if made.callee.returncode is not None:
                    raise RuntimeError("the server process ended: its last lines are above") from None
                await asyncio.sleep(0.05)
