"""Server-sent events (HTML Standard, section 9.2): bounded in number, ended when the process stops."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ztmtls.audit import AuditLog
from ztmtls.reasons import Reason, Refusal

#: Streams that may be open at once, of all people together; each holds a connection and a little memory.
LIMIT = 64


class TooManyStreams(Refusal):
    """So many streams are open that no other is given. Reason: `too_many_streams`."""

    def __init__(self) -> None:
        super().__init__(Reason.TOO_MANY_STREAMS, f"{LIMIT} pages listen already. Close one.")


class Streams:
    """The open streams of this process."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._open = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End all streams now, and those that are asked for from now on."""
        self._closing.set()

    def answer(self, path: str, events: AsyncGenerator[bytes, None]) -> Response:
        """A stream of `events`, each a whole event. It raises `TooManyStreams` when it should begin."""
        return _Stream(self._until_closed(events), partial(self._one_more, path))

    @contextlib.contextmanager
    def _one_more(self, path: str) -> Iterator[None]:
        # Counted where it begins, and not where it is promised: many can be asked for in one moment.
        if self._open >= LIMIT:
            self._audit.record("door", "deny", reason=Reason.TOO_MANY_STREAMS, method="GET", path=path)
            raise TooManyStreams
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _until_closed(self, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        closing = asyncio.create_task(self._closing.wait())
        try:
            while not self._closing.is_set():
                event = asyncio.ensure_future(anext(events))
                try:
                    await asyncio.wait({event, closing}, return_when=asyncio.FIRST_COMPLETED)
                    if closing.done():
                        return
                    yield event.result()
                except StopAsyncIteration:
                    return
                finally:
                    event.cancel()
                    await asyncio.gather(event, return_exceptions=True)
        finally:
            closing.cancel()
            await events.aclose()


class _Stream(StreamingResponse):
    def __init__(
        self, events: AsyncIterator[bytes], place: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place():
            await super().__call__(scope, receive, send)


def event(data: str, name: str = "message") -> bytes:
    """One event. `data` may have several lines."""
    lines = "".join(f"data: {line}\n" for line in re.split(r"\r\n|\r|\n", data))
    return f"event: {name}\n{lines}\n".encode()


HEARTBEAT = b":\n\n"
"""A comment, which browsers ignore: what is written to a connection that is gone fails."""
