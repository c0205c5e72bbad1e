"""Open connections whose peer is no longer acceptable are closed by the server, in good order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse

from tests.mtls.conftest import CALLER, DOMAIN, SERVER, STRANGER, Served, serving, until
from ztmtls.authz import PolicyFile
from ztmtls.live import _FAREWELL_SECONDS, LiveLimits
from ztmtls.reasons import Reason
from ztmtls.server import HttpParser
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import client_context

Raw = tuple[asyncio.StreamReader, asyncio.StreamWriter]
QUICK = LiveLimits(splay=0.0, grace=0.2)
BOTH_PARSERS = pytest.mark.parametrize("http", ["h11", "httptools"])


async def connect(served: Served, caller: StaticSource) -> Raw:
    context = client_context(caller, lambda peer: None)
    return await asyncio.open_connection("127.0.0.1", served.port, ssl=context)


async def ask(raw: Raw, path: str = "/thing") -> tuple[int, str]:
    reader, writer = raw
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
    return int(head.split()[1]), head


async def closed_after(raw: Raw, timeout: float = 10.0) -> float:
    """Seconds until the server closes the connection, which sends nothing any more."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(timeout):
        with contextlib.suppress(ConnectionError):
            assert await raw[0].read() == b""
    raw[1].close()
    return loop.time() - began


def change_authority(ca: CertificateAuthority, server: StaticSource) -> None:
    """A new authority signs, the old one is trusted no more, and the server knows."""
    old = ca.active
    ca.prepare()
    ca.activate()
    ca.revoke(old)
    server.set(ca.context(ca.issue(SERVER)))


def connection_denials(served: Served) -> list[dict[str, Any]]:
    return [line for line in served.audit("deny") if line["event"] == "connection"]


@BOTH_PARSERS
async def test_removed_authority_closes_idle_connections_within_5_s(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority, http: HttpParser
) -> None:
    async with serving(server_source, http=http, live_limits=LiveLimits()) as served:
        used, unused = await connect(served, caller), await connect(served, caller)
        assert (await ask(used))[0] == 200
        change_authority(ca, server_source)
        other = await connect(served, StaticSource(ca.context(ca.issue(CALLER))))
        assert max(await asyncio.gather(closed_after(used), closed_after(unused))) < 5
        assert (await ask(other))[0] == 200, "a peer under the new authority is not touched"
        other[1].close()
        lines = connection_denials(served)
    assert [line["reason"] for line in lines] == [Reason.UNTRUSTED_AUTHORITY] * 2
    assert {line["peer_id"] for line in lines} == {CALLER}


async def test_peer_that_does_not_answer_our_goodbye_is_not_waited_for(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority
) -> None:
    context = client_context(caller, lambda peer: None)
    async with serving(server_source, live_limits=QUICK) as served:
        with await asyncio.to_thread(socket.create_connection, ("127.0.0.1", served.port)) as raw:
            silent = await asyncio.to_thread(context.wrap_socket, raw, suppress_ragged_eofs=False)
            await until(lambda: served.connections == 1)
            change_authority(ca, server_source)
            await until(lambda: served.connections == 0, _FAREWELL_SECONDS / 2)
            assert silent.recv(1) == b"", "it was told, though"


async def test_expired_peer_is_disconnected_without_asking_anything(
    server_source: StaticSource, ca: CertificateAuthority
) -> None:
    async with serving(server_source, live_limits=LiveLimits()) as served:
        raw = await connect(served, StaticSource(ca.context(ca.issue(CALLER, ttl=1))))
        assert (await ask(raw))[0] == 200
        assert await closed_after(raw) < 1 + 5
        assert connection_denials(served)[0]["reason"] == Reason.EXPIRED


