"""What a request may look like on the wire, and how long it may take: a verified caller sends raw bytes.

Each test begins with a rightful request on the same server, and counts what reached the application.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response, WebSocket

from tests.mtls.conftest import CALLER, SERVER, Served, serving, until
from ztmtls import fastapi as ztfastapi
from ztmtls.authz import exact
from ztmtls.fastapi import Problem
from ztmtls.live import LiveLimits
from ztmtls.reasons import Reason
from ztmtls.server import HttpParser
from ztmtls.source import StaticSource
from ztmtls.tls import client_context

PARSERS: list[HttpParser] = ["h11", "httptools"]
RIGHTFUL = b"POST /thing HTTP/1.1\r\nHost: server\r\nContent-Length: 2\r\n\r\nok"

# Each has one meaning to one program and another to the next.
SHAPES = {
    "length and chunked": b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked and length": b"POST /thing HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 4\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "two lengths": b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length: 2\r\nContent-Length: 4\r\n\r\nokok",
    "lengths in one": b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length: 2, 4\r\n\r\nokok",
    "signed length": b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length: +2\r\n\r\nok",
    "chunked twice": b"POST /thing HTTP/1.1\r\nHost: s\r\n"
    b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "another coding": b"POST /thing HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "length and chunked, to where nobody may": b"POST /unlisted HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "space before a folded line": b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length\r\n : 2\r\n\r\nok",
    "return in a value": b"POST /thing HTTP/1.1\r\nHost: s\r\nX-A: b\rContent-Length: 2\r\n\r\nok",
    "space before colon": b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length : 2\r\n\r\nok",
    "no request": b"\x16\x03\x01\x02\x00 what is this\r\n\r\n",
    "wrong chunk size": b"POST /thing HTTP/1.1\r\nHost: s\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n",
}


@asynccontextmanager
async def connected(served: Served, source: StaticSource) -> AsyncIterator[tuple[Any, Any]]:
    context = client_context(source, authorizer=exact(SERVER))
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context, server_hostname="")
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status_of(reader: Any) -> int:
    """Read an answer to its end: its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
    return int(head.split()[1])


async def answer_to(served: Served, source: StaticSource, data: bytes) -> int | None:
    """The status of the answer; None when the connection was closed without one."""
    async with asyncio.timeout(5), connected(served, source) as (reader, writer):
        writer.write(data)
        line = await reader.readline()
        return int(line.split()[1]) if line else None


@pytest.mark.parametrize("http", PARSERS)
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_request_with_two_meanings_is_refused_and_nothing_follows_it(
    server_source: StaticSource, caller: StaticSource, http: HttpParser, shape: str
) -> None:
    async with serving(server_source, http=http) as served:
        assert await answer_to(served, caller, RIGHTFUL) == 200
        assert len(served.seen) == 1
        # A second request rides in the same bytes: it must not be served either.
        status = await answer_to(served, caller, SHAPES[shape] + RIGHTFUL)
        assert status in (400, 501)
        assert len(served.seen) == 1
        denial = served.audit("deny")[-1]
        assert (denial["event"], denial["reason"]) == ("request", "malformed_request")
        assert denial["peer_id"] == CALLER
        assert await answer_to(served, caller, RIGHTFUL) == 200


