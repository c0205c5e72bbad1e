"""uvicorn's protocol classes, whose connections are verified ones that are watched over by `live`.

What a parser knows and nobody else does is told from here: when the head of a request begins and ends, and
what is no request at all.
"""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from typing import Any

import h11

from .asgi import ASGIApp
from .live import LiveConnection, LiveConnections
from .tls import connection_of
from .verify import PeerRefused

# Bytes of a request line with its headers, where they don't come at once.
_MAX_HEAD = 64 << 10


def watched_http(base: Any, live: LiveConnections) -> Any:
    """`base`, uvicorn's protocol for h11 or for httptools, watched over by `live`."""
    watched = _watched(base, live)

    class WatchedHttp(watched):  # type: ignore[misc,valid-type]
        def send_400_response(self, msg: str) -> None:
            live.malformed(self.transport, msg)
            super().send_400_response(msg)

    httptools = hasattr(base, "on_headers_complete")
    return _with_heads_of_httptools(WatchedHttp) if httptools else _with_heads_of_h11(WatchedHttp)


def watched_websocket(base: Any, live: LiveConnections) -> Any:
    """`base`, uvicorn's protocol for WebSockets, watched over by `live`."""
    watched = _watched(base, live)

    class WatchedWebSocket(watched):  # type: ignore[misc,valid-type]
        def handle_connect(self, event: Any) -> None:
            super().handle_connect(event)
            if self.response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
                live.malformed(self.transport, "Invalid WebSocket handshake received.")

    return WatchedWebSocket


def _watched(base: Any, live: LiveConnections) -> Any:
    class Watched(base):  # type: ignore[misc]
        app: ASGIApp
        watched: LiveConnection

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            connection = None
            with contextlib.suppress(PeerRefused):  # the guard then refuses every request
                connection = connection_of(transport.get_extra_info("ssl_object"))
            self.app = self.watched = live.opened(self.app, connection, transport)

        def connection_lost(self, exc: Exception | None) -> None:
            live.closed(self.transport)
            super().connection_lost(exc)

    return Watched


def _with_heads_of_h11(base: Any) -> Any:
    """h11 keeps the bytes of a head until it is whole; how many it keeps is limited."""

    class Heads(base):  # type: ignore[misc]
        def handle_events(self) -> None:
            super().handle_events()
            held, _ = self.conn.trailing_data
            if not held or self.conn.their_state is not h11.IDLE:
                self.watched.head_ends()
            elif self.watched.head_since is None:
                self.watched.head_begins()

    return Heads


def _with_heads_of_httptools(base: Any) -> Any:
    """httptools says when a head begins and ends; one without an end is ended here."""

    class Heads(base):  # type: ignore[misc]
        begun = 0
        in_head = False
        head = 0

        def on_message_begin(self) -> None:
            self.begun, self.in_head, self.head = self.begun + 1, True, 0
            self.watched.head_begins()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.in_head = False
            self.watched.head_ends()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            message = self.begun if self.in_head else 0
            super().data_received(data)
            # What holds a beginning or an end may hold other messages, too, and is not counted.
            if self.in_head and message == self.begun:
                self.head += len(data)
                if self.head > _MAX_HEAD and not self.transport.is_closing():
                    self.send_400_response("The request's headers are too large.")

    return Heads


__all__ = ["watched_http", "watched_websocket"]
