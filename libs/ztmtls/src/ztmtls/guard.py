"""The check on every request: who is calling, still acceptable, allowed by the policy, written down."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from .asgi import ASGIApp, Message, Receive, Scope, Send, send_refusal
from .audit import AuditLog
from .authz import NotAuthorized, Policy, PolicyFile, authorize_request
from .identity import NoPeer, RequestIdentity, request_identity, set_request_identity
from .problems import MEDIA_TYPE
from .reasons import Reason, Refusal, printable
from .source import NoIdentity, Source
from .tls import Connection

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20
"""Bytes that a request's body may have, unless said otherwise."""

REQUEST_TIMEOUT = 30.0
"""Seconds in which a request must have arrived whole, unless said otherwise."""


class Guard:
    """ASGI middleware around a whole application; `server.serve` puts it there.

    Per request: it must have one end only (RFC 9112 section 6.3), the connection's peer is verified again if
    the identity source changed or a certificate on the path ran out, the path must have one meaning only, a
    rule of the policy must allow caller, method and path, and the body must not be too large or too slow to
    come. Every answer, yes or no, is an audit line; so is what the application then refuses (4xx, or a
    WebSocket that it does not accept), and an answer that it repeats for an Idempotency-Key.

    There is no way around it: without a verified connection the request is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        source: Source,
        policy: Policy | PolicyFile,
        audit: AuditLog,
        max_body: int = MAX_BODY,
        request_timeout: float = REQUEST_TIMEOUT,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._max_body = max_body
        self._request_timeout = request_timeout
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
            refuse_two_ends(scope)  # first: what is refused for the caller's rights keeps its connection
            rule = self.check(connection, scope)
        except Refusal as refusal:
            self._record_denial(scope, connection, method, refusal)
            await _refuse(scope, send, refusal)
            return
        if connection.outlived(datetime.now(UTC)):
            send = _with_close(send)
        body = _LimitedBody(scope, receive, send, self._max_body, self._request_timeout)
        if not body.fault:
            set_request_identity(scope, RequestIdentity(connection, rule))
            self._audit.record("request", "allow", hop=connection.view(rule), method=method, path=path)
            try:
                await self._app(scope, body.receive, body.send)
            except Exception:
                if not body.fault:
                    raise
            finally:
                self._tell(connection, rule, method, path, body.answer)
        if body.fault:
            self._record_denial(scope, connection, method, body.fault)
            if not body.answer.begun:
                await body.discard()
                await _refuse(scope, send, body.fault)

    def _tell(
        self, connection: Connection, rule: str, method: str, path: str, answer: ApplicationAnswer
    ) -> None:
        """What the application made of a request that it was given, where that is worth a line."""
        if 400 <= answer.status < 500:
            self._audit.record(
                "application",
                "deny",
                reason=answer.reason,
                hop=connection.view(rule),
                method=method,
                path=path,
                status=answer.status,
            )
        elif answer.replayed:
            self._audit.record(
                "application",
                "allow",
                hop=connection.view(rule),
                method=method,
                path=path,
                status=answer.status,
                replayed=True,
            )

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

    def _record_denial(
        self, scope: Scope, connection: Connection | None, method: str, refusal: Refusal
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


_REFUSAL_KEY = "ztmtls.refusal"


def refusal_of(scope: Scope) -> Refusal | None:
    """Why the guard refused this request, if it did."""
    refusal = scope.get(_REFUSAL_KEY)
    return refusal if isinstance(refusal, Refusal) else None


def _method(scope: Scope) -> str:
    return str(scope["method"]) if scope["type"] == "http" else "WEBSOCKET"


def refuse_two_ends(scope: Scope) -> None:
    """Raise a `Refusal` for a request that says in two ways where its body ends.

    Who reads one header takes for the next request what is a body to who reads the other: RFC 9112 section
    6.3 has a server refuse it.
    """
    lengths = {value for name, value in scope.get("headers", ()) if name == b"content-length"}
    chunked = any(name == b"transfer-encoding" for name, _ in scope.get("headers", ()))
    if len(lengths) + chunked > 1:
        raise Refusal(Reason.MALFORMED_REQUEST, "the request says in two ways where its body ends")


class ApplicationAnswer:
    """What the application answers, read as it passes: its status, and why it refuses."""

    def __init__(self) -> None:
        self.begun = False
        self.status = 0
        self.replayed = False
        self.reason = Reason.HTTP_ERROR
        self._problem = False

    def see(self, message: Message) -> None:
        """Take in a message to the client."""
        kind = message["type"].removeprefix("websocket.")
        if kind == "close" and not self.begun:  # of a WebSocket that was not accepted: the server answers 403
            self.begun, self.status = True, 403
        elif kind == "accept":
            self.begun = True
        elif kind == "http.response.start":
            self.begun, self.status = True, message["status"]
            headers = list(message.get("headers", ()))
            self.replayed = any(name == _REPLAYED and value == b"true" for name, value in headers)
            if 400 <= self.status < 500:
                self.reason = _USUAL_REASONS.get(self.status, Reason.HTTP_ERROR)
                self._problem = any(
                    name == b"content-type" and value.startswith(_PROBLEM) for name, value in headers
                )
        elif self._problem and kind == "http.response.body":
            self._problem = False
            self.reason = _reason_in(message.get("body", b"")) or self.reason


_REPLAYED, _PROBLEM = b"idempotency-replayed", MEDIA_TYPE.encode()

# A problem document that is longer has no reason of ours in it.
_LONGEST_PROBLEM = 64 << 10

_USUAL_REASONS = {
    404: Reason.NOT_FOUND,
    405: Reason.METHOD_NOT_ALLOWED,
    408: Reason.REQUEST_TIMEOUT,
    409: Reason.CONFLICT,
    413: Reason.TOO_LARGE,
    422: Reason.INVALID_REQUEST,
}


def _reason_in(problem: bytes) -> Reason | None:
    """The reason code of a problem document, when it is one of ours."""
    if len(problem) > _LONGEST_PROBLEM:
        return None
    try:
        return Reason(json.loads(problem)["reason"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class _LimitedBody:
    """Counts the body, and the time that the sender is waited for. Past a limit the application sees a client
    that hung up."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int, timeout: float) -> None:
        self.answer = ApplicationAnswer()
        self.fault: Refusal | None = None
        self._left = self._timeout = timeout
        self._receive = receive
        self._send = send
        self._limit = limit
        self._received = 0
        self._more = bool(scope["type"] == "http")
        declared = (value for name, value in scope.get("headers", ()) if name == b"content-length")
        if any(value.isdigit() and int(value) > limit for value in declared):
            self._exceeded()

    async def receive(self) -> Message:
        if self.fault:
            return {"type": "http.disconnect"}
        message = await self._next()
        self._count(message)
        return {"type": "http.disconnect"} if self.fault else message

    async def send(self, message: Message) -> None:
        if self.fault and not self.answer.begun:
            return  # whatever the application made of it, the answer is ours
        self.answer.see(message)
        await self._send(message)

    async def _next(self) -> Message:
        if not self._more:  # all has come: who waits now, waits for the client to go
            return await self._receive()
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._left):
                return await self._receive()
        except TimeoutError:
            detail = f"the request did not come whole within {self._timeout:g} s"
            self.fault = self.fault or Refusal(Reason.REQUEST_TIMEOUT, detail)
            self._more = False
            return {"type": "http.disconnect"}
        finally:
            self._left -= time.monotonic() - began

    def _exceeded(self) -> None:
        self.fault = Refusal(Reason.TOO_LARGE, f"the body may have {self._limit} bytes")

    async def discard(self) -> None:
        """Read on for a while: an answer sent while the client still sends would be lost in a reset."""
        while self._more and self._received < 8 * self._limit:
            self._count(await self._next())

    def _count(self, message: Message) -> None:
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._more = message.get("more_body", False)
            if self._received > self._limit and not self.fault:
                self._exceeded()
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
    elif refusal.reason is Reason.REQUEST_TIMEOUT:
        status, title = 408, "The request took too long to come"
    elif refusal.reason is Reason.MALFORMED_REQUEST:
        status, title = 400, "The request is malformed"
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