async def test_peer_that_the_policy_names_no_more_is_disconnected(
    server_source: StaticSource, ca: CertificateAuthority, tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    rule = "version: 1\nrules:\n  - {name: r, callers: [%s], methods: [GET], paths: [/thing]}\n"
    path.write_text(rule % f"'{CALLER}', '{STRANGER}'")
    policy = PolicyFile(path)
    async with serving(server_source, policy=policy, live_limits=LiveLimits()) as served:
        stays = await connect(served, StaticSource(ca.context(ca.issue(CALLER))))
        goes = await connect(served, StaticSource(ca.context(ca.issue(STRANGER))))
        assert (await ask(stays))[0] == (await ask(goes))[0] == 200
        path.write_text(rule % f"'{CALLER}'")
        assert await closed_after(goes) < 5
        assert (await ask(stays))[0] == 200
        stays[1].close()
        assert [line["reason"] for line in connection_denials(served)] == [Reason.CALLER_NOT_ALLOWED]


async def test_withdrawn_identity_of_our_own_closes_connections(
    server_source: StaticSource, caller: StaticSource
) -> None:
    async with serving(server_source, live_limits=LiveLimits()) as served:
        raw = await connect(served, caller)
        assert (await ask(raw))[0] == 200
        server_source.deny()
        assert await closed_after(raw) < 5
        assert connection_denials(served)[0]["reason"] == Reason.IDENTITY_DENIED


async def test_connections_under_our_own_expired_svid_drain(
    ca: CertificateAuthority, caller: StaticSource
) -> None:
    server = StaticSource(ca.context(ca.issue(SERVER, ttl=2)))
    async with serving(server, live_limits=LiveLimits()) as served:
        idle, busy = await connect(served, caller), await connect(served, caller)
        assert "connection: close" not in (await ask(busy))[1]
        server.set(ca.context(ca.issue(SERVER)))

        async def asking() -> str:
            while "connection: close" not in (answer := await ask(busy))[1]:
                assert answer[0] == 200
                await asyncio.sleep(0.01)
            return answer[1]

        async with asyncio.timeout(10):
            last = await asking()
        assert last.startswith("http/1.1 200"), "the last request is served, too"
        await closed_after(idle)
        await closed_after(busy)
        assert not connection_denials(served), "nobody did anything wrong"


# --- what goes on at that moment ----------------------------------------------------------------------


class SlowApp:
    """Requests that end when they are told to, a stream and a WebSocket that never end."""

    def __init__(self) -> None:
        self.arrived, self.go, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.app = FastAPI()

        @self.app.get("/thing")
        async def slow() -> str:
            self.arrived.set()
            await self.go.wait()
            return "done"

        @self.app.get("/things/{name}")
        async def stream(name: str) -> StreamingResponse:
            async def events() -> AsyncIterator[str]:
                try:
                    while True:
                        yield "data: tick\n\n"
                        self.arrived.set()
                        await asyncio.sleep(0.02)
                finally:
                    self.gone.set()

            return StreamingResponse(events(), media_type="text/event-stream")

        @self.app.websocket("/watch")
        async def watch(ws: WebSocket) -> None:
            await ws.accept()
            try:
                while True:
                    await ws.send_text("tick")
                    await asyncio.sleep(0.02)
            finally:
                self.gone.set()


@BOTH_PARSERS
async def test_request_in_flight_is_let_finish(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority, http: HttpParser
) -> None:
    slow = SlowApp()
    limits = LiveLimits(splay=0.0, grace=30.0)
    async with serving(server_source, app=slow.app, http=http, live_limits=limits) as served:
        raw = await connect(served, caller)
        answer = asyncio.create_task(ask(raw))
        await slow.arrived.wait()
        change_authority(ca, server_source)
        await until(lambda: connection_denials(served))
        assert connection_denials(served)[0]["in_flight"] == 1
        slow.go.set()
        assert (await answer)[0] == 200
        assert await closed_after(raw) < 5


@BOTH_PARSERS
async def test_response_that_streams_is_ended(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority, http: HttpParser
) -> None:
    slow = SlowApp()
    async with serving(server_source, app=slow.app, http=http, live_limits=QUICK) as served:
        async with served.client(caller) as client, client.stream("GET", "/things/events") as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            assert await anext(lines) == "data: tick"
            change_authority(ca, server_source)
            async with asyncio.timeout(5):
                with pytest.raises(httpx.TransportError):
                    async for _ in lines:
                        pass
        async with asyncio.timeout(5):
            await slow.gone.wait()
        await until(lambda: served.connections == 0)


def flooding_app() -> tuple[FastAPI, asyncio.Event]:
    """An application whose answer has no end, and the event that says that it was cut off."""
    app = FastAPI()
    gone = asyncio.Event()

    @app.get("/thing")
    async def flood() -> StreamingResponse:
        async def much() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)
            finally:
                gone.set()

        return StreamingResponse(much())

    return app, gone


