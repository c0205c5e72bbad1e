"""A refusal over ASGI: the same problem document for a request and for the opening of a WebSocket."""

from __future__ import annotations

import json
from typing import Any

from ztmtls.asgi import Message, send_refusal
from ztmtls.authz import NotAuthorized
from ztmtls.reasons import Reason

REFUSAL = NotAuthorized(Reason.ROUTE_NOT_ALLOWED, "no rule lets you")


async def refused(scope: dict[str, Any]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await send_refusal(scope, send, REFUSAL, 403, "Refused", [(b"connection", b"close")])
    return sent


def assert_problem_document(start: Message, body: Message) -> None:
    assert start["status"] == 403
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"connection"] == b"close"
    assert int(headers[b"content-length"]) == len(body["body"])
    said = json.loads(body["body"])
    assert (said["reason"], said["title"], said["detail"]) == (REFUSAL.reason, "Refused", REFUSAL.detail)


async def test_a_request_is_answered_with_a_problem_document() -> None:
    start, body = await refused({"type": "http"})

    assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
    assert_problem_document(start, body)


async def test_the_opening_of_a_websocket_is_answered_alike_where_the_server_can() -> None:
    start, body = await refused({"type": "websocket", "extensions": {"websocket.http.response": {}}})

    assert (start["type"], body["type"]) == ("websocket.http.response.start", "websocket.http.response.body")
    assert_problem_document(start, body)


async def test_a_websocket_is_closed_with_the_reason_where_it_can_not() -> None:
    for scope in ({"type": "websocket"}, {"type": "websocket", "extensions": {}}):
        assert await refused(scope) == [
            {"type": "websocket.close", "code": 1008, "reason": Reason.ROUTE_NOT_ALLOWED}
        ]
