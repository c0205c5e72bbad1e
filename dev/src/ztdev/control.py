"""What other commands ask of the supervisor that runs: one line of JSON each way, over a Unix socket.

The socket is in the stack's private socket directory (0700), so that this user alone can ask. It is for
things that need what only the supervisor has, such as the key of the local AWS's administrator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import NotRunning, StackError

SOCKET = "control.sock"

#: One request is one line of this many bytes at most.
_LIMIT = 65536

Request = Mapping[str, Any]
Handler = Callable[[Request], Awaitable[Any]]


class Control:
    """Answers on the socket. `handlers` are what can be asked, by name; what they return is the answer.

    A `StackError` of a handler is raised again where it was asked.
    """

    def __init__(self, directory: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = directory / SOCKET
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._on_connection, self._path, limit=_LIMIT)

    async def close(self) -> None:
        """Stop; what is still being done for somebody is cancelled."""
        if self._server is not None:
            self._server.close()
            for task in self._answering:
                task.cancel()
            await asyncio.gather(*self._answering, return_exceptions=True)
            self._server = None

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            with contextlib.suppress(ConnectionError, ValueError):  # gone, or a line that is too long
                line = await reader.readline()
                if line:
                    writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                    await writer.drain()
        finally:
            self._answering.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["ask"]]
        except (ValueError, KeyError, TypeError):
            return {"error": "The stack that runs does not know this command: it is of another version."}
        try:
            return {"answer": await handler(request)}
        except StackError as error:
            return {"error": str(error)}


def ask(directory: Path, what: str, *, timeout: float, **arguments: Any) -> Any:
    """Ask the supervisor whose sockets are in `directory`, and wait `timeout` seconds for its answer.

    Raises:
        NotRunning: nobody answers there.
        StackError: what was asked could not be done; the message says why.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(directory / SOCKET))
            connection.sendall(json.dumps({"ask": what, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline()
        except TimeoutError:
            raise StackError(
                f"The stack has not answered within {timeout:.0f} s: see `ztdev logs`."
            ) from None
        except OSError as error:
            raise NotRunning(f"The stack does not answer ({error.strerror}): see `ztdev status`.") from None
    if not line:
        raise NotRunning("The stack has ended meanwhile: see `ztdev status`.")
    answer = json.loads(line)
    if "error" in answer:
        raise StackError(answer["error"])
    return answer["answer"]
