"""Call other services over mutual TLS, with httpx's API.

A client is made for one expected peer, which is a required argument: a server that proves another SPIFFE
ID never sees a byte of the request. Each generation of our identity has its own pool of connections; when
the SVID or a bundle changes, new requests use a new pool and the old one closes as its requests finish.

The asynchronous client runs on aiohttp underneath, which costs a fraction of the CPU that httpx's own
transport does; the blocking one on httpx's own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import aiohttp
import httpx
from yarl import URL

from .audit import AuditLog
from .authz import Authorizer, exact
from .hop import CONNECTION
from .hop import hop as hop
from .ids import SpiffeId
from .reasons import Reason, Refusal
from .source import Source
from .tls import Connection, GenerationContext, connection_of, refusal_behind

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

DEFAULT_TIMEOUT = httpx.Timeout(10.0, connect=5.0, pool=5.0)
DEFAULT_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=30.0)
# A pool is retired this long before the first of its peers' certificates runs out.
_EXPIRY_MARGIN = timedelta(seconds=1)


class ServerRefused(httpx.ConnectError, Refusal):
    """We refused the server's identity. Nothing of the request was sent."""

    def __init__(self, refusal: Refusal) -> None:
        Refusal.__init__(self, refusal.reason, refusal.detail)
        self._request = None


class RefusedByServer(httpx.ReadError, Refusal):
    """The server ended TLS with an alert about our certificate. Reason: `refused_by_server`.

    Under TLS 1.3 a client has finished the handshake before the server checks its certificate, so this
    comes in the place of the first answer (RFC 8446 sections 4.4.2 and 6.2): a server that checks
    certificates in the handshake has not read the request. Other alerts are plain read errors, which leave
    open whether it acted.
    """

    def __init__(self, detail: str) -> None:
        Refusal.__init__(self, Reason.REFUSED_BY_SERVER, detail)
        self._request = None


class NoIdentityError(httpx.ConnectError, Refusal):
    """We have no identity to present at the moment. Nothing was sent."""

    def __init__(self, refusal: Refusal) -> None:
        Refusal.__init__(self, refusal.reason, refusal.detail)
        self._request = None


