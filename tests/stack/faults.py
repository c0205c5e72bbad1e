"""A proxy before the stand-in for AWS that is slow, throttles or hangs up: what networks and AWS do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

Service = Literal["sts", "secretsmanager"]

#: What becomes of a call: the answer to give instead, or None to pass it on.
Fault = Callable[[Service], Awaitable[bytes | None]]


@dataclass
class FaultyAws:
    """Forwards requests to `gate`, except those to services that `trouble` names.

    `calls` holds when (monotonic clock) which action was called, in order.
    """

    port: int
    gate: int = 0
    trouble: dict[Service, Fault] = field(default_factory=dict)
    calls: list[tuple[float, str]] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _serving: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, action: str, since: float = 0.0) -> int:
        return sum(called == action and moment >= since for moment, called in self.calls)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def stop(self) -> None:
        """Afterwards connections are refused, and those that were open are cut."""
        if self._server is not None:
            self._server.close()
            for task in self._serving:
                task.cancel()
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> FaultyAws:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._answer(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            fields = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
            }
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            service: Service = "secretsmanager" if "x-amz-target" in fields else "sts"
            action = fields.get("x-amz-target", "").rpartition(".")[2] or "AssumeRoleWithWebIdentity"
            self.calls.append((time.monotonic(), action))
            fault = self.trouble.get(service)
            answer = await fault(service) if fault is not None else None
            writer.write(answer if answer is not None else await self._forward(head, body))
            await writer.drain()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gate)
        try:
            writer.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
            return await reader.read()
        finally:
            writer.close()


def slow(seconds: float) -> Fault:
    async def fault(_: Service) -> None:
        await asyncio.sleep(seconds)

    return fault


async def throttled(service: Service) -> bytes:
    """As both services say it: STS in XML, Secrets Manager in JSON."""
    if service == "sts":
        kind, text = "text/xml", "<ErrorResponse><Error><Code>Throttling</Code></Error></ErrorResponse>"
    else:
        kind = "application/x-amz-json-1.1"
        text = json.dumps({"__type": "ThrottlingException", "message": "Rate exceeded"})
    return (
        f"HTTP/1.1 400 Bad Request\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n"
        f"Connection: close\r\n\r\n{text}"
    ).encode()


async def broken(_: Service) -> bytes:
    text = "<html>Service Unavailable</html>"
    return (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/html\r\n"
        f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}"
    ).encode()


async def cut(_: Service) -> bytes:
    """The connection ends without an answer."""
    return b""


async def half(_: Service) -> bytes:
    """The connection ends in the middle of an answer."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.1\r\nContent-Length: 500\r\n\r\n{"


async def hanging(_: Service) -> bytes:
    """No answer for as long as anybody may wait: `FaultyAws.stop` cancels it."""
    await asyncio.sleep(3600)
    return b""
