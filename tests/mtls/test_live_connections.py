"""Rotation, withdrawal and expiry on connections that are already open, and how a server stops."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse

from tests.mtls.conftest import CALLER, DOMAIN, POLICY, SERVER, Served, make_app, serving, until
from ztmtls import fastapi as ztfastapi
from ztmtls.audit import AuditLog
from ztmtls.authz import PolicyError, PolicyFile
from ztmtls.client import Client, hop
from ztmtls.identity import request_identity
from ztmtls.listen import PortInUse
from ztmtls.reasons import Reason
from ztmtls.server import HttpParser, _loop_factory, serve
from ztmtls.source import NoIdentity, StaticSource
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import client_context


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_same_identity_in_every_mode(loop: Any, http: HttpParser) -> None:
    async def main() -> None:
        ca = CertificateAuthority(DOMAIN)
        caller = StaticSource(ca.context(ca.issue(CALLER)))
        async with serving(StaticSource(ca.context(ca.issue(SERVER))), http=http) as served:
            async with served.client(caller) as client:
                first = await client.get("/thing")
                second = await client.post("/thing", content=b"x" * 200_000)
            assert first.json()["hop"]["connection"] == second.json()["hop"]["connection"], "kept alive"
            for response in (first, second):
                assert response.json()["hop"]["peer"]["id"] == CALLER
                assert hop(response).peer.id == SERVER
                assert hop(response).own.serial == response.json()["hop"]["peer"]["serial"]
                assert hop(response).peer.serial == response.json()["hop"]["own"]["serial"]
                assert hop(response).tls_version == response.json()["hop"]["tls_version"] == "TLSv1.3"
            assert first.json()["hop"]["rule"] == "caller-reads"
            assert second.json()["hop"]["rule"] == "caller-writes"
            assert [line["rule"] for line in served.audit("allow")] == ["caller-reads", "caller-writes"]

    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        runner.run(main())


async def test_rotation_under_load_fails_no_request(ca: CertificateAuthority) -> None:
    caller = StaticSource(ca.context(ca.issue(CALLER)))
    server = StaticSource(ca.context(ca.issue(SERVER)))
    done = Counter[str]()
    stop = False

    async with serving(server) as served, served.client(caller) as client:

        async def load() -> None:
            while not stop:
                response = await client.post("/thing", content=b"x")
                assert response.status_code == 200
                done[hop(response).own.serial] += 1
                done[hop(response).peer.serial] += 1

        async def everybody_moved_on() -> None:
            before = len(served.seen)
            await until(lambda: len(served.seen) > before + 8)

        workers = [asyncio.create_task(load()) for _ in range(4)]
        for turn in range(20):
            new_authority = turn % 5 == 4
            old = ca.active
            if new_authority:  # published first, then used
                ca.prepare()
                for source in (server, caller):
                    source.set(ca.context(*source.context.svids))
                ca.activate()
            for source, name in ((server, SERVER), (caller, CALLER)):
                source.set(ca.context(ca.issue(name)))
            await everybody_moved_on()
            if new_authority:  # withdrawn when nobody presents what it signed
                ca.retire(old)
                for source in (server, caller):
                    source.set(ca.context(*source.context.svids))
                await everybody_moved_on()
        stop = True
        await asyncio.gather(*workers)
    assert len(done) >= 40, "every rotation was used on both sides"
    assert not served.audit("deny")


async def test_caller_retires_connections_of_its_old_svid(served: Served, ca: CertificateAuthority) -> None:
    caller = StaticSource(ca.context(ca.issue(CALLER)))
    async with served.client(caller) as client:
        before = hop(await client.get("/thing"))
        caller.set(ca.context(ca.issue(CALLER)))
        after = hop(await client.get("/thing"))
    assert before.connection != after.connection
    assert after.own.serial == caller.context.svid.serial != before.own.serial


async def raw_connection(
    served: Served, caller: StaticSource
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = client_context(caller, lambda peer: None)
    return await asyncio.open_connection("127.0.0.1", served.port, ssl=context)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, dict[str, Any]]:
    writer.write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    body = json.loads(await reader.readexactly(length))
    return int(head.split()[1]), body | {"closing": "connection: close" in head}


async def test_kept_connection_of_a_withdrawn_authority_is_refused_and_closed(
    served: Served, caller: StaticSource, ca: CertificateAuthority, server_source: StaticSource
) -> None:
    reader, writer = await raw_connection(served, caller)
    assert (await ask(reader, writer))[0] == 200
    old = ca.active
    ca.prepare()
    ca.activate()
    ca.revoke(old)
    server_source.set(ca.context(ca.issue(SERVER)))
    status, problem = await ask(reader, writer)
    assert (status, problem["reason"], problem["closing"]) == (401, Reason.UNTRUSTED_AUTHORITY, True)
    assert await reader.read() == b"", "closed by the server"
    writer.close()
    assert served.audit("deny")[-1]["reason"] == Reason.UNTRUSTED_AUTHORITY
    assert len(served.seen) == 1


async def test_kept_connection_is_refused_once_its_svid_expired(
    served: Served, ca: CertificateAuthority
) -> None:
    caller = StaticSource(ca.context(ca.issue(CALLER, ttl=1)))
    reader, writer = await raw_connection(served, caller)
    assert (await ask(reader, writer))[0] == 200
    loop = asyncio.get_running_loop()
    end = loop.time() + 5
    while (answer := await ask(reader, writer))[0] == 200:
        assert loop.time() < end
        await asyncio.sleep(0.05)
    assert (answer[0], answer[1]["reason"], answer[1]["closing"]) == (401, Reason.EXPIRED, True)
    writer.close()


async def test_server_without_an_identity_serves_nothing(
    served: Served, caller: StaticSource, server_source: StaticSource
) -> None:
    reader, writer = await raw_connection(served, caller)
    assert (await ask(reader, writer))[0] == 200
    server_source.deny()
    status, problem = await ask(reader, writer)
    assert (status, problem["reason"]) == (503, Reason.IDENTITY_DENIED)
    writer.close()
    async with served.client(caller) as client:
        with pytest.raises(httpx.TransportError):
            await client.post("/thing")
    assert len(served.seen) == 1
    assert served.audit("deny")[-1]["reason"] == Reason.IDENTITY_DENIED


def test_rotating_context_can_not_be_opened_up(ca: CertificateAuthority) -> None:
    context = client_context(StaticSource(ca.context(ca.issue(CALLER))), lambda peer: None)
    with pytest.raises(TypeError):
        context.load_verify_locations(cadata="x")
    with pytest.raises(TypeError):
        context.load_cert_chain("x")
    assert context.get_ca_certs() == []


# --- the guard fails closed ---------------------------------------------------------------------------


async def test_application_behind_plain_http_has_no_peer() -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app([])), base_url="http://x") as client:
        response = await client.get("/thing")
    assert (response.status_code, response.json()["reason"]) == (403, Reason.NO_PEER)


# --- policy -------------------------------------------------------------------------------------------


async def test_broken_policy_never_replaces_a_good_one(
    ca: CertificateAuthority, caller: StaticSource, server_source: StaticSource, tmp_path: Path
) -> None:
    good = f"version: 1\nrules:\n  - {{name: r, callers: ['{CALLER}'], methods: [GET], paths: ['/thing']}}\n"
    path = tmp_path / "policy.yaml"
    path.write_text(good)
    policy = PolicyFile(path)
    async with serving(server_source, policy=policy) as served, served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200
        for broken in ("rules: [", "", "version: 1\nrules: []\n", good.replace("version: 1", "version: 2")):
            path.write_text(broken)
            await until(lambda: not policy.reload_if_changed() and policy.last_error is not None)
            assert (await client.get("/thing")).status_code == 200
            assert (await client.get("/things/1")).status_code == 403
        path.unlink()
        policy.reload_if_changed()
        assert (await client.get("/thing")).status_code == 200
        path.write_text(good.replace("/thing'", "/things/{id}'"))
        await until(lambda: policy.version == 2)  # by the server's own watch
        assert policy.last_error is None
        assert (await client.get("/things/1")).status_code == 200
        assert (await client.get("/thing")).status_code == 403


def test_service_does_not_start_on_a_broken_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    with pytest.raises(PolicyError, match="can't be read"):
        PolicyFile(path)
    path.write_text("version: 1\nrules: [{name: x}]\n")
    with pytest.raises(PolicyError, match=r"rules\[0\]: 'callers'"):
        PolicyFile(path)


# --- starting and stopping ----------------------------------------------------------------------------


async def test_server_without_an_identity_does_not_start(server_source: StaticSource) -> None:
    server_source.deny()
    with pytest.raises(NoIdentity):
        async with serving(server_source):
            pass


async def test_port_in_use_says_which(served: Served, server_source: StaticSource) -> None:
    with pytest.raises(PortInUse, match=rf"PORT: 127\.0\.0\.1:{served.port} is in use"):
        await serve(
            make_app([]),
            source=server_source,
            policy=POLICY,
            host="127.0.0.1",
            port=served.port,
            audit=AuditLog("x", io.StringIO()),
        )


async def test_stop_finishes_what_is_in_flight(caller: StaticSource, server_source: StaticSource) -> None:
    app = FastAPI()
    arrived, go = asyncio.Event(), asyncio.Event()

    @app.post("/thing")
    async def slow(request: Request) -> dict[str, int]:
        arrived.set()
        await go.wait()
        return {"body": len(await request.body())}

    async with serving(server_source, app=app, grace=5) as served, served.client(caller) as client:
        call = asyncio.create_task(client.post("/thing", content=b"12345"))
        await arrived.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        assert served.probes is not None
        await until(lambda: served.probes is not None and served.probes.draining)
        assert (await served.probes.readiness())["service"] == "draining"
        go.set()
        response = await call
        assert response.json() == {"body": 5}


async def test_streams_and_websockets_have_the_same_identity(
    caller: StaticSource, server_source: StaticSource, ca: CertificateAuthority
) -> None:
    app = FastAPI()
    ztfastapi.install(app)

    @app.get("/thing")
    async def stream(request: Request) -> StreamingResponse:
        peer = request_identity(request.scope).connection.peer

        async def lines() -> AsyncIterator[str]:
            for n in range(3):
                yield f"{n} {peer.id}\n"

        return StreamingResponse(lines())

    @app.websocket("/watch")
    async def watch(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(str(request_identity(socket.scope).connection.peer.id))
        await socket.close()

    async with serving(server_source, app=app) as served:
        async with served.client(caller) as client, client.stream("GET", "/thing") as response:
            assert hop(response).peer.id == SERVER
            assert [line async for line in response.aiter_lines()] == [f"{n} {CALLER}" for n in range(3)]
        address = f"wss://127.0.0.1:{served.port}/watch"
        async with websockets.connect(address, ssl=client_context(caller, lambda peer: None)) as ws:
            assert await ws.recv() == CALLER
        other = StaticSource(ca.context(ca.issue("spiffe://zt.example/other")))
        with pytest.raises(websockets.InvalidStatus, match="403"):
            await websockets.connect(address, ssl=client_context(other, lambda peer: None))
        assert served.audit("deny")[-1]["method"] == "WEBSOCKET"


async def test_blocking_client_rotates_too(served: Served, ca: CertificateAuthority) -> None:
    caller = StaticSource(ca.context(ca.issue(CALLER)))

    def calls() -> list[str]:
        with Client(caller, peer=SERVER, base_url=served.url) as client:
            first = client.get("/thing")
            again = client.get("/thing")
            assert hop(first).connection == hop(again).connection
            caller.set(ca.context(ca.issue(CALLER)))
            third = client.get("/thing")
            return [hop(r).own.serial for r in (first, third)] + [third.json()["hop"]["peer"]["serial"]]

    first, third, seen = await asyncio.to_thread(calls)
    assert first != third == seen


# --- bodies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("declared", [True, False])
async def test_body_past_the_limit_is_refused(
    caller: StaticSource, server_source: StaticSource, http: HttpParser, declared: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000

    async with serving(server_source, http=http) as served, served.client(caller) as client:
        fits = await client.post("/thing", content=b"x" * 1_000_000)
        assert fits.json()["body"] == 1_000_000
        response = await client.post("/thing", content=b"x" * 2_000_000 if declared else chunks())
        assert (response.status_code, response.json()["reason"]) == (413, Reason.TOO_LARGE)
        assert served.audit("deny")[-1]["reason"] == Reason.TOO_LARGE
        assert len(served.seen) == 1
        assert (await client.get("/thing")).status_code == 200