async def test_stream_that_nobody_reads_is_ended_too(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority
) -> None:
    """Its buffers are full: a polite close would wait for ever."""
    app, gone = flooding_app()
    async with serving(server_source, app=app, live_limits=QUICK) as served:
        reader, writer = await connect(served, caller)
        writer.write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        change_authority(ca, server_source)
        await until(lambda: served.connections == 0, 15)
        writer.transport.abort()
        async with asyncio.timeout(5):
            await gone.wait()


async def read_on(ws: websockets.ClientConnection) -> None:
    while True:
        await ws.recv()


async def test_websocket_is_closed_with_the_reason(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority
) -> None:
    slow = SlowApp()
    async with serving(server_source, app=slow.app, live_limits=QUICK) as served:
        address = f"wss://127.0.0.1:{served.port}/watch"
        async with websockets.connect(address, ssl=client_context(caller, lambda peer: None)) as ws:
            assert await ws.recv() == "tick"
            change_authority(ca, server_source)
            async with asyncio.timeout(5):
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await read_on(ws)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, Reason.UNTRUSTED_AUTHORITY)
        async with asyncio.timeout(5):
            await slow.gone.wait()


async def test_stream_whose_rule_is_withdrawn_is_ended_and_the_peer_stays(
    server_source: StaticSource, caller: StaticSource, tmp_path: Path
) -> None:
    slow = SlowApp()
    path = tmp_path / "policy.yaml"
    rule = "version: 1\nrules:\n  - {name: r, callers: ['%s'], methods: [GET], paths: [%s]}\n"
    path.write_text(rule % (CALLER, "/thing, '/things/{name}'"))
    async with (
        serving(server_source, app=slow.app, policy=PolicyFile(path), live_limits=QUICK) as served,
        served.client(caller) as client,
    ):
        async with client.stream("GET", "/things/events") as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "data: tick"
            path.write_text(rule % (CALLER, "/thing"))
            async with asyncio.timeout(10):
                with pytest.raises(httpx.TransportError):
                    async for _ in lines:
                        pass
        assert connection_denials(served)[0]["reason"] == Reason.ROUTE_NOT_ALLOWED
        slow.go.set()
        assert (await client.get("/thing")).status_code == 200


# --- without a storm ----------------------------------------------------------------------------------


async def test_peer_that_becomes_acceptable_again_is_not_disconnected(
    served: Served, server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority
) -> None:
    raw = await connect(served, caller)
    good = server_source.context
    foreign = CertificateAuthority(DOMAIN)
    async with serving(server_source, live_limits=LiveLimits(splay=1.0)) as other:
        again = await connect(other, caller)
        assert (await ask(again))[0] == 200
        server_source.set(foreign.context(foreign.issue(SERVER)))
        assert other.probes is not None
        live = other.probes._collector.live
        assert live is not None
        await until(lambda: all(found.refusal for found in live._all.values()))
        server_source.set(good)
        with pytest.raises(TimeoutError):
            await closed_after(again, 2.5)
        assert (await ask(again))[0] == 200
        assert not connection_denials(other)
        again[1].close()
    raw[1].close()


async def test_many_connections_are_closed_at_a_limited_rate(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority
) -> None:
    number, per_second = 60, 40.0
    limits = LiveLimits(splay=0.0, per_second=per_second)
    loop = asyncio.get_running_loop()
    async with serving(server_source, live_limits=limits) as served:
        raws = [await connect(served, caller) for _ in range(number)]
        await until(lambda: served.connections == number)

        async def moment(raw: Raw) -> float:
            await closed_after(raw, 20)
            return loop.time()

        watching = [asyncio.create_task(moment(raw)) for raw in raws]
        change_authority(ca, server_source)
        moments = sorted(await asyncio.gather(*watching))
    # 60 at no more than 40 a second take at least 1.5 s, first to last
    assert moments[-1] - moments[0] > (number - 1) / per_second * 0.9


async def test_closing_is_splayed(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority
) -> None:
    loop = asyncio.get_running_loop()
    async with serving(server_source, live_limits=LiveLimits(splay=1.5)) as served:
        raws = [await connect(served, caller) for _ in range(30)]

        async def moment(raw: Raw) -> float:
            await closed_after(raw)
            return loop.time()

        watching = [asyncio.create_task(moment(raw)) for raw in raws]
        change_authority(ca, server_source)
        moments = sorted(await asyncio.gather(*watching))
    assert moments[-1] - moments[0] > 0.5, "30 random moments within 1.5 s"


