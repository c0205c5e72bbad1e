"""Defences at the door: what the frontend takes from a browser, and what it tells browsers to refuse.

Between a browser and the frontend there is no SPIFFE identity. What stands there instead: a host
allow-list, a header allow-list (so that no identity or forwarding header a client writes is ever read
or passed on), a bound on bodies, forms that only our own pages can send, and strict response headers.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ztmtls.audit import AuditLog
from ztmtls.reasons import Reason, Refusal

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: with it browsers send `Origin: null` with our own forms (Fetch, "append a request
    # `Origin` header"), and the origin check would have to accept that from anybody.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "X-Frame-Options": "DENY",
}

READ_HEADERS = frozenset(
    (
        b"accept",
        b"content-length",
        b"content-type",
        b"cookie",
        b"host",
        b"origin",
        b"sec-fetch-dest",
        b"sec-fetch-site",
    )
)
"""All that the frontend reads of a browser's headers. The rest is dropped before any code sees it:
``X-Forwarded-*``, ``X-Forwarded-Client-Cert``, ``X-Spiffe-Id`` and whatever else claims an identity."""

FRAMES = frozenset(("iframe", "frame", "embed", "object", "fencedframe"))
"""What a browser says in ``Sec-Fetch-Dest`` when a page is to be shown inside another (Fetch Metadata)."""

LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))

Refuse = Callable[[Request, int, Refusal], Response]


class Guard:
    """ASGI middleware around the whole application, so that no answer leaves without the headers."""

    def __init__(
        self, app: ASGIApp, *, hosts: tuple[str, ...], max_body: int, https: bool, refuse: Refuse
    ) -> None:
        self._app = app
        self._hosts = frozenset(hosts)
        self._max_body = max_body
        self._refuse = refuse
        self._headers = dict(HEADERS)
        if https:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # there are none here

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] in READ_HEADERS]}
        headers = Headers(scope=scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    ours[name] = value
                ours.setdefault("Cache-Control", "no-store")
            await send(message)

        if fault := self._fault(headers):
            response = self._refuse(Request(scope), *fault)
            response.headers["Connection"] = "close"  # a body may follow that nobody reads
            await response(scope, receive, send_guarded)
            return
        await self._app(scope, self._bounded(receive), send_guarded)

    def _fault(self, headers: Headers) -> tuple[int, Refusal] | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or host_name(hosts[0]) not in self._hosts:
            return 421, Refusal(Reason.HOST_NOT_ALLOWED, "This service has another name.")
        if FRAMES.intersection(headers.getlist("sec-fetch-dest")):
            return 403, Refusal(Reason.FRAMING_REFUSED, "These pages are not shown inside other pages.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body:
            return 413, self._too_large()
        return None

    def _too_large(self) -> Refusal:
        return Refusal(Reason.TOO_LARGE, f"The request holds more than {self._max_body} bytes.")

    def _bounded(self, receive: Receive) -> Receive:
        taken = 0

        async def receive_bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:  # sent in chunks, without a Content-Length
                raise HTTPException(413, self._too_large().detail, {"Connection": "close"})
            return message

        return receive_bounded


def host_name(host: str) -> str:
    """The name in a ``Host`` header, lower-case, without the port."""
    return re.sub(r":\d*$", "", host).lower()


class CsrfFailed(Refusal):
    """A form did not come from a page of ours in this browser. Reason: `csrf_failed`."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.CSRF_FAILED, detail)


class Csrf:
    """Forms that only our own pages can send: a signed token bound to a cookie, and the browser's word.

    The cookie is ``HttpOnly; SameSite=Strict`` and random; the form holds its signature. An attacker's
    page knows neither, and the browser names the page a form was sent from (``Sec-Fetch-Site``,
    ``Origin``).
    """

    FIELD = "csrf"
    _COOKIE_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")

    def __init__(self, key: bytes, *, https: bool) -> None:
        self._key = key
        self._https = https
        # `__Host-`: browsers take such a cookie only over TLS from this very host, for no other host.
        self.cookie = "__Host-zt-form" if https else "zt-form"

    def cookie_for(self, request: Request) -> str:
        """The cookie this browser has, or a new one."""
        return self._cookie_of(request) or secrets.token_urlsafe(32)

    def token(self, cookie: str) -> str:
        """What a form must hold to be taken from the browser with this `cookie`."""
        return hmac.new(self._key, b"form:" + cookie.encode(), hashlib.sha256).hexdigest()

    def remember(self, response: Response, cookie: str) -> None:
        """Give the browser its cookie, for the session."""
        response.set_cookie(
            self.cookie, cookie, path="/", secure=self._https, httponly=True, samesite="strict"
        )

    async def take(self, request: Request, audit: AuditLog) -> list[tuple[str, str]]:
        """The fields of a form of ours; a line of the audit log either way. Raises `CsrfFailed`."""
        form = await request.form(max_fields=64, max_files=0)
        fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        path = request.url.path
        try:
            self.check(request, dict(fields).get(self.FIELD, ""))
        except CsrfFailed as error:
            audit.record("form", "deny", reason=error.reason, detail=error.detail, method="POST", path=path)
            raise
        audit.record("form", "allow", method="POST", path=path)
        return fields

    def check(self, request: Request, token: str) -> None:
        """Raise `CsrfFailed` unless this form was sent by a page of ours from this browser."""
        self._check_origin(request)
        cookie = self._cookie_of(request)
        if cookie is None:
            raise CsrfFailed("The browser sent no form cookie.")
        if not hmac.compare_digest(self.token(cookie).encode(), token.encode()):
            raise CsrfFailed("The form's token does not belong to this browser.")

    def _cookie_of(self, request: Request) -> str | None:
        value = request.cookies.get(self.cookie, "")
        return value if self._COOKIE_VALUE.fullmatch(value) else None

    def _check_origin(self, request: Request) -> None:
        sites = request.headers.getlist("sec-fetch-site")
        origins = request.headers.getlist("origin")
        if not sites and not origins:
            raise CsrfFailed("The request does not say which page it comes from.")
        if any(site not in ("same-origin", "none") for site in sites):
            raise CsrfFailed("The browser says that another site sent this form.")
        if any(not self._is_ours(origin, request.headers["host"]) for origin in origins):
            raise CsrfFailed("The form was sent from another origin.")

    def _is_ours(self, origin: str, host: str) -> bool:
        # On a machine's own loopback (a port forwarded from the cluster) there is no TLS to demand.
        plain = not self._https or host_name(host) in LOOPBACK
        return origin == f"https://{host}" or (plain and origin == f"http://{host}")
