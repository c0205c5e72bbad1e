"""The benchmark's load generator: it counts what was answered, and takes nothing else for an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.load import load

BODY = b'{"item": "book"}'


@asynccontextmanager
async def server(status: bytes, asked: list[bytes], pieces: int = 1) -> AsyncIterator[int]:
    """Answers each request with `status`, in so many pieces; each body that it is sent is in `asked`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                assert head.startswith(b"POST /orders HTTP/1.1\r\n")
                asked.append(await reader.readexactly(len(BODY)))
                answer = b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\npaid"
                step = -(-len(answer) // pieces)
                for start in range(0, len(answer), step):
                    writer.write(answer[start : start + step])
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as made:
        yield made.sockets[0].getsockname()[1]


@pytest.mark.parametrize("pieces", [1, 7])
async def test_every_answer_is_counted_once(pieces: int) -> None:
    asked: list[bytes] = []
    async with server(b"200 OK", asked, pieces) as port:
        found = await load(port, "/orders", BODY, connections=3, seconds=0.2)
    assert len(found.times) == len(asked) >= 3
    assert set(asked) == {BODY}
    assert found.rate == len(asked) / found.seconds
    assert found.cpu > 0


async def test_an_answer_that_refuses_is_no_answer() -> None:
    async with server(b"403 Forbidden", []) as port:
        with pytest.raises(RuntimeError, match="403 Forbidden"):
            await load(port, "/orders", BODY, connections=2, seconds=5)


async def test_at_a_rate_no_more_is_asked_than_that() -> None:
    asked: list[bytes] = []
    async with server(b"200 OK", asked) as port:
        found = await load(port, "/orders", BODY, connections=2, seconds=0.5, rate=20)
    # The last of each connection is the one that came after its time was over.
    assert len(found.times) <= 20 * found.seconds + 2
