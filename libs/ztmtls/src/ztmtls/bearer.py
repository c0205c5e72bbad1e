"""Callers behind a proxy that ends TLS: a JWT-SVID in the ``Authorization`` header, verified per request.

An identity never comes from a header, with this one exception: a token that the caller's own trust domain
signed, for us alone, and for minutes (JWT-SVID section 5.2). It is weaker than mutual TLS, since whoever
sees the token can use it until it expires: the proxy, and every hop behind it. So it is a middleware of its
own that an application must ask for, and what it yields is a `JwtCaller`, never the peer of a connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from .asgi import ASGIApp, Receive, Scope, Send, send_refusal
from .audit import AuditLog
from .authz import NotAuthorized, Policy, PolicyFile, authorize_request
from .ids import SpiffeId
from .jwt_source import NoBundles
from .jwt_svid import JwtSvid
from .problems import bearer_challenge
from .reasons import JwtRefused, Reason, Refusal, printable
from .svid import rfc3339

SCOPE_KEY = "ztmtls.jwt"

# RFC 6750 section 2.1; the scheme's name has no case (RFC 9110 section 11.1).
_BEARER = re.compile(rb"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)


class JwtValidator(Protocol):
    """What validates tokens: `jwt_source.JwtSource` is one."""

    async def validate(self, token: str, audience: str) -> JwtSvid:
        """As `jwt_source.JwtSource.validate`, with the same errors."""
        ...


@dataclass(frozen=True, slots=True)
class JwtCaller:
    """Who a request's JWT-SVID names, and the policy rule that allowed it. The token itself is not kept."""

    id: SpiffeId
    audience: tuple[str, ...]
    expiry: datetime
    rule: str


class NoJwtCaller(Refusal):
    """No `BearerGuard` let this request in. Reason: `jwt_missing`."""

    def __init__(self) -> None:
        super().__init__(Reason.JWT_MISSING, "the request did not come through the check of JWT-SVIDs")


def jwt_caller(scope: Mapping[str, Any]) -> JwtCaller:
    """The caller of this ASGI request by its JWT-SVID. Raises `NoJwtCaller` when there is none."""
    caller = scope.get(SCOPE_KEY)
    if not isinstance(caller, JwtCaller):
        raise NoJwtCaller
    return caller


class BearerGuard:
    """ASGI middleware around a whole application: every request needs a JWT-SVID and a rule of the policy.

    The counterpart of `guard.Guard` for what can't be reached over mutual TLS. Each decision is an audit
    line with event ``bearer_request``. The ``Authorization`` header goes no further than here. The proxy
    has to limit bodies, and the way from it to us must be confidential (JWT-SVID section 7.3).

    Args:
        source: validates tokens against the live bundles.
        audience: the name that callers ask tokens for, ours alone: best our own SPIFFE ID.
        policy: who may use which method on which path; a `PolicyFile` is not reloaded from here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        source: JwtValidator,
        audience: str,
        policy: Policy | PolicyFile,
        audit: AuditLog,
    ) -> None:
        if not audience:
            raise ValueError("an empty audience would be anybody's")
        self._app = app
        self._source = source
        self._audience = audience
        self._policy = policy
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
        path = scope["path"]
        svid: JwtSvid | None = None
        try:
            svid = await self._source.validate(_token(scope), self._audience)
            raw_path = scope.get("raw_path") or path.encode()
            rule = authorize_request(self._policy, svid.id, method, path, raw_path)
        except Refusal as refusal:
            self._record("deny", svid, printable(method, 16), printable(path), refusal)
            await _refuse(scope, send, refusal)
            return
        self._record("allow", svid, method, path, rule=rule)
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
        caller = JwtCaller(svid.id, svid.audience, svid.expiry, rule)
        await self._app({**scope, "headers": headers, SCOPE_KEY: caller}, receive, send)

    def _record(
        self,
        decision: Any,
        svid: JwtSvid | None,
        method: str,
        path: str,
        refusal: Refusal | None = None,
        rule: str | None = None,
    ) -> None:
        self._audit.record(
            "bearer_request",
            decision,
            reason=refusal.reason if refusal else None,
            detail=refusal.detail if refusal else None,
            caller_id=str(svid.id) if svid else None,
            token_expires=rfc3339(svid.expiry) if svid else None,
            audience=self._audience,
            rule=rule,
            method=method,
            path=path,
        )


def _token(scope: Scope) -> str:
    values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if not values:
        raise JwtRefused(Reason.JWT_MISSING, "the request has no Authorization header")
    found = _BEARER.fullmatch(values[0])
    if len(values) > 1 or found is None:
        raise JwtRefused(Reason.JWT_MALFORMED, "Authorization is not one Bearer token")
    return found[1].decode("ascii")


async def _refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    headers = []
    if isinstance(refusal, NotAuthorized):
        status, title = 403, "Refused"
    elif isinstance(refusal, NoBundles):
        status, title = 503, "This service can't verify tokens at the moment"
    else:
        status = 401
        title, challenge = bearer_challenge(refusal.reason)
        headers.append((b"www-authenticate", challenge.encode()))
    await send_refusal(scope, send, refusal, status, title, headers)


__all__ = ["BearerGuard", "JwtCaller", "JwtValidator", "NoJwtCaller", "jwt_caller"]
