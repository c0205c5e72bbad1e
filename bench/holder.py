"""Holds many connections to the ztmtls server, as a peer of another trust domain.

Prints ``open N`` when all are open, and ``closed N SECONDS`` (first to last) when all are closed.
"""

from __future__ import annotations

import asyncio
import sys

from ztmtls.authz import exact
from ztmtls.source import X509Source
from ztmtls.tls import client_context


class _Held(asyncio.Protocol):
    def __init__(self, closed: list[float]) -> None:
        self._closed = closed

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.append(asyncio.get_running_loop().time())


async def main(port: int, number: int, server_id: str) -> None:
    loop = asyncio.get_running_loop()
    closed: list[float] = []
    async with X509Source() as source:
        await source.ready(30)
        context = client_context(source, exact(server_id))
        for _ in range(number):
            await loop.create_connection(lambda: _Held(closed), "127.0.0.1", port, ssl=context)
        print(f"open {number}", flush=True)
        while len(closed) < number:
            await asyncio.sleep(0.01)
    print(f"closed {len(closed)} {closed[-1] - closed[0]:.3f}", flush=True)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
