"""Serve an ASGI application over mutual TLS, every request authorized.

`serve` runs uvicorn (h11 or httptools, on asyncio or uvloop) with the rotating context of `tls` and the
`guard.Guard` around the application. `serve_public` is for the one service that people reach: plain HTTP, or
TLS towards a load balancer that ends it for browsers, with the same life cycle and no identity in the scope.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

import uvicorn

from .asgi import ASGIApp
from .audit import AuditLog
from .authz import Authorizer, Policy, PolicyFile
from .door import DoorContext
from .guard import MAX_BODY, Guard
from .lifecycle import beside
from .listen import PortInUse, bind, serve_until_stopped
from .live import LiveConnections, LiveLimits
from .probes import Probes
from .protocols import watched_http, watched_websocket
from .reasons import Refusal
from .source import Source
from .tls import server_context

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

HttpParser = Literal["auto", "h11", "httptools"]
Loop = Literal["auto", "asyncio", "uvloop"]

_POLICY_POLL = 1.0
_LIVE_LIMITS = LiveLimits()


async def serve(
    app: ASGIApp,
    *,
    source: Source,
    policy: Policy | PolicyFile,
    host: str,
    port: int,
    audit: AuditLog,
    probes: Probes | None = None,
    allowed_peers: Authorizer | None = None,
    max_body: int = MAX_BODY,
    http: HttpParser = "auto",
    drain: float = 0.0,
    grace: float = 10.0,
    live_limits: LiveLimits = _LIVE_LIMITS,
    tracer: Tracer | None = None,
    on_serving: Callable[[], None] | None = None,
) -> None:
    """Serve `app` on ``host:port`` over mutual TLS until SIGTERM or SIGINT, or until it is cancelled.

    Args:
        app: an ASGI 3 application; every request to it goes through `guard.Guard`.
        source: our identity; must hold an SVID already (``await source.ready()``).
        policy: who may use which method on which path; nothing else is served. A `PolicyFile` is looked at
            every second.
        audit: each decision is a line there: handshakes that are refused, requests, connections closed.
        allowed_peers: an outer allow-list for the handshake itself.
        max_body: bytes that a request's body may have; more is refused with 413.
        probes: marked as serving and draining at the right moments.
        drain: seconds to go on accepting after the first signal, with readiness red.
        grace: seconds that requests in flight then have to finish.
        live_limits: how open connections are closed whose peer is no longer acceptable.
        tracer: an OpenTelemetry tracer for a span per request: see `tracing`.
        on_serving: called once, when connections are accepted.

    Raises `source.NoIdentity` when there is no SVID, `listen.PortInUse` when the port is taken.
    """
    _ = source.context  # fail now, not at the first handshake
    guarded = Guard(
        app,
        source=source,
        policy=policy,
        audit=audit,
        max_body=max_body,
        request_timeout=live_limits.request,
        draining=lambda: probes is not None and probes.draining,
    )
    context = server_context(source, authorizer=allowed_peers, audit=audit)
    live = LiveConnections(source, guarded, live_limits, audit)
    config = _config(
        _traced(guarded, tracer),
        http,
        grace,
        live_limits.idle,
        ssl_context_factory=lambda config, default: context,
    )
    config.load()
    config.http_protocol_class = watched_http(config.http_protocol_class, live)
    if config.ws_protocol_class is not None:
        config.ws_protocol_class = watched_websocket(config.ws_protocol_class, live)
    if probes is not None:
        probes.watch(live)
    sock = bind(host, port, "PORT")
    async with beside(live.run()), beside(_reload(policy)):
        await _run_server(config, sock, probes, drain, on_serving)


async def serve_public(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    source: Source | None = None,
    probes: Probes | None = None,
    http: HttpParser = "auto",
    drain: float = 0.0,
    grace: float = 10.0,
    tracer: Tracer | None = None,
    on_stopping: Callable[[], None] | None = None,
) -> None:
    """Serve `app` to people, until SIGTERM or SIGINT. No request has an identity here.

    Over plain HTTP; with a `source` over TLS with its SVID, which asks for no certificate (see `door`). With
    a `tracer`, each request begins a trace. `on_stopping` is called once, before requests in flight get
    their `grace` seconds: end streams there, which would use them up.
    """
    context = None
    if source is not None:
        _ = source.context  # fail now, not at the first handshake
        context = DoorContext.of(source)
    config = _config(
        _traced(app, tracer),
        http,
        grace,
        ssl_context_factory=(lambda config, default: context) if context else None,
    )
    await _run_server(config, bind(host, port, "PORT"), probes, drain, on_stopping=on_stopping)


def run(main: Callable[[], Awaitable[None]], *, loop: Loop = "auto") -> None:
    """Run a service's `main` to its end: uvloop where installed, one line and status 1 for what it raises.

    SIGTERM and SIGINT end it with status 0, also while it still waits for its identity.
    """

    async def supervised() -> None:
        task = asyncio.current_task()
        running = asyncio.get_running_loop()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            running.add_signal_handler(number, task.cancel)
        await main()

    try:
        with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
            runner.run(supervised())
    except (asyncio.CancelledError, KeyboardInterrupt):
        logger.info("stopped")
    except (Refusal, PortInUse) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def _loop_factory(loop: Loop) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if loop == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError:
        if loop == "uvloop":
            raise SystemExit("LOOP: uvloop is not installed") from None
        return None
    return uvloop.new_event_loop


def _config(
    app: ASGIApp, http: HttpParser, grace: float, keep_alive: float = _LIVE_LIMITS.idle, **more: Any
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=http,
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing a client sends names anybody
        timeout_keep_alive=max(1, round(keep_alive)),
        timeout_graceful_shutdown=max(1, round(grace)),
        **more,
    )


def _traced(app: ASGIApp, tracer: Tracer | None) -> ASGIApp:
    if tracer is None:
        return app
    from .tracing import Traced

    return Traced(app, tracer)


async def _run_server(
    config: uvicorn.Config,
    sock: socket.socket,
    probes: Probes | None,
    drain: float,
    on_serving: Callable[[], None] | None = None,
    on_stopping: Callable[[], None] | None = None,
) -> None:
    def serving() -> None:
        if probes is not None:
            probes.serving = True
        if on_serving is not None:
            on_serving()

    def draining() -> None:
        logger.info("draining")
        if probes is not None:
            probes.draining = True
        if on_stopping is not None:
            on_stopping()

    await serve_until_stopped(config, sock, drain=drain, on_serving=serving, on_draining=draining)


async def _reload(policy: Policy | PolicyFile) -> None:
    while isinstance(policy, PolicyFile):
        await asyncio.sleep(_POLICY_POLL)
        # A large policy takes a second or two to read, which requests need not wait for.
        await asyncio.to_thread(policy.reload_if_changed)