def test_limits_that_make_no_sense_are_refused() -> None:
    for broken in ({"splay": -1}, {"per_second": 0}, {"grace": -1}, {"idle": 0}):
        with pytest.raises(ValueError, match="must be"):
            LiveLimits(**broken)


# --- connections on which nothing happens -------------------------------------------------------------


async def test_half_open_handshake_is_ended_after_5_s(served: Served, caller: StaticSource) -> None:
    raw = await connect(served, caller)
    assert (await ask(raw))[0] == 200
    raw[1].close()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    assert await closed_after((reader, writer)) < 8


@BOTH_PARSERS
@pytest.mark.parametrize("sent", [b"", b"GET /thing HTTP/1.1\r\nhost: x\r\n"], ids=["nothing", "half a head"])
async def test_connection_without_a_request_is_closed(
    server_source: StaticSource, caller: StaticSource, http: HttpParser, sent: bytes
) -> None:
    async with serving(server_source, http=http, live_limits=LiveLimits(idle=0.5)) as served:
        raw = await connect(served, caller)
        raw[1].write(sent)
        assert await closed_after(raw) < 5


@BOTH_PARSERS
async def test_body_that_stops_coming_is_not_waited_for(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with serving(server_source, http=http, live_limits=LiveLimits(idle=0.5)) as served:
        raw = await connect(served, caller)
        raw[1].write(b"POST /thing HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n12345")
        assert await closed_after(raw) < 5
        assert served.seen == []


@BOTH_PARSERS
async def test_answer_that_nobody_reads_is_given_up(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    app, gone = flooding_app()
    limits = LiveLimits(idle=0.5)
    async with serving(server_source, app=app, http=http, live_limits=limits) as served:
        reader, writer = await connect(served, caller)
        writer.write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        async with asyncio.timeout(15):
            await gone.wait()
        await until(lambda: served.connections == 0)
        writer.transport.abort()


async def test_application_that_takes_its_time_is_not_its_callers_fault(
    server_source: StaticSource, caller: StaticSource
) -> None:
    slow = SlowApp()
    async with serving(server_source, app=slow.app, live_limits=LiveLimits(idle=0.2)) as served:
        raw = await connect(served, caller)
        answer = asyncio.create_task(ask(raw))
        await slow.arrived.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(answer), 2.5)
        slow.go.set()
        assert (await answer)[0] == 200
        raw[1].close()


async def test_silent_websocket_is_no_idle_connection(
    server_source: StaticSource, caller: StaticSource
) -> None:
    app = FastAPI()

    @app.websocket("/watch")
    async def echo(ws: WebSocket) -> None:
        await ws.accept()
        await ws.send_text(await ws.receive_text())

    async with serving(server_source, app=app, live_limits=LiveLimits(idle=0.2)) as served:
        address = f"wss://127.0.0.1:{served.port}/watch"
        async with websockets.connect(address, ssl=client_context(caller, lambda peer: None)) as ws:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ws.recv(), 2.5)
            await ws.send("hello")
            assert await ws.recv() == "hello"


async def test_open_connections_are_counted_by_generation(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority
) -> None:
    async with serving(server_source) as served:
        assert served.probes is not None
        first = await connect(served, caller)
        server_source.set(ca.context(ca.issue(SERVER)))
        second, third = await connect(served, caller), await connect(served, caller)

        def counts() -> dict[str, float]:
            assert served.probes is not None
            families = {f.name: f for f in served.probes._collector.collect()}
            samples = families["ztmtls_live_connections"].samples
            return {sample.labels["generation"]: sample.value for sample in samples}

        await until(lambda: counts() == {"1": 1.0, "2": 2.0})
        for raw in (first, second, third):
            raw[1].close()
        await until(lambda: counts() == {})


async def test_connection_that_breaks_is_forgotten(served: Served, caller: StaticSource) -> None:
    raw = await connect(served, caller)
    assert (await ask(raw))[0] == 200
    sock: socket.socket = raw[1].get_extra_info("socket")
    assert served.connections == 1
    assert json.dumps(sock.getpeername())
    raw[1].transport.abort()
    await until(lambda: served.connections == 0)
