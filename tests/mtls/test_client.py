"""The clients' pools, time limits, and what they say when a connection breaks."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest

from tests.mtls.conftest import CALLER, SERVER, Served, until
from ztmtls.client import AsyncClient, Client, NoIdentityError, RefusedByServer
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Bundle, X509Context
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import reason_of, server_context

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw_server(context: ssl.SSLContext, handler: Handler) -> AsyncIterator[str]:
    """A TLS server that speaks HTTP by hand; its address."""
    busy: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        busy.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError, asyncio.IncompleteReadError):
            await handler(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in busy:
            task.cancel()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes = b"ok") -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def test_cookies_are_kept_as_httpx_keeps_them(
    server_source: StaticSource, caller: StaticSource
) -> None:
    cookies: list[bytes] = []

    async def set_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            cookies.append(head.lower().partition(b"\r\ncookie: ")[2].partition(b"\r\n")[0])
            writer.write(b"HTTP/1.1 200 OK\r\nset-cookie: basket=7\r\ncontent-length: 0\r\n\r\n")

    def get_twice(client: Client) -> None:
        with client:
            client.get("/")
            client.get("/")

    async with raw_server(server_context(server_source), set_one) as url:
        async with AsyncClient(caller, peer=SERVER, base_url=url) as client:
            await client.get("/")
            await client.get("/")
        await asyncio.to_thread(get_twice, Client(caller, peer=SERVER, base_url=url))
    assert cookies == [b"", b"basket=7"] * 2


async def test_what_the_caller_was_handling_is_no_cause_of_a_failure(
    server_source: StaticSource, caller: StaticSource
) -> None:
    """A request made while a refusal is being handled: its own failure must not look like that refusal."""
    served = 0

    async def serve_then_hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1

    alert = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert")
    alert.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"

    async def post_while_handling_it(client: AsyncClient) -> None:
        try:
            raise alert
        except ssl.SSLError:
            await client.post("/charges", content=b"{}")

    def post_blocking_while_handling_it(client: Client) -> None:
        try:
            raise alert
        except ssl.SSLError:
            client.post("/charges", content=b"{}")

    async with (
        raw_server(server_context(server_source), serve_then_hang_up) as url,
        AsyncClient(caller, peer=SERVER, base_url=url) as client,
    ):
        with pytest.raises(httpx.TransportError) as failed:
            await post_while_handling_it(client)
        with (
            Client(caller, peer=SERVER, base_url=url) as blocking,
            pytest.raises(httpx.TransportError) as failed_too,
        ):
            await asyncio.to_thread(post_blocking_while_handling_it, blocking)
    assert not isinstance(failed.value, RefusedByServer)
    assert not isinstance(failed_too.value, RefusedByServer)
    assert served == 2, "the server has read both: whether it acted is open"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", Reason.REFUSED_BY_SERVER),
        ("SSLV3_ALERT_BAD_CERTIFICATE", Reason.REFUSED_BY_SERVER),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", Reason.REFUSED_BY_SERVER),
        ("SSLV3_ALERT_CERTIFICATE_UNKNOWN", Reason.REFUSED_BY_SERVER),
        ("TLSV1_ALERT_UNKNOWN_CA", Reason.REFUSED_BY_SERVER),
        ("TLSV1_ALERT_ACCESS_DENIED", Reason.REFUSED_BY_SERVER),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", Reason.REFUSED_BY_SERVER),
        ("TLSV1_ALERT_INTERNAL_ERROR", Reason.TLS_FAILURE),
        ("TLSV1_ALERT_PROTOCOL_VERSION", Reason.TLS_FAILURE),
        ("SSLV3_ALERT_BAD_RECORD_MAC", Reason.TLS_FAILURE),
        ("SSLV3_ALERT_UNEXPECTED_MESSAGE", Reason.TLS_FAILURE),
        ("TLSV1_ALERT_USER_CANCELLED", Reason.TLS_FAILURE),
    ],
)
def test_alert_says_refused_only_when_it_is_about_the_certificate(said: str, reason: Reason) -> None:
    """Any other leaves open whether the server acted, so a charge must not count as declined."""
    error = ssl.SSLError(1, f"[SSL: {said}]")
    error.reason = said
    assert reason_of(error) is reason


async def endless(piece: bytes = b"x" * 65536) -> AsyncIterator[bytes]:
    while True:
        yield piece


@pytest.mark.parametrize("body", [b"x" * (64 << 20), None], ids=["bytes", "generator"])
async def test_upload_that_the_server_does_not_take_ends_by_the_write_timeout(
    server_source: StaticSource, caller: StaticSource, body: bytes | None
) -> None:
    never = asyncio.Event()

    async def read_no_further(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await never.wait()

    async def echo_length(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    limits = httpx.Timeout(60.0, write=0.5)
    async with (
        raw_server(server_context(server_source), echo_length) as good,
        AsyncClient(caller, peer=SERVER, timeout=limits) as client,
    ):
        assert (await client.post(good, content=b"x" * (8 << 20))).status_code == 200
    async with (
        raw_server(server_context(server_source), read_no_further) as bad,
        AsyncClient(caller, peer=SERVER, timeout=limits) as client,
        asyncio.timeout(30),
    ):
        with pytest.raises(httpx.WriteTimeout):
            await client.post(bad, content=body if body is not None else endless())


async def test_waiting_for_a_free_connection_does_not_shorten_the_handshake(
    server_source: StaticSource, caller: StaticSource
) -> None:
    async with (
        raw_server(server_context(server_source), answer) as url,
        AsyncClient(caller, peer=SERVER, base_url=url, timeout=httpx.Timeout(10.0, pool=0.001)) as client,
    ):
        assert (await client.get("/")).status_code == 200


async def test_closing_a_client_closes_what_still_streams(
    server_source: StaticSource, caller: StaticSource
) -> None:
    gone = asyncio.Event()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        await writer.drain()
        await reader.read()
        gone.set()

    async with raw_server(server_context(server_source), stream) as url:
        client = AsyncClient(caller, peer=SERVER, base_url=url)
        response = await client.send(client.build_request("GET", "/"), stream=True)
        caller.set(X509Context(1, caller.context.svids, {}))  # another generation: the pool is retired
        assert response.status_code == 200
        await client.aclose()
        async with asyncio.timeout(5):
            await gone.wait()
        await response.aclose()


async def test_identity_that_openssl_cannot_use_leaves_nothing_open(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    good = caller.context
    async with served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200
        name = next(iter(ca.bundle.authorities[0].subject)).value.encode()
        broken = X509Bundle.from_der(
            ca.bundle.trust_domain, ca.bundle.der().replace(name, b"\xff\xfe" + name[2:])
        )
        caller.set(X509Context(1, good.svids, {ca.bundle.trust_domain: broken}))
        for _ in range(3):
            with pytest.raises(NoIdentityError) as refused:
                await client.get("/thing")
            assert refused.value.reason is Reason.INVALID_UPDATE
        caller.set(good)
        assert (await client.get("/thing")).status_code == 200
    await until(lambda: served.connections == 0)


async def test_cancelled_while_an_old_pool_closes(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    """However often callers give up at the worst moment: no connection stays behind."""
    async with served.client(caller) as client:
        for turn in range(20):
            assert (await client.get("/thing")).status_code == 200
            caller.set(ca.context(ca.issue(CALLER)))
            attempt = asyncio.create_task(client.get("/thing"))
            for _ in range(turn):
                await asyncio.sleep(0)
            attempt.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await attempt
        assert (await client.get("/thing")).status_code == 200
        await until(lambda: served.connections == 1)
    await until(lambda: served.connections == 0)
