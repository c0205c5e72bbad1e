"""What a request may look like on the wire, and how long it may take: a verified caller sends raw bytes.

Each test begins with a rightful request on the same server, and counts what reached the application.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response

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
    "folded header": b"POST /thing HTTP/1.1\r\nHost: s\r\nX-A: b\r\n c\r\nContent-Length : 2\r\n\r\nok",
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
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
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