class AsyncClient(httpx.AsyncClient):
    """An `httpx.AsyncClient` that speaks mutual TLS to one expected peer.

    Args:
        source: our identity.
        peer: the SPIFFE ID the server must prove, or an authorizer.
        base_url, timeout, limits, headers: as in httpx; timeouts are seconds.
        audit: refused handshakes are lines there.
        tracer: an OpenTelemetry tracer for a span per request: see `tracing`.

    Use ``async with``, or close it with ``aclose``.

    There are no redirects, no proxies and no other settings from the environment. Nothing is sent twice,
    but for one more try of an idempotent method (RFC 9110 section 9.2.2; never POST or PATCH) whose
    connection turned out to be closed. Failures are httpx's exceptions; those with an identity behind them
    are `ServerRefused`, `RefusedByServer` and `NoIdentityError`, which carry a `reason`.
    """

    def __init__(
        self,
        source: Source,
        *,
        peer: SpiffeId | str | Authorizer,
        base_url: str = "",
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        limits: httpx.Limits = DEFAULT_LIMITS,
        headers: dict[str, str] | None = None,
        audit: AuditLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(
            base_url=base_url,
            timeout=timeout,
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            transport=_async_transport(
                _AsyncTransport(_Pools(source, _authorizer(peer), audit, limits, _AsyncPool)), tracer
            ),
        )
        self._cookies = _Cookies()

    async def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:
        """As `httpx.AsyncClient.send`; following redirects is refused."""
        _no_redirects(kwargs)
        return await super().send(request, **kwargs)


class Client(httpx.Client):
    """The blocking twin of `AsyncClient`, for programs without an event loop.

    Arguments and exceptions are the same. It may be used by several threads. Use ``with``, or close it
    with ``close``.
    """

    def __init__(
        self,
        source: Source,
        *,
        peer: SpiffeId | str | Authorizer,
        base_url: str = "",
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        limits: httpx.Limits = DEFAULT_LIMITS,
        headers: dict[str, str] | None = None,
        audit: AuditLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(
            base_url=base_url,
            timeout=timeout,
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            transport=_sync_transport(
                _SyncTransport(_Pools(source, _authorizer(peer), audit, limits, _SyncPool)), tracer
            ),
        )
        self._cookies = _Cookies()

    def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:
        """As `httpx.Client.send`; following redirects is refused."""
        _no_redirects(kwargs)
        return super().send(request, **kwargs)


class _Cookies(httpx.Cookies):
    """httpx's, without what it does for each answer that sets none: more than the TLS of one."""

    def extract_cookies(self, response: httpx.Response) -> None:
        if "set-cookie" in response.headers:
            super().extract_cookies(response)


def _authorizer(peer: SpiffeId | str | Authorizer) -> Authorizer:
    return exact(peer) if isinstance(peer, (SpiffeId, str)) else peer


def _async_transport(transport: _AsyncTransport, tracer: Tracer | None) -> httpx.AsyncBaseTransport:
    if tracer is None:
        return transport
    from .tracing import TracedAsyncTransport

    return TracedAsyncTransport(transport, tracer)


def _sync_transport(transport: _SyncTransport, tracer: Tracer | None) -> httpx.BaseTransport:
    if tracer is None:
        return transport
    from .tracing import TracedTransport

    return TracedTransport(transport, tracer)


def _no_redirects(kwargs: dict[str, Any]) -> None:
    if kwargs.get("follow_redirects") is True:
        raise TypeError("a ztmtls client follows no redirects: the next target may be another identity")


# --- one pool per generation --------------------------------------------------------------------------


# The connections that were opened for the present request, also those that failed at once.
_opened: ContextVar[list[Connection] | None] = ContextVar("ztmtls_opened", default=None)


class _Pool:
    """The connections of one generation, and how many responses are still being read from them."""

    def __init__(self, source: Source, authorizer: Authorizer, audit: AuditLog | None) -> None:
        snapshot = source.context
        self.generation = snapshot.generation
        self.valid_until = snapshot.svid.not_after
        self.in_flight = 0
        self.retired = False
        self.context = GenerationContext.build(
            "caller", snapshot, authorizer, audit=audit, alpn=("http/1.1",), on_verified=self._verified
        )

    def _verified(self, connection: Connection) -> None:
        self.valid_until = min(self.valid_until, connection.peer.valid_until)
        if (opened := _opened.get()) is not None:
            opened.append(connection)

    def current(self, generation: int) -> bool:
        return generation == self.generation and datetime.now(UTC) < self.valid_until - _EXPIRY_MARGIN


class _Connector(aiohttp.TCPConnector):
    """Lets asyncio's own loops read once before the first request is written.

    A server that refuses our certificate sends an alert and hangs up, without reading on. asyncio has sent
    our part of the handshake by then; if it writes the request before it reads, the write fails and the
    alert is lost. uvloop sends both at once.
    """

    async def _create_connection(self, *args: Any, **kwargs: Any) -> Any:
        protocol = await super()._create_connection(*args, **kwargs)
        if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                protocol.close()  # nobody else knows of it yet
                raise
        return protocol


class _AsyncPool(_Pool):
    def __init__(
        self, source: Source, authorizer: Authorizer, audit: AuditLog | None, limits: httpx.Limits
    ) -> None:
        super().__init__(source, authorizer, audit)
        connector = _Connector(
            ssl=self.context,
            limit=limits.max_connections or 0,
            keepalive_timeout=limits.keepalive_expiry if limits.keepalive_expiry is not None else 30.0,
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            response_class=_Response,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
        )

    async def close(self) -> None:
        # To its end, also when whoever asked for it is cancelled: half closed, connections would leak.
        await asyncio.shield(self.session.close())


class _SyncPool(_Pool):
    def __init__(
        self, source: Source, authorizer: Authorizer, audit: AuditLog | None, limits: httpx.Limits
    ) -> None:
        super().__init__(source, authorizer, audit)
        self.transport = httpx.HTTPTransport(verify=self.context, limits=limits, trust_env=False)

    def close(self) -> None:
        self.transport.close()


P = TypeVar("P", _AsyncPool, _SyncPool)


class _Pools(Generic[P]):
    """Hands out the pool of the newest generation; a retired one closes with its last response.

    Whoever gets a pool from `acquire`, `release` or `close` in order to close it, must.
    """

    def __init__(
        self,
        source: Source,
        authorizer: Authorizer,
        audit: AuditLog | None,
        limits: httpx.Limits,
        kind: type[P],
    ) -> None:
        self._make: Callable[[], P] = lambda: kind(source, authorizer, audit, limits)
        self._source = source
        self._lock = threading.Lock()
        self._newest: P | None = None
        self._open: list[P] = []

    def acquire(self) -> tuple[P, P | None]:
        """The pool to use, and one that must be closed now, if any. Raises `source.NoIdentity`."""
        generation = self._source.context.generation
        with self._lock:
            old, idle = self._newest, None
            if old is None or not old.current(generation):
                self._newest = self._make()
                self._open.append(self._newest)
                if old is not None:
                    old.retired = True
                    idle = self._ended(old)
            assert self._newest is not None
            self._newest.in_flight += 1
            return self._newest, idle

    def release(self, pool: P) -> P | None:
        """A response on `pool` ended; returns it when it must be closed now."""
        with self._lock:
            pool.in_flight -= 1
            return self._ended(pool)

    def close(self) -> list[P]:
        """Retire all pools, with what is in flight on them; returns those to be closed now."""
        with self._lock:
            still_open, self._open, self._newest = self._open, [], None
            return still_open

    def _ended(self, pool: P) -> P | None:
        if pool.retired and pool.in_flight == 0 and pool in self._open:
            self._open.remove(pool)
            return pool
        return None


class _AsyncTransport(httpx.AsyncBaseTransport):
    def __init__(self, pools: _Pools[_AsyncPool]) -> None:
        self._pools = pools

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        _https_only(request)
        outer = sys.exception()
        pool, idle = self._acquire()
        opened: list[Connection] = []
        token = _opened.set(opened)
        try:
            if idle is not None:
                await idle.close()
            raw = await self._send(pool.session, request)
        except BaseException as error:
            await self._release(pool)
            for connection in opened:
                if connection.alert is not None:
                    _raise_refusal(connection.alert, outer)
            _raise_refusal(error, outer)
            _raise_transport_error(error, request)
            raise
        finally:
            _opened.reset(token)
        if raw.ztmtls_connection is None:  # fail closed: never hand out an answer of unknown origin
            raw.close()
            await self._release(pool)
            raise ServerRefused(Refusal(Reason.NO_PEER, "the connection was not verified"))
        return httpx.Response(
            raw.status,
            headers=list(raw.raw_headers),
            stream=_AsyncStream(raw, request, lambda: self._release(pool)),
            extensions={
                "http_version": b"HTTP/1.1",
                "reason_phrase": (raw.reason or "").encode("latin-1", "replace"),
                CONNECTION: raw.ztmtls_connection,
            },
        )

    async def _send(self, session: aiohttp.ClientSession, request: httpx.Request) -> _Response:
        headers = [(k, v) for k, v in request.headers.multi_items() if k.lower() != "transfer-encoding"]
        try:
            body: Any = request.content or None
        except httpx.RequestNotRead:
            body = request.stream
        limits = request.extensions.get("timeout", {})
        connect, pool = limits.get("connect"), limits.get("pool")
        # Nobody waits for one piece to be taken: it needs no generator, and no clock.
        upload = None
        if body is not None and not (isinstance(body, bytes) and len(body) <= _Upload.PIECE):
            upload = body = _Upload(body, limits.get("write"))
        timeout = aiohttp.ClientTimeout(
            # aiohttp's counts the wait for a free connection and the making of a new one together
            connect=None if connect is None or pool is None else connect + pool,
            sock_connect=connect,
            sock_read=limits.get("read"),
        )
        try:
            async with asyncio.timeout(None) as stuck:
                if upload is not None:
                    upload.deadline = stuck
                response = await session.request(
                    request.method,
                    URL(str(request.url), encoded=True),
                    headers=headers,
                    data=body,
                    skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                    allow_redirects=False,
                    timeout=timeout,
                )
        except TimeoutError as error:
            if stuck.expired():
                raise httpx.WriteTimeout("the server takes no more of the body", request=request) from error
            raise
        assert isinstance(response, _Response)
        return response

    def _acquire(self) -> tuple[_AsyncPool, _AsyncPool | None]:
        try:
            return self._pools.acquire()
        except Refusal as refusal:
            raise NoIdentityError(refusal) from refusal

    async def _release(self, pool: _AsyncPool) -> None:
        if (ended := self._pools.release(pool)) is not None:
            await ended.close()

    async def aclose(self) -> None:
        await asyncio.gather(*(pool.close() for pool in self._pools.close()))


class _Upload:
    """A request's body in pieces, each of which the server must take within `timeout` seconds."""

    PIECE = 64 * 1024

    def __init__(self, body: bytes | AsyncIterable[bytes], timeout: float | None) -> None:
        self.deadline: asyncio.Timeout | None = None
        self._body = body
        self._timeout = timeout

    async def __aiter__(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        async for piece in self._pieces():
            self._expect(None if self._timeout is None else loop.time() + self._timeout)
            yield piece
            self._expect(None)

    def _expect(self, when: float | None) -> None:
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(when)

    async def _pieces(self) -> AsyncIterator[bytes]:
        if isinstance(self._body, bytes):
            for start in range(0, len(self._body), self.PIECE):
                yield self._body[start : start + self.PIECE]
        else:
            async for piece in self._body:
                yield piece


class _SyncTransport(httpx.BaseTransport):
    def __init__(self, pools: _Pools[_SyncPool]) -> None:
        self._pools = pools

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        _https_only(request)
        outer = sys.exception()
        try:
            pool, idle = self._pools.acquire()
        except Refusal as refusal:
            raise NoIdentityError(refusal) from refusal
        try:
            if idle is not None:
                idle.close()
            response = pool.transport.handle_request(request)
            socket = response.extensions["network_stream"].get_extra_info("socket")
            response.extensions[CONNECTION] = connection_of(socket)
        except BaseException as error:
            self._release(pool)
            _raise_refusal(error, outer)
            raise
        response.stream = _SyncStream(response.stream, lambda: self._release(pool))
        return response

    def _release(self, pool: _SyncPool) -> None:
        if (ended := self._pools.release(pool)) is not None:
            ended.close()

    def close(self) -> None:
        for pool in self._pools.close():
            pool.close()


class _AsyncStream(httpx.AsyncByteStream):
    """A response body that says when it is done with its connection."""

    def __init__(
        self, response: aiohttp.ClientResponse, request: httpx.Request, done: Callable[[], Awaitable[None]]
    ) -> None:
        self._response = response
        self._request = request
        self._done: Callable[[], Awaitable[None]] | None = done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except Exception as error:
            _raise_transport_error(error, self._request)
            raise

    async def aclose(self) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        # A body that was not read to its end leaves the connection unusable: close it. One that was has
        # gone back to the pool already, and closing the response then does nothing.
        self._response.close()
        await done()


class _SyncStream(httpx.SyncByteStream):
    """The same for blocking clients."""

    def __init__(self, stream: Any, done: Callable[[], None]) -> None:
        self._stream = stream
        self._done: Callable[[], None] | None = done

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        try:
            self._stream.close()
        finally:
            done()


def _https_only(request: httpx.Request) -> None:
    if request.url.scheme != "https":
        raise httpx.UnsupportedProtocol(
            f"ztmtls speaks https only, not '{request.url.scheme}'", request=request
        )


def _raise_refusal(error: BaseException, outer: BaseException | None) -> None:
    """Raise the typed exception if an identity stands behind `error`; else return."""
    refusal = refusal_behind(error, outer)
    if refusal is None:
        return
    if refusal.reason is Reason.REFUSED_BY_SERVER:
        raise RefusedByServer(refusal.detail) from error
    raise ServerRefused(refusal) from error


# What aiohttp raises, as what httpx would. Order matters: the first that fits counts. A "connect" error
# means that nothing was sent; all others leave open whether the server acted.
_ERRORS: tuple[tuple[type[BaseException], type[httpx.RequestError]], ...] = (
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.SocketTimeoutError, httpx.ReadTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    (aiohttp.ClientPayloadError, httpx.ReadError),
    (aiohttp.ClientResponseError, httpx.RemoteProtocolError),
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (aiohttp.ClientError, httpx.ReadError),
    (TimeoutError, httpx.ReadTimeout),
    (OSError, httpx.ReadError),
)


def _raise_transport_error(error: BaseException, request: httpx.Request) -> None:
    for kind, as_httpx in _ERRORS:
        if isinstance(error, kind):
            raise as_httpx(str(error) or type(error).__name__, request=request) from error


class _Response(aiohttp.ClientResponse):
    """Remembers the verified connection that a response came on, which aiohttp lets go of early."""

    ztmtls_connection: Connection | None = None

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        transport = connection.transport
        if transport is not None:
            self.ztmtls_connection = connection_of(transport.get_extra_info("ssl_object"))
        return await super().start(connection)
