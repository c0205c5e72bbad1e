"""A server and its callers in one process: real sockets, real TLS, real certificates."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI, Request

from ztmtls import fastapi as ztfastapi
from ztmtls.audit import AuditLog
from ztmtls.authz import Authorizer, Policy
from ztmtls.client import AsyncClient
from ztmtls.fastapi import Hop
from ztmtls.listen import bind
from ztmtls.live import LiveLimits
from ztmtls.probes import Probes
from ztmtls.server import HttpParser, serve
from ztmtls.source import Source, StaticSource
from ztmtls.testing import CertificateAuthority

DOMAIN = "zt.example"
CALLER = "spiffe://zt.example/ns/zt-demo/sa/caller"
SERVER = "spiffe://zt.example/ns/zt-demo/sa/server"
STRANGER = "spiffe://zt.example/ns/zt-demo/sa/stranger"

# Long enough that a request always comes before the connection is closed: tests of closing say otherwise.
PATIENT = LiveLimits(splay=3600.0)

POLICY = Policy.parse(
    {
        "version": 1,
        "rules": [
            {
                "name": "caller-reads",
                "callers": [CALLER],
                "methods": ["GET"],
                "paths": ["/thing", "/things/{id}"],
            },
            {"name": "caller-writes", "callers": [CALLER], "methods": ["POST"], "paths": ["/thing"]},
            {"name": "caller-watches", "callers": [CALLER], "methods": ["WEBSOCKET"], "paths": ["/watch"]},
        ],
    }
)


def make_app(seen: list[dict[str, Any]]) -> FastAPI:
    """An application that says what it saw; `seen` holds every request that reached a handler."""
    app = FastAPI(openapi_url=None)
    ztfastapi.install(app)

    @app.api_route("/thing", methods=["GET", "POST"])
    @app.get("/things/{id}")
    @app.get("/unlisted")
    async def thing(request: Request, hop: Hop) -> dict[str, Any]:
        answer = {"path": request.url.path, "hop": hop.as_dict(), "body": len(await request.body())}
        seen.append(answer)
        return answer

    return app


@dataclass
class Served:
    """A running server: its address, what reached its handlers, and its audit log."""

    port: int
    source: Source
    audit_stream: io.StringIO
    seen: list[dict[str, Any]] = field(default_factory=list)
    probes: Probes | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def audit(self, decision: str | None = None) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.audit_stream.getvalue().splitlines()]
        return [line for line in lines if decision in (None, line["decision"])]

    @property
    def connections(self) -> int:
        """How many connections the server has open."""
        assert self.probes is not None
        families = self.probes._collector.collect()
        found = next(family for family in families if family.name == "ztmtls_live_connections")
        return round(sum(sample.value for sample in found.samples))

    def client(self, source: Source, peer: Any = SERVER) -> AsyncClient:
        return AsyncClient(source, peer=peer, base_url=self.url)


def free_port() -> int:
    with bind("127.0.0.1", 0, "PORT") as sock:
        return int(sock.getsockname()[1])


async def until(condition: Any, timeout: float = 5.0) -> None:
    """Wait until `condition()` is true, or fail after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(
    source: Source,
    *,
    policy: Any = POLICY,
    allowed_peers: Authorizer | None = None,
    http: HttpParser = "auto",
    app: Any = None,
    grace: float = 1.0,
    live_limits: LiveLimits = PATIENT,
    tracer: Any = None,
    port: int | None = None,
) -> AsyncIterator[Served]:
    """Run `server.serve`, on a free port if none is named."""
    served = Served(port or free_port(), source, io.StringIO())
    served.probes = Probes("127.0.0.1", free_port(), source=source)
    task = asyncio.create_task(
        serve(
            app or make_app(served.seen),
            source=source,
            policy=policy,
            host="127.0.0.1",
            port=served.port,
            audit=AuditLog("server", served.audit_stream),
            allowed_peers=allowed_peers,
            http=http,
            grace=grace,
            live_limits=live_limits,
            tracer=tracer,
            probes=served.probes,
        )
    )
    try:
        await until(lambda: task.done() or (served.probes and served.probes.serving))
        if task.done():
            await task
        yield served
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority(DOMAIN)


@pytest.fixture
def caller(ca: CertificateAuthority) -> StaticSource:
    return StaticSource(ca.context(ca.issue(CALLER)))


@pytest.fixture
def server_source(ca: CertificateAuthority) -> StaticSource:
    return StaticSource(ca.context(ca.issue(SERVER)))


@pytest.fixture
async def served(server_source: StaticSource) -> AsyncIterator[Served]:
    async with serving(server_source) as server:
        yield server
