"""Holds many connections to the ztmtls server, as a peer of another trust domain.

Prints ``open N`` when all are open, and ``closed N SECONDS`` (first to last) when all are closed. Blocking
sockets, since it shares the machine with what is measured: its part in closing should weigh little.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import sys
import time

from ztmtls.authz import exact
from ztmtls.source import X509Source
from ztmtls.tls import client_context


async def main(port: int, number: int, server_id: str) -> None:
    async with X509Source() as source:
        await source.ready(30)
        await asyncio.to_thread(_hold, source, port, number, server_id)


def _hold(source: X509Source, port: int, number: int, server_id: str) -> None:
    context = client_context(source, exact(server_id))
    with selectors.DefaultSelector() as held:
        for _ in range(number):
            sock = socket.create_connection(("127.0.0.1", port))
            sock = context.wrap_socket(sock, suppress_ragged_eofs=False)
            held.register(sock, selectors.EVENT_READ, sock)
        print(f"open {number}", flush=True)
        closed: list[float] = []
        while len(closed) < number:
            for key, _ in held.select():
                assert key.data.recv(1) == b"", "the server says goodbye, and nothing else"
                held.unregister(key.data)
                key.data.close()
                closed.append(time.monotonic())
    print(f"closed {number} {closed[-1] - closed[0]:.3f}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
