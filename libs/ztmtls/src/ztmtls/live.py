"""Connections that are open: looked at again when bundles, policy or time change, and closed in good order.

TLS checks a certificate once, in the handshake. What was true then may not hold any more: the peer's SVID
ran out, its authority left the bundle, the policy no longer names it. The guard refuses its next request;
here the connection itself is closed, within a bounded and jittered time, and not all at once.

A request in flight is let finish. A response that streams and a WebSocket have no end of their own: they are
ended.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from .asgi import ASGIApp, Message, Receive, Scope, Send
from .audit import AuditLog
from .guard import REQUEST_TIMEOUT, Guard
from .identity import RequestIdentity, set_request_identity
from .reasons import Reason, Refusal, printable
from .source import NoIdentity, Source
from .svid import X509Context
from .tls import Connection
from .verify import PeerRefused, VerifiedPeer, verify_peer

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Validity is looked at this often; a change of bundles at once.
_LOOK_SECONDS = 1.0
# The event loop belongs to requests: looking at many connections pauses this often.
_TURN_SECONDS = 0.002
# Closing is done in turns this far apart.
_TICK_SECONDS = 0.01
# A peer that does not answer when a connection is closed has this long.
_FAREWELL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LiveLimits:
    """How open connections that may no longer be are closed.

    A connection is closed at a random moment within `splay` seconds after it was found to be no longer
    acceptable, and not more than `per_second` connections are closed in a second, so that thousands of
    peers don't come back at once. A request that began less than `grace` seconds ago is let finish.
    A connection without a request for `idle` seconds is closed, whoever the peer is, as is one whose peer
    sends no more of a body, or takes no more of an answer, for that long. A request has `request` seconds to
    arrive: its headers from their first byte, its body from the end of the headers.
    """

    splay: float = 3.0
    per_second: float = 500.0
    grace: float = 10.0
    idle: float = 75.0
    request: float = REQUEST_TIMEOUT

    def __post_init__(self) -> None:
        if min(self.splay, self.grace) < 0 or min(self.per_second, self.idle, self.request) <= 0:
            raise ValueError("splay and grace must be 0 or more, per_second, idle and request more than 0")


@dataclass(eq=False, slots=True)
class _InFlight:
    """A request being served, or a WebSocket."""

    scope: Scope
    send: Send
    began: float = field(default_factory=time.monotonic)
    ended_by_us: bool = False
    body_missing: bool = True
    waiting_since: list[float] = field(default_factory=list)  # for the peer, to send or to take something

    @property
    def websocket(self) -> bool:
        return bool(self.scope["type"] == "websocket")

    def waited(self) -> float:
        """Seconds that we have been waiting for the peer."""
        return time.monotonic() - min(self.waiting_since) if self.waiting_since else 0.0

    async def wait_for_peer(self, step: Awaitable[T]) -> T:
        """Await `step`, which takes as long as the peer wants."""
        began = time.monotonic()
        self.waiting_since.append(began)
        try:
            return await step
        finally:
            self.waiting_since.remove(began)

    async def end(self, reason: str) -> None:
        """Close a WebSocket as RFC 6455 section 7.4.1 has it: 1008, policy violation."""
        self.ended_by_us = True
        await self.send({"type": "websocket.close", "code": 1008, "reason": reason})


class LiveConnection:
    """One open connection, and the ASGI application of its requests: binds the verified identity to them."""

    def __init__(self, app: ASGIApp, connection: Connection | None, transport: asyncio.Transport) -> None:
        self.connection = connection
        self.transport = transport
        self.in_flight: set[_InFlight] = set()
        self.idle_since = time.monotonic()
        self.head_since: float | None = None
        self.refusal: Refusal | None = None
        self.closing = False
        self._app = app
        self._identity = RequestIdentity(connection) if connection else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        set_request_identity(scope, self._identity)
        request = _InFlight(scope, send)
        self.in_flight.add(request)

        async def receiving() -> Message:
            # A WebSocket may be silent, and who has sent his whole request is not waited for.
            if request.websocket or not request.body_missing:
                return await receive()
            message = await request.wait_for_peer(receive())
            request.body_missing = message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if request.ended_by_us:
                raise ConnectionResetError("the WebSocket was closed: its peer is no longer acceptable")
            await request.wait_for_peer(send(message))

        try:
            await self._app(scope, receiving, sending)
        except Exception:
            if not request.ended_by_us:  # else it is what applications do when their client is gone
                raise
        finally:
            self.in_flight.discard(request)
            self.idle_since = time.monotonic()
            if self.head_since is not None:  # that of the next request, which need not be read meanwhile
                self.head_since = self.idle_since

    def head_begins(self) -> None:
        """The first bytes of a request have come, or of what should be one."""
        self.head_since = time.monotonic()

    def head_ends(self) -> None:
        """The headers of a request have come whole."""
        self.head_since = None

    def head_late(self, seconds: float) -> bool:
        """True when a head began more than `seconds` ago, and nothing else is being done meanwhile."""
        if self.head_since is None or self.in_flight:
            return False
        return time.monotonic() - self.head_since > seconds

    def waited(self) -> float:
        """Seconds that nothing has come from the peer that we wait for: a request, a body, room to send."""
        if self.in_flight:
            return max(request.waited() for request in self.in_flight)
        return time.monotonic() - self.idle_since

    def finish(self) -> None:
        """Close when the response in flight has been sent; at once when there is none."""
        protocol: Any = self.transport.get_protocol()
        protocol.shutdown()


class LiveConnections:
    """All open connections of one server. `run` watches over them."""

    def __init__(self, source: Source, guard: Guard, limits: LiveLimits, audit: AuditLog) -> None:
        self._source = source
        self._guard = guard
        self._limits = limits
        self._audit = audit
        self._all: dict[asyncio.Transport, LiveConnection] = {}
        self._verified: dict[bytes, VerifiedPeer | PeerRefused] = {}
        self._seen: object = None
        self._changed = asyncio.Event()
        self._due: list[tuple[float, int, LiveConnection, Callable[[LiveConnection], None]]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = 0.0

    def __len__(self) -> int:
        return len(self._all)

    def by_generation(self) -> Counter[int]:
        """How many connections were made under which generation of our own identity."""
        return Counter(live.connection.generation for live in self._all.values() if live.connection)

    def opened(
        self, app: ASGIApp, connection: Connection | None, transport: asyncio.Transport
    ) -> LiveConnection:
        """Watch over a new connection; the same one again after an upgrade to WebSocket."""
        live = self._all.get(transport)
        if live is None:
            live = self._all[transport] = LiveConnection(app, connection, transport)
        return live

    def closed(self, transport: asyncio.Transport) -> None:
        """The connection is gone."""
        self._all.pop(transport, None)

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()

        def changed() -> None:
            loop.call_soon_threadsafe(self._changed.set)

        unsubscribe = self._source.subscribe(changed)
        try:
            await self._look_again()
        finally:
            unsubscribe()
            if self._timer is not None:
                self._timer.cancel()

    # --- finding ---

    async def _look_again(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            await self._look()

    async def _look(self) -> None:
        changed = self._news()
        turn = time.monotonic()
        for live in list(self._all.values()):
            if not live.closing:
                self._safely(partial(self._look_at, changed=changed), live)
            if time.monotonic() - turn > _TURN_SECONDS:
                await asyncio.sleep(0)
                turn = time.monotonic()

    def _news(self) -> bool:
        """True when what decides about peers is not what it was at the last look."""
        try:
            generation: int | None = self._source.context.generation
        except NoIdentity:
            generation = None
        seen = (generation, self._guard.policy)
        if seen == self._seen:
            return False
        self._seen = seen
        self._verified.clear()
        return True

    def _look_at(self, live: LiveConnection, changed: bool) -> None:
        connection, now = live.connection, datetime.now(UTC)
        if live.waited() > self._limits.idle:
            self._close(live)
        elif live.head_late(self._limits.request):
            self._end_slow_request(live)
        elif connection is None:
            pass  # the guard refuses whatever is asked on it
        elif connection.outlived(now):
            self._plan(live, 0.0, self._finish)
        elif changed or now >= connection.peer.valid_until:
            refusal = self._refusal_of(live, now)
            if refusal is not None:
                live.refusal = refusal
                self._plan(live, random.uniform(0, self._limits.splay), self._finish)  # noqa: S311 - no secret

    def _refusal_of(self, live: LiveConnection, now: datetime) -> Refusal | None:
        assert live.connection is not None
        try:
            live.connection.recheck(self._source.context, now, self._verify)
            self._guard.check_peer(live.connection)
            for request in live.in_flight:
                self._guard.check(live.connection, request.scope)
        except Refusal as refusal:
            return refusal
        return None

    def _verify(self, peer: VerifiedPeer, snapshot: X509Context, now: datetime) -> VerifiedPeer:
        """`verify_peer`, once for all the connections of one certificate."""
        found = self._verified.get(peer.presented)
        if found is None or (isinstance(found, VerifiedPeer) and now >= found.valid_until):
            try:
                found = verify_peer(peer.chain, snapshot.bundles, now)
            except PeerRefused as refusal:
                found = refusal
            self._verified[peer.presented] = found
        if isinstance(found, PeerRefused):
            raise PeerRefused(found.reason, found.detail)
        return found

    def _end_slow_request(self, live: LiveConnection) -> None:
        if live.connection is not None:
            detail = f"the request's headers did not come whole within {self._limits.request:g} s"
            self._record(live, Refusal(Reason.REQUEST_TIMEOUT, detail))
        self._close(live)

    def malformed(self, transport: asyncio.Transport, message: str) -> None:
        """What came is no HTTP request or no WebSocket handshake, as `message` says; so the peer is told."""
        live = self._all.get(transport)
        view = live.connection.view() if live and live.connection else None
        self._audit.record(
            "request", "deny", reason=Reason.MALFORMED_REQUEST, hop=view, detail=printable(message)
        )

    def _record(self, live: LiveConnection, refusal: Refusal) -> None:
        assert live.connection is not None
        self._audit.record(
            "connection",
            "deny",
            reason=refusal.reason,
            hop=live.connection.view(),
            detail=refusal.detail,
            in_flight=len(live.in_flight),
        )

    @staticmethod
    def _safely(action: Callable[[LiveConnection], None], live: LiveConnection) -> None:
        # One connection's trouble must not end the watch over the others.
        try:
            action(live)
        except Exception:
            logger.exception("looking after a connection failed: it is closed")
            live.transport.abort()

    # --- closing ---

    def _plan(self, live: LiveConnection, delay: float, action: Callable[[LiveConnection], None]) -> None:
        live.closing = True
        entry = (time.monotonic() + delay, next(self._order), live, action)
        heapq.heappush(self._due, entry)
        if self._due[0] is entry:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._due:
            wait = max(self._due[0][0], self._not_before) - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(wait, self._work_off)

    def _work_off(self) -> None:
        """Do what is due, a few connections at a time: a timer for each would cost more than closing it."""
        self._timer = None
        now, done = time.monotonic(), 0
        turn = max(1.0, self._limits.per_second * _TICK_SECONDS)
        while self._due and self._due[0][0] <= now and done < turn:
            _, _, live, action = heapq.heappop(self._due)
            if live.transport in self._all:
                done += 1
                self._safely(action, live)
        self._not_before = now + max(_TICK_SECONDS, done / self._limits.per_second)
        self._arm()

    def _finish(self, live: LiveConnection) -> None:
        if live.refusal is not None:
            live.refusal = self._refusal_of(live, datetime.now(UTC))
            if live.refusal is None:  # acceptable again: the bundle came back
                live.closing = False
                return
            self._record(live, live.refusal)
        requests = list(live.in_flight)
        sockets = [request for request in requests if request.websocket]
        age = min((time.monotonic() - request.began for request in requests), default=self._limits.grace)
        if sockets:
            reason = str(live.refusal.reason) if live.refusal else "identity renewed"
            for request in sockets:
                task = asyncio.ensure_future(request.end(reason))
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._plan(live, _FAREWELL_SECONDS, self._abort)
        elif age < self._limits.grace:
            live.finish()
            self._plan(live, self._limits.grace - age, self._close)
        else:
            self._close(live)

    def _close(self, live: LiveConnection) -> None:
        if live.refusal is not None and not live.in_flight:
            # Nothing is owed to it any more: thousands of such peers need not be waited for.
            live.transport.get_extra_info("ssl_object").hang_up = True
        live.transport.close()
        self._plan(live, _FAREWELL_SECONDS, self._abort)

    def _abort(self, live: LiveConnection) -> None:
        live.transport.abort()


__all__ = ["LiveConnection", "LiveConnections", "LiveLimits"]
