"""The server process: one application behind ztmtls, behind hand-written TLS and in the clear, on one loop.

What it measures about itself (CPU time, how long its event loop stood still) is asked of the plain port.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from pathlib import Path

from ztmtls.asgi import Receive, Scope, Send
from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.server import serve
from ztmtls.source import X509Source

from . import by_hand

BODY = b'{"paid": true, "amount": 2450, "currency": "EUR"}'


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 200 with a small JSON body to whatever is asked."""
    if scope["type"] != "http":
        return
    message = await receive()
    while message.get("more_body"):
        message = await receive()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


class Stalls:
    """The longest time the event loop did not run anything else, in seconds, since it was last asked."""

    _TICK = 0.001

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._TICK
            await asyncio.sleep(self._TICK)
            self.longest = max(self.longest, loop.time() - due)

    def take(self) -> float:
        longest, self.longest = self.longest, 0.0
        return longest


async def main() -> None:
    ports = json.loads(os.environ["BENCH_PORTS"])
    tls = Path(os.environ["BENCH_TLS"])
    stalls = Stalls()
    fixed = by_hand.context(tls, "server", ssl.Purpose.CLIENT_AUTH)

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/measures":
            report = json.dumps(
                {
                    "cpu": time.process_time(),
                    "stall": stalls.take(),
                    "generation": source.status().generation,
                    "authorities": source.status().authorities,
                }
            ).encode()
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"content-length", str(len(report)).encode())],
                }
            )
            await send({"type": "http.response.body", "body": report})
            return
        await application(scope, receive, send)

    policy = Policy.parse(
        {
            "version": 1,
            "rules": [
                {
                    "name": "bench",
                    "callers": [os.environ["BENCH_CALLER"], os.environ["BENCH_FRIEND"]],
                    "methods": ["GET", "POST"],
                    "paths": ["/", "/payments"],
                }
            ],
        }
    )
    async with X509Source() as source:
        await source.ready(30)
        with open(os.devnull, "w") as nowhere:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stalls.watch())
                tasks.create_task(by_hand.serve(plain, ports["plain"]))
                tasks.create_task(by_hand.serve(application, ports["ssl"], fixed))
                await serve(
                    application,
                    source=source,
                    policy=policy,
                    host="127.0.0.1",
                    port=ports["ztmtls"],
                    audit=AuditLog("bench", nowhere),
                    http="httptools",
                )
                os._exit(0)  # told to stop: the others have nothing to finish


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
