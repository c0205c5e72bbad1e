"""Load: the same HTTP request over kept connections, by a protocol that does next to nothing itself.

Its own CPU time is told beside what it measured: whoever reads it sees that it was not what limited it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field


@dataclass
class Load:
    """What was seen: `seconds` it took, each request's time in `times` (seconds), own `cpu` seconds."""

    seconds: float = 0.0
    cpu: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.times) / self.seconds


class _Connection(asyncio.Protocol):
    """Asks again when it has the whole answer; with `every`, so many seconds after it was due before."""

    def __init__(self, request: bytes, times: list[float], until: float, every: float) -> None:
        self._request, self._times, self._until, self._every = request, times, until, every
        self._buffer = b""
        self._due = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._due = time.perf_counter()
        self._ask()

    def _ask(self) -> None:
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._end(RuntimeError(f"answered: {head.splitlines()[0].decode()}"))
            return
        self._buffer = b""
        now = time.perf_counter()
        self._times.append(now - self._due)  # from when it was due, also when it could not be sent then
        if now >= self._until:
            self._end()
            return
        if not self._every:
            self._due = now
            self._ask()
            return
        self._due += self._every
        asyncio.get_running_loop().call_later(max(0.0, self._due - now), self._ask)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or RuntimeError("the connection was closed"))

    def _end(self, error: Exception | None = None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
        self._transport.close()


async def load(
    port: int, path: str, body: bytes, connections: int, seconds: float, rate: float = 0.0
) -> Load:
    """POST `body` over so many connections for so long: one after the other on each, or with `rate` so many a
    second altogether, whether or not the answers keep up.

    Raises:
        RuntimeError, OSError: an answer was not 200, or a connection was lost.
        TimeoutError: an answer did not come within a minute.
    """
    request = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
    found = Load()
    every = connections / rate if rate else 0.0
    began, own = time.perf_counter(), time.process_time()
    loop = asyncio.get_running_loop()
    made = []
    for number in range(connections):
        _, protocol = await loop.create_connection(
            lambda: _Connection(request, found.times, began + seconds, every), "127.0.0.1", port
        )
        made.append(protocol)
        if every and number + 1 < connections:
            await asyncio.sleep(every / connections)  # spread over the time between two of one connection
    async with asyncio.timeout(seconds + 60):
        await asyncio.gather(*(protocol.done for protocol in made))
    found.seconds, found.cpu = time.perf_counter() - began, time.process_time() - own
    return found
