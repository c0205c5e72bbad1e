"""Probes and metrics on a plain port of their own: a kubelet or a Prometheus has no SVID.

Nothing else is served there. Liveness depends on nothing outside the process: an outage elsewhere must not
make an orchestrator restart everything. Readiness means: our SVID is valid and not about to run out, and
what we depend on answered recently.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from .asgi import Receive, Scope, Send
from .audit import AuditLog
from .listen import PlainServer, bind
from .live import LiveConnections
from .metrics import Collector
from .source import NoIdentity, Source, SourceState

if TYPE_CHECKING:  # it needs an extra of its own
    from .secrets import RotatingSecret

logger = logging.getLogger(__name__)

Check = Callable[[], Awaitable[str | None]]
_CHECK_TIMEOUT = 2.0


class Probes:
    """``/livez``, ``/readyz`` and ``/metrics`` on ``host:port``, from `start` (or ``async with``) on.

    Start it before anything that may take time: it answers while the service still waits for its first
    SVID. `checks` maps a name to a coroutine function that returns None when all is well, else a short
    reason; each has two seconds.
    """

    def __init__(
        self,
        host: str,
        port: int,
        checks: Mapping[str, Check] | None = None,
        *,
        source: Source | None = None,
        audit: AuditLog | None = None,
        secret: RotatingSecret | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.checks: dict[str, Check] = dict(checks or {})
        if reserved := self.checks.keys() & {"service", "identity"}:
            raise ValueError(f"a check must not be named {' or '.join(sorted(reserved))}: these are ours")
        self.serving = False
        self.draining = False
        self._source = source
        self._registry = CollectorRegistry()
        self._collector = Collector(source, audit, secret)
        self._registry.register(self._collector)
        self._server: PlainServer | None = None

    def watch(self, live: LiveConnections) -> None:
        """Count the open connections of a server, too. Used by `server.serve`."""
        self._collector.live = live

    async def start(self) -> None:
        """Begin to answer. Raises `listen.PortInUse` when the port is taken."""
        self._server = PlainServer(self._app, bind(self.host, self.port, "PROBE_PORT"))
        await self._server.start()

    async def stop(self) -> None:
        """Stop answering."""
        if self._server is not None:
            await self._server.stop()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def readiness(self) -> dict[str, str]:
        """Every check by name: ``ok`` or what is wrong."""
        results = {"service": "draining" if self.draining else "ok" if self.serving else "starting"}
        if self._source is not None:
            results["identity"] = identity_fault(self._source) or "ok"
        names = list(self.checks)
        found = await asyncio.gather(*(self._run(name) for name in names))
        return results | dict(zip(names, found, strict=True))

    async def _run(self, name: str) -> str:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                return await self.checks[name]() or "ok"
        except TimeoutError:
            return f"no answer in {_CHECK_TIMEOUT:g} s"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return "cancelled"
        except Exception as error:
            logger.warning("readiness check %s failed: %s", name, type(error).__name__)
            return type(error).__name__

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        if method not in ("GET", "HEAD") or path not in ("/livez", "/readyz", "/metrics"):
            status, kind, body = 404, "application/json", b'{"error": "not found"}'
        elif path == "/livez":
            status, kind, body = 200, "application/json", b'{"alive": true}'
        elif path == "/metrics":
            status, kind, body = 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        else:
            results = await self.readiness()
            ready = all(value == "ok" for value in results.values())
            report: dict[str, Any] = {"ready": ready, "checks": results}
            if self._source is not None:
                report["identity"] = self._source.status().as_dict()
            status, kind, body = 200 if ready else 503, "application/json", json.dumps(report).encode()
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


def identity_fault(source: Source) -> str | None:
    """None while there is an SVID with enough life left, else what is wrong with the identity."""
    status = source.status()
    if status.state not in (SourceState.SERVING, SourceState.DEGRADED):
        return f"{status.state}: {status.reason}" if status.reason else str(status.state)
    try:
        leaf = source.context.svid.leaf
    except NoIdentity as refusal:  # it ran out or was withdrawn just now
        return str(refusal)
    life = (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds()
    if (status.seconds_left or 0) < min(30.0, life * 0.1):
        return f"the SVID runs out in {status.seconds_left:.0f} s: {status.reason or 'no update yet'}"
    return None
