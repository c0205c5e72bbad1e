"""Callers who misbehave, verified or not: each costs little, for a bounded time, and others are served."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from tests.mtls.conftest import CALLER, STRANGER, Served, serving, until
from ztmtls.live import LiveLimits
from ztmtls.reasons import Reason
from ztmtls.server import HttpParser
from ztmtls.source import StaticSource
from ztmtls.svid import MAX_CHAIN, X509Svid
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import client_context

BOTH_PARSERS = pytest.mark.parametrize("http", ["h11", "httptools"])
Raw = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# For whatever must happen at all. How long a bound is, each test says itself.
DEADLINE = 30.0


async def connect(served: Served, caller: StaticSource) -> Raw:
    context = client_context(caller, lambda peer: None)
    return await asyncio.open_connection("127.0.0.1", served.port, ssl=context)


async def answer(raw: Raw) -> tuple[int, str]:
    """Status and head of the next answer; its body is read, too."""
    head = (await raw[0].readuntil(b"\r\n\r\n")).decode().lower()
    await raw[0].readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
    return int(head.split()[1]), head


async def closed_after(raw: Raw, *, sending: bytes = b"", pause: float = 0.02) -> float:
    """Seconds until the server ends the connection, while `sending` is sent again and again."""
    began = time.monotonic()
    async with asyncio.timeout(DEADLINE):
        ended = asyncio.create_task(raw[0].read())
        with contextlib.suppress(ConnectionError):
            while not ended.done():
                if sending:
                    raw[1].write(sending)
                    await raw[1].drain()
                await asyncio.wait({ended}, timeout=pause)
        await asyncio.gather(ended, return_exceptions=True)
    raw[1].transport.abort()
    return time.monotonic() - began


@contextlib.asynccontextmanager
async def rightful_caller(served: Served, caller: StaticSource) -> AsyncIterator[None]:
    """Somebody who calls all the time on new connections, and is served each time, quickly."""
    slowest, calls = 0.0, 0

    async def call() -> None:
        nonlocal slowest, calls
        while True:
            began = time.monotonic()
            async with served.client(caller) as client:
                assert (await client.get("/thing")).status_code == 200
            slowest, calls = max(slowest, time.monotonic() - began), calls + 1

    await asyncio.wait_for(_once(served, caller), DEADLINE)
    task = asyncio.create_task(call())
    try:
        yield
        await until(lambda: calls > 1 or task.done(), DEADLINE)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert slowest < 5, f"the slowest of {calls} calls took {slowest:.1f} s"


async def _once(served: Served, caller: StaticSource) -> None:
    async with served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200


def memory() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# --- before anybody is verified -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "hello", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], ids=["silent", "half a ClientHello"]
)
async def test_half_open_handshakes_are_cut_off(served: Served, caller: StaticSource, hello: bytes) -> None:
    async with rightful_caller(served, caller):
        raws = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(200)]
        for raw in raws:
            raw[1].write(hello)
        times = await asyncio.gather(*(closed_after(raw) for raw in raws))

    assert max(times) < 15, "five seconds, and what a loaded machine adds"
    assert served.connections == 0 or await _falls_to(served, 1)


async def _falls_to(served: Served, most: int) -> bool:
    await until(lambda: served.connections <= most, DEADLINE)
    return True


# --- slow ones ----------------------------------------------------------------------------------------


@BOTH_PARSERS
async def test_slow_headers_end_with_the_idle_limit(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with (
        serving(server_source, http=http, live_limits=LiveLimits(idle=1.0)) as served,
        rightful_caller(served, caller),
    ):
        raw = await connect(served, caller)
        raw[1].write(b"GET /thing HTTP/1.1\r\nhost: x\r\nx: ")
        assert await closed_after(raw, sending=b"a") < 1 + 10


@BOTH_PARSERS
async def test_slow_body_ends_with_the_callers_svid(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority, http: HttpParser
) -> None:
    limits = LiveLimits(splay=0.0, grace=0.5)
    slow = StaticSource(ca.context(ca.issue(CALLER, ttl=2)))
    async with (
        serving(server_source, http=http, live_limits=limits) as served,
        rightful_caller(served, caller),
    ):
        raw = await connect(served, slow)
        raw[1].write(b"POST /thing HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        assert await closed_after(raw, sending=b"a") < 3 + 10


@BOTH_PARSERS
async def test_slow_reader_does_not_fill_memory_and_ends_with_its_svid(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority, http: HttpParser
) -> None:
    made, bodies, app = 0, [], FastAPI()

    @app.get("/thing")
    async def thing() -> str:
        return "served"

    @app.get("/things/{name}")
    async def endless(name: str) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            nonlocal made
            try:
                while True:
                    made += 65536
                    yield bytes(65536)
                    await asyncio.sleep(0)
            finally:
                bodies.append(made)

        return StreamingResponse(parts())

    slow = StaticSource(ca.context(ca.issue(CALLER, ttl=3)))
    limits = LiveLimits(splay=0.0, grace=0.0)
    async with (
        serving(server_source, http=http, app=app, live_limits=limits) as served,
        rightful_caller(served, caller),
    ):
        raw = await connect(served, slow)
        raw[1].transport.pause_reading()  # type: ignore[attr-defined]
        raw[1].write(b"GET /things/x HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: made, DEADLINE)
        await until(lambda: len(bodies) == 1, DEADLINE)  # its generator was closed
        raw[1].transport.abort()
    assert made < 32 << 20, "what the kernel's buffers and ours hold, and no more"


# --- many and much ------------------------------------------------------------------------------------


async def test_hundreds_of_connections_at_once(served: Served, caller: StaticSource) -> None:
    context = client_context(caller, lambda peer: None)
    gate = asyncio.Semaphore(20)

    async def open_one() -> Raw:
        async with gate:
            return await asyncio.open_connection("127.0.0.1", served.port, ssl=context)

    async with rightful_caller(served, caller):
        raws = await asyncio.gather(*(open_one() for _ in range(300)))
        await until(lambda: served.connections >= 300, DEADLINE)
        for raw in raws[::10]:
            raw[1].write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await answer(raw))[0] == 200
        for raw in raws:
            raw[1].transport.abort()
        await until(lambda: served.connections <= 1, DEADLINE)


@BOTH_PARSERS
async def test_headers_too_large_are_refused(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with serving(server_source, http=http) as served, rightful_caller(served, caller):
        raw = await connect(served, caller)
        raw[1].write(b"GET /thing HTTP/1.1\r\nhost: x\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 4 << 20 and not raw[0].at_eof():
                raw[1].write(b"x-%d: " % sent + b"a" * 8000 + b"\r\n")
                await raw[1].drain()
                sent += 8000
                await asyncio.sleep(0)
        raw[1].transport.abort()
    assert sent < 1 << 20


@BOTH_PARSERS
async def test_one_endless_header_is_refused(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with serving(server_source, http=http) as served, rightful_caller(served, caller):
        raw = await connect(served, caller)
        raw[1].write(b"GET /thing HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 10_000 + b"\r\n\r\n")
        assert (await answer(raw))[0] == 200
        raw[1].write(b"GET /thing HTTP/1.1\r\nhost: x\r\nx: ")
        assert await closed_after(raw, sending=b"a" * 16384, pause=0) < 10


@BOTH_PARSERS
async def test_pipelined_requests_are_answered_in_order(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with serving(server_source, http=http) as served, rightful_caller(served, caller):
        raw = await connect(served, caller)
        for number in range(500):
            path = b"/things/%d" % number if number % 2 else b"/unlisted"
            raw[1].write(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(DEADLINE):
            answers = [(await answer(raw))[0] for _ in range(500)]
        raw[1].transport.abort()
    assert answers == [403, 200] * 250
    assert [seen["path"] for seen in served.seen if seen["path"] != "/thing"] == [
        f"/things/{number}" for number in range(1, 500, 2)
    ]


@BOTH_PARSERS
async def test_endless_body_after_a_refusal_is_cut_off(
    server_source: StaticSource, caller: StaticSource, ca: CertificateAuthority, http: HttpParser
) -> None:
    stranger = StaticSource(ca.context(ca.issue(STRANGER)))
    async with (
        serving(server_source, http=http, live_limits=LiveLimits(idle=1.0)) as served,
        rightful_caller(served, caller),
    ):
        before = memory()
        raw = await connect(served, stranger)
        raw[1].write(b"POST /thing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await answer(raw))[0] == 403
        chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
        assert await closed_after(raw, sending=chunk * 16, pause=0) < 1 + 10
    assert memory() - before < 64 << 20
    assert not [seen for seen in served.seen if seen["body"]]


@BOTH_PARSERS
async def test_endless_body_of_a_rightful_request_is_refused(
    server_source: StaticSource, caller: StaticSource, http: HttpParser
) -> None:
    async with (
        serving(server_source, http=http, live_limits=LiveLimits(idle=1.0)) as served,
        rightful_caller(served, caller),
    ):
        before = memory()
        raw = await connect(served, caller)
        raw[1].write(b"POST /thing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
        assert await closed_after(raw, sending=chunk * 16, pause=0) < 1 + 15
    assert memory() - before < 64 << 20
    assert Reason.TOO_LARGE in [line["reason"] for line in served.audit("deny")]


# --- certificates -------------------------------------------------------------------------------------


async def test_giant_chains_and_certificates_end_the_handshake(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    good = caller.context.svid
    filler = [ca.subordinate().certificate for _ in range(3)]
    many_names = ca.issue(CALLER, dns_names=[f"{number}.{'a' * 50}.example" for number in range(2500)])
    assert len(many_names.chain_der()) > 100_000
    giants = {
        "more certificates than allowed": X509Svid(good.id, (good.leaf, *filler * 6), good.key),
        "more bytes than OpenSSL reads": X509Svid(good.id, (good.leaf, *filler * 100), good.key),
        "one giant certificate": many_names,
    }
    assert all(len(each.chain) > MAX_CHAIN or each is many_names for each in giants.values())
    long_enough = X509Svid(good.id, (good.leaf, *filler * 5), good.key)
    assert len(long_enough.chain) == MAX_CHAIN

    async with rightful_caller(served, caller):
        raw = await connect(served, StaticSource(ca.context(long_enough)))
        raw[1].write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(raw))[0] == 200
        raw[1].transport.abort()
        for name, svid in giants.items():
            began, before = time.monotonic(), len(served.audit("deny"))
            with contextlib.suppress(OSError):
                raw = await connect(served, StaticSource(ca.context(svid)))
                raw[1].write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"200 OK" not in await raw[0].read(), name
            await until(lambda before=before: len(served.audit("deny")) > before, DEADLINE)
            assert time.monotonic() - began < 10, name
            assert served.audit("deny")[-1]["reason"] in (Reason.CHAIN_TOO_LONG, Reason.TLS_FAILURE), name
