"""uvicorn, driven by us: sockets with clear errors, our own signal handling, drain before stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# For a TLS handshake, and for the peer's part in closing. A silent peer holds a file descriptor that long.
_HANDSHAKE_SECONDS = 5.0


class PortInUse(OSError):
    """The address a server should listen on can't be had. The text says which, and which setting."""


def bind(host: str, port: int, setting: str) -> socket.socket:
    """Listen on ``host:port``, or raise `PortInUse` naming `setting`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        what = "is in use" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
        raise PortInUse(
            f"{setting}: {host}:{port} {what}; choose another or stop what listens there"
        ) from None
    # asyncio does this for sockets that say they are TCP, which those of `socket.create_server` don't: their
    # answers, head and body in two writes, then wait 40 ms for an acknowledgement. Accepted ones inherit it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to us, and does not wait long for half-open handshakes."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections on `sockets`. As uvicorn's, whose TLS handshakes may take a minute."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        config = self.config
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            return config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )

        limit = _HANDSHAKE_SECONDS if config.ssl else None
        self.servers = [
            await loop.create_server(
                protocol,
                sock=sock,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=limit,
                ssl_shutdown_timeout=limit,
            )
            for sock in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


class PlainServer:
    """A small plain-HTTP server on a bound socket, beside the main one."""

    def __init__(self, app: Any, sock: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            interface="asgi3",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
            http="h11",
            ws="none",
        )
        self._server = Server(config)
        self._socket = sock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve in the background."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Stop, letting answers in flight finish for a second."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()


async def serve_until_stopped(
    config: uvicorn.Config,
    sock: socket.socket,
    *,
    drain: float,
    on_serving: Callable[[], None],
    on_draining: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    After the first signal `on_draining` is called and new requests are still accepted for `drain` seconds
    (so that load balancers notice); then the listener closes and what is in flight finishes within the
    config's `timeout_graceful_shutdown`. A second signal cuts both short.
    """
    loop = asyncio.get_running_loop()
    server = Server(config)
    signalled, again = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if signalled.is_set():
            again.set()
            server.force_exit = True
        signalled.set()

    with _handlers(loop, on_signal):
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        stop = asyncio.create_task(signalled.wait())
        try:
            while not server.started and not serving.done():
                await asyncio.wait({serving}, timeout=0.01)
            if server.started:
                on_serving()
            await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                on_draining()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(drain):
                        await again.wait()
                server.should_exit = True
            await serving
            if not server.started:
                raise RuntimeError("the application's start-up failed: its log says why")
        finally:
            stop.cancel()
            if not serving.done():
                server.should_exit = True
                await asyncio.gather(serving, return_exceptions=True)
            sock.close()


@contextlib.contextmanager
def _handlers(loop: asyncio.AbstractEventLoop, handler: Callable[[], None]) -> Iterator[None]:
    # Only the main thread may handle signals; a server in a test's thread is stopped by cancelling it.
    installed = []
    try:
        for number in _SIGNALS:
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, handler)
                installed.append(number)
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)
