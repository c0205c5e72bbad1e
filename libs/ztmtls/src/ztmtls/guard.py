"""The check on every request: who is calling, still acceptable, allowed by the policy, written down."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from .asgi import ASGIApp, Message, Receive, Scope, Send, send_refusal
from .audit import AuditLog
from .authz import NotAuthorized, Policy, PolicyFile, authorize_request
from .identity import NoPeer, RequestIdentity, request_identity, set_request_identity
from .reasons import Reason, Refusal, printable
from .source import NoIdentity, Source
from .tls import Connection

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20
"""Bytes that a request's body may have, unless said otherwise."""


class Guard:
    """ASGI middleware around a whole application; `server.serve` puts it there.

    Per request: the connection's peer is verified again if the identity source changed or a certificate
    on the path ran out, the path must have one meaning only, a rule of the policy must allow caller,
    method and path, and the body must not be too large. Every answer, yes or no, is an audit line. There
    is no way around it: without a verified connection the request is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        source: Source,
        policy: Policy | PolicyFile,
        audit: AuditLog,
        max_body: int = MAX_BODY,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._max_body = max_body
        self._source = source
        self._policy = policy
        self._audit = audit
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if self._draining():
            send = _with_close(send)
        method, path = _method(scope), scope["path"]
        connection: Connection | None = None
        try:
            connection = request_identity(scope).connection
            rule = self.check(connection, scope)
        except Refusal as refusal:
            await self._deny(scope, send, connection, method, refusal)
            return
        if connection.outlived(datetime.now(UTC)):
            send = _with_close(send)
        body = _LimitedBody(scope, receive, send, self._max_body)
        if not body.exceeded:
            set_request_identity(scope, RequestIdentity(connection, rule))
            self._audit.record("request", "allow", hop=connection.view(rule), method=method, path=path)
            try:
                await self._app(scope, body.receive, body.send)
            except Exception:
                if not body.exceeded:
                    raise
        if body.exceeded and not body.answered:
            await body.discard()
            too_large = Refusal(Reason.TOO_LARGE, f"the body may have {self._max_body} bytes")
            await self._deny(scope, send, connection, method, too_large)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policy.current if isinstance(self._policy, PolicyFile) else self._policy

    def check_peer(self, connection: Connection) -> None:
        """Raise a `Refusal` unless the peer of `connection` is acceptable, and named by some rule."""
        connection.recheck(self._source.context, datetime.now(UTC))
        if not self.policy.names(connection.peer.id):
            raise NotAuthorized(Reason.CALLER_NOT_ALLOWED, f"no rule names {connection.peer.id}")

    def check(self, connection: Connection, scope: Scope) -> str:
        """The rule that lets the peer of `connection` make the request of `scope`, or a `Refusal` raised."""
        connection.recheck(self._source.context, datetime.now(UTC))
        path = scope["path"]
        raw_path = scope.get("raw_path") or path.encode()
        return authorize_request(self._policy, connection.peer.id, _method(scope), path, raw_path)

    async def _deny(
        self, scope: Scope, send: Send, connection: Connection | None, method: str, refusal: Refusal
    ) -> None:
        self._audit.record(
            "request",
            "deny",
            reason=refusal.reason,
            hop=connection.view() if connection else None,
            detail=refusal.detail,
            method=printable(method, 16),
            path=printable(scope["path"]),
        )
        set_request_identity(scope, None)
        scope[_REFUSAL_KEY] = refusal
        await _refuse(scope, send, refusal)


_REFUSAL_KEY = "ztmtls.refusal"


def refusal_of(scope: Scope) -> Refusal | None:
    """Why the guard refused this request, if it did."""
    refusal = scope.get(_REFUSAL_KEY)
    return refusal if isinstance(refusal, Refusal) else None


def _method(scope: Scope) -> str:
    return str(scope["method"]) if scope["type"] == "http" else "WEBSOCKET"


class _LimitedBody:
    """Counts the body as it arrives. Past the limit the application sees a client that hung up."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self.answered = False
        self._receive = receive
        self._send = send
        self._limit = limit
        self._received = 0
        self._more = True
        declared = (value for name, value in scope.get("headers", ()) if name == b"content-length")
        self.exceeded = any(value.isdigit() and int(value) > limit for value in declared)

    async def receive(self) -> Message:
        if self.exceeded:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._count(message)
        return {"type": "http.disconnect"} if self.exceeded else message

    async def send(self, message: Message) -> None:
        if self.exceeded and not self.answered:
            return  # whatever the application made of it, the answer is ours
        self.answered = self.answered or message["type"] == "http.response.start"
        await self._send(message)

    async def discard(self) -> None:
        """Read on for a while: an answer sent while the client still sends would be lost in a reset."""
        while self._more and self._received < 8 * self._limit:
            self._count(await self._receive())

    def _count(self, message: Message) -> None:
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._more = message.get("more_body", False)
            self.exceeded = self.exceeded or self._received > self._limit
        elif message["type"] == "http.disconnect":
            self._more = False


async def _refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    headers = [(b"connection", b"close")]
    if isinstance(refusal, NotAuthorized):
        # A verified caller who may not do this. In all other cases the connection is of no more use.
        status, title, headers = 403, "Refused", []
    elif isinstance(refusal, NoPeer):
        status, title = 403, "Refused"
    elif isinstance(refusal, NoIdentity):
        status, title = 503, "This service has no identity at the moment"
    elif refusal.reason is Reason.TOO_LARGE:
        status, title = 413, "The request is too large"
    else:
        status, title = 401, "Your identity is no longer accepted on this connection"
    await send_refusal(scope, send, refusal, status, title, headers)


def _with_close(send: Send) -> Send:
    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        await send(message)

    return closing


__all__ = ["Guard", "refusal_of"]
