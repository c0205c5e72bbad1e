"""The ASGI interface as types, and how an ASGI application tells a caller that it is refused."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from .problems import MEDIA_TYPE, problem_body
from .reasons import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


async def send_refusal(
    scope: Scope,
    send: Send,
    refusal: Refusal,
    status: int,
    title: str,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Answer an HTTP request, or a WebSocket's opening one, with a problem document (RFC 9457).

    Where the server can't answer the latter in HTTP (it lacks the extension ``websocket.http.response``),
    the WebSocket is closed with code 1008 and the reason code.
    """
    kind = "http.response"
    if scope["type"] == "websocket":
        kind = "websocket.http.response"
        if kind not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": str(refusal.reason)})
            return
    body = json.dumps(problem_body(status, refusal.reason, title, refusal.detail)).encode()
    described = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": f"{kind}.start", "status": status, "headers": [*described, *headers]})
    await send({"type": f"{kind}.body", "body": body})
