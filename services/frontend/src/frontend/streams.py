"""Server-sent events (HTML Standard, section 9.2): bounded in number, ended when the process stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.responses import Response, StreamingResponse

from ztmtls.audit import AuditLog
from ztmtls.reasons import Reason, Refusal

#: Streams that may be open at once; each holds a connection and a little memory.
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
        """A stream of `events`, each a whole event. Raises `TooManyStreams`."""
        if self._open >= LIMIT:
            self._audit.record("door", "deny", reason=Reason.TOO_MANY_STREAMS, method="GET", path=path)
            raise TooManyStreams
        return StreamingResponse(self._until_closed(events), media_type="text/event-stream")

    async def _until_closed(self, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        self._open += 1
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
            self._open -= 1
            await events.aclose()


def event(data: str, name: str = "message") -> bytes:
    """One event. `data` may have several lines."""
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    return f"event: {name}\n{lines}\n".encode()


HEARTBEAT = b":\n\n"
"""A comment, which browsers ignore: what is written to a connection that is gone fails."""