@pytest.mark.parametrize("http", PARSERS)
async def test_a_body_that_comes_too_slowly_is_refused(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with serving(server_source, http=http, live_limits=LiveLimits(request=0.3)) as served:
        assert await answer_to(served, caller, RIGHTFUL) == 200
        assert await answer_to(served, caller, RIGHTFUL[:-1]) == 408
        assert len(served.seen) == 1
        denial = served.audit("deny")[-1]
        assert (denial["event"], denial["reason"]) == ("request", "request_timeout")


@pytest.mark.parametrize("http", PARSERS)
async def test_a_body_that_is_too_large_is_not_waited_for_longer_than_any_other(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    """The denial is written down at once, whenever the caller lets go."""
    head = b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length: 4000000\r\n\r\n"
    async with serving(server_source, http=http, live_limits=LiveLimits(request=0.5)) as served:
        assert await answer_to(served, caller, RIGHTFUL) == 200
        async with asyncio.timeout(5), connected(served, caller) as (reader, writer):
            writer.write(head)
            reading = asyncio.create_task(reader.readline())
            await until(lambda: served.audit("deny"))
            assert not reading.done()
            while not reading.done():
                writer.write(b"x")
                await asyncio.wait({reading}, timeout=0.05)
            assert b" 413 " in reading.result()
            assert b"connection: close" in (await reader.read()).lower()
        assert len(served.seen) == 1
        assert [(line["event"], line["reason"]) for line in served.audit("deny")] == [
            ("request", "too_large")
        ]


@pytest.mark.parametrize("http", PARSERS)
async def test_a_body_that_comes_after_the_answer_is_no_slow_head(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    head = b"POST /unlisted HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n\r\n"
    async with (
        serving(server_source, http=http, live_limits=LiveLimits(request=0.2)) as served,
        asyncio.timeout(10),
        connected(served, caller) as (reader, writer),
    ):
        writer.write(RIGHTFUL)
        assert await status_of(reader) == 200
        writer.write(head)
        assert await status_of(reader) == 403
        writer.write(b"ok")
        await asyncio.sleep(2.5)  # several looks of the watch: nothing to wait for with a condition
        writer.write(b"ok" + RIGHTFUL)
        assert await status_of(reader) == 200
        assert [line["reason"] for line in served.audit("deny")] == ["route_not_allowed"]


@pytest.mark.parametrize("http", PARSERS)
async def test_half_a_head_has_its_time_from_the_end_of_the_request_before_it(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    app, release = FastAPI(), asyncio.Event()

    @app.post("/thing")
    async def slow(request: Request) -> str:
        await request.body()
        await release.wait()
        return "done"

    async with (
        serving(server_source, app=app, http=http, live_limits=LiveLimits(request=0.3)) as served,
        asyncio.timeout(10),
        connected(served, caller) as (reader, writer),
    ):
        writer.write(RIGHTFUL + RIGHTFUL[:20])
        await asyncio.sleep(2.5)  # several looks of the watch: nothing to wait for with a condition
        assert served.audit("deny") == []
        release.set()
        assert await status_of(reader) == 200
        assert await reader.read() == b""
        denial = served.audit("deny")[-1]
        assert (denial["event"], denial["reason"]) == ("connection", "request_timeout")


@pytest.mark.parametrize("http", PARSERS)
async def test_a_fault_of_the_body_after_the_answer_began_is_written_down(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] == "http.request":
            pass
        await send({"type": "http.response.body", "body": b""})

    head = b"POST /thing HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n\r\n"
    async with serving(server_source, app=app, http=http, live_limits=LiveLimits(request=0.3)) as served:
        async with asyncio.timeout(5), connected(served, caller) as (reader, writer):
            writer.write(head + b"ok")
            assert b" 200 " in await reader.readline()
            await until(lambda: served.audit("deny"))
        denial = served.audit("deny")[-1]
        assert (denial["event"], denial["reason"]) == ("request", "request_timeout")


@pytest.mark.parametrize("http", PARSERS)
async def test_a_handler_that_is_slow_to_read_does_not_use_up_the_time_of_the_body(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    app = FastAPI()

    @app.post("/thing")
    async def slow(request: Request) -> int:
        await asyncio.sleep(0.6)
        return len(await request.body())

    async with (
        serving(server_source, app=app, http=http, live_limits=LiveLimits(request=0.3)) as served,
        served.client(caller) as client,
    ):
        # More than is read ahead, so that the rest has still to be asked for.
        assert (await client.post("/thing", content=b"x" * 500_000)).json() == 500_000
        assert served.audit("deny") == []


@pytest.mark.parametrize("http", PARSERS)
async def test_a_websocket_that_comes_to_nothing_is_a_line(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    app = FastAPI()

    @app.websocket("/watch")
    async def watch(ws: WebSocket) -> None:
        if "welcome" in ws.query_params:
            await ws.accept()
        await ws.close()

    lines = [
        b"Host: s",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        b"\r\n",
    ]

    def handshake(path: bytes, version: bytes = b"13") -> bytes:
        text = b"\r\n".join([b"GET %s HTTP/1.1" % path, *lines])
        return text.replace(b"Version: 13", b"Version: " + version)

    async with serving(server_source, app=app, http=http) as served:
        assert await answer_to(served, caller, handshake(b"/watch?welcome")) == 101
        assert served.audit("deny") == []
        assert await answer_to(served, caller, handshake(b"/watch")) == 403
        await until(lambda: served.audit("deny"))
        assert await answer_to(served, caller, handshake(b"/watch", version=b"1")) == 400
        told = [(line["event"], line["reason"], line["peer_id"]) for line in served.audit("deny")]
        assert told == [("application", "http_error", CALLER), ("request", "malformed_request", CALLER)]


@pytest.mark.parametrize("http", PARSERS)
async def test_headers_that_come_too_slowly_end_the_connection(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with serving(server_source, http=http, live_limits=LiveLimits(request=0.3)) as served:
        async with asyncio.timeout(8), connected(served, caller) as (reader, writer):
            writer.write(RIGHTFUL)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            writer.write(RIGHTFUL[:20])
            await reader.read()  # to the end
        assert len(served.seen) == 1
        denial = served.audit("deny")[-1]
        assert (denial["event"], denial["reason"]) == ("connection", "request_timeout")


@pytest.mark.parametrize("http", PARSERS)
async def test_a_handler_may_take_longer_than_a_request_may(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    app = FastAPI()

    @app.post("/thing")
    async def slow(request: Request) -> str:
        await request.body()
        await asyncio.sleep(0.6)
        return "done" if not await request.is_disconnected() else "gone"

    async with (
        serving(server_source, app=app, http=http, live_limits=LiveLimits(request=0.3)) as served,
        served.client(caller) as client,
    ):
        assert (await client.post("/thing", content=b"ok")).json() == "done"
        assert served.audit("deny") == []


async def test_an_idle_connection_is_not_a_slow_request(
    server_source: StaticSource, caller: StaticSource
) -> None:
    async with (
        serving(server_source, live_limits=LiveLimits(request=0.2)) as served,
        connected(served, caller) as (
            reader,
            writer,
        ),
    ):
        for _ in range(2):
            writer.write(RIGHTFUL)
            assert await status_of(reader) == 200
            await asyncio.sleep(1.5)  # several looks of the watch: nothing to wait for with a condition
        assert len(served.seen) == 2
        assert served.audit("deny") == []


async def test_what_the_application_refuses_is_a_line_with_its_own_reason(
    server_source: StaticSource, caller: StaticSource
) -> None:
    app = FastAPI(openapi_url=None)
    ztfastapi.install(app)

    @app.get("/thing")
    async def thing() -> str:
        return "ok"

    @app.get("/things/{name}")
    async def things(name: str) -> Response:
        if name == "replayed":
            return Response("again", headers={"Idempotency-Replayed": "true"})
        if name == "plain":
            return Response("no", 409)
        if name == "unknown":
            return Response('{"reason": "made_up"}', 422, media_type="application/problem+json")
        if name == "fault":
            return Response("broken", 500)
        raise Problem(402, Reason.PAYMENT_DECLINED, "No")

    async with serving(server_source, app=app) as served, served.client(caller) as client:

        async def told(path: str, method: str = "GET") -> list[tuple[str, Any, Any]]:
            before = len(served.audit())
            await client.request(method, path)
            lines = served.audit()[before:]
            assert (lines[0]["event"], lines[0]["decision"]) == ("request", "allow")
            assert all(line["peer_id"] == CALLER and line["path"] == path for line in lines)
            return [(line["decision"], line["reason"], line["status"]) for line in lines[1:]]

        assert await told("/thing") == []
        assert await told("/things/x") == [("deny", "payment_declined", 402)]
        assert await told("/things/plain") == [("deny", "conflict", 409)]
        assert await told("/things/unknown") == [("deny", "invalid_request", 422)]
        assert await told("/things/fault") == []  # a fault of ours is an error in the log, no decision
        assert await told("/thing", "POST") == [("deny", "method_not_allowed", 405)]
        assert await told("/things/replayed") == [("allow", None, 200)]
        assert served.audit()[-1]["replayed"] is True


async def test_what_the_guard_refused_is_one_line(server_source: StaticSource, caller: StaticSource) -> None:
    async with serving(server_source) as served, served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200
        assert (await client.get("/unlisted")).status_code == 403
        await until(lambda: served.audit("deny"))
        assert [line["event"] for line in served.audit("deny")] == ["request"]
