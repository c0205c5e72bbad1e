"""The two libraries behind one face: what a workload on each of them has, accepts and presents."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.peers import HOST
from ztmtls import client_context, exact, one_of, server_context, trust_domain
from ztmtls.authz import Authorizer
from ztmtls.ids import InvalidSpiffeId, SpiffeId
from ztmtls.reasons import Refusal
from ztmtls.source import NoIdentity, X509Source

PROGRAM = Path(__file__).with_name("other_side.py")
LONG = 30.0


@dataclass(frozen=True)
class State:
    """A source: closed for good, or what it offers. `failures` counts what it found wrong, if it tells."""

    closed: bool
    serial: int | None
    authorities: dict[str, int] = field(default_factory=dict)
    failures: int = 0


class Workload(ABC):
    """A source on one library, and its server if there is one."""

    port: int

    @abstractmethod
    async def state(self) -> State:
        """The source at this moment."""

    async def until(self, condition: Callable[[State], bool], timeout: float = LONG) -> State:
        """Ask until `condition` holds, or the time is over; returns the last state either way."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not condition(found := await self.state()) and loop.time() < end:
            await asyncio.sleep(0.05)
        return found


class Side(ABC):
    """One of the two libraries. Endpoints are Workload API addresses; authorizers are written ``kind=value``:
    ``none``, ``any``, ``id=…``, ``domain=…``."""

    @abstractmethod
    def workload(
        self, endpoint: str, authorizer: str | None = None
    ) -> contextlib.AbstractAsyncContextManager[Workload]:
        """A workload with its source, and a server with `authorizer` if one is given.

        Raises `CannotStart` when the source does not come to be.
        """

    @abstractmethod
    async def parses(self, texts: list[str]) -> list[bool]:
        """Which of `texts` the library takes as SPIFFE IDs."""

    @abstractmethod
    async def asyncio_client(self, endpoint: str, port: int, peer: str) -> bool:
        """Whether the library's context makes a connection by `asyncio.open_connection`."""


class CannotStart(Exception):
    """The library's source can't be made."""


class Theirs(Side):
    """`spiffe` and `spiffe-tls`, in a process and an environment of their own."""

    PINNED = ("spiffe", "spiffe-tls", "pyopenssl", "cryptography", "grpcio")

    def __init__(self, python: str) -> None:
        self._python = python

    @classmethod
    def install(cls, uv: str) -> Theirs:
        """Make the environment that other_side.py names, apart from ours."""
        subprocess.run([uv, "sync", "--quiet", "--script", PROGRAM], check=True)
        found = subprocess.run(
            [uv, "python", "find", "--script", PROGRAM], check=True, capture_output=True, text=True
        )
        return cls(found.stdout.strip())

    def versions(self) -> dict[str, str]:
        """Versions of what is installed there."""
        program = (
            "import json, platform; from importlib.metadata import version;"
            "print(json.dumps({'Python': platform.python_version()} | {n: version(n) for n in "
            f"{self.PINNED}}}))"
        )
        done = subprocess.run([self._python, "-c", program], check=True, capture_output=True, text=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found

    @contextlib.asynccontextmanager
    async def _process(self, *arguments: str) -> AsyncIterator[_TheirWorkload]:
        process = await asyncio.create_subprocess_exec(
            self._python,
            str(PROGRAM),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        )
        try:
            yield _TheirWorkload(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    @contextlib.asynccontextmanager
    async def workload(self, endpoint: str, authorizer: str | None = None) -> AsyncIterator[Workload]:
        command = ("source", endpoint) if authorizer is None else ("serve", endpoint, authorizer)
        async with self._process(*command) as workload:
            first = await workload.answer()
            if "error" in first:
                raise CannotStart(first["error"])
            workload.port = first["port"] or 0
            yield workload

    async def parses(self, texts: list[str]) -> list[bool]:
        async with self._process("parse", json.dumps(texts)) as workload:
            return [(await workload.answer())["accepted"] for _ in texts]

    async def asyncio_client(self, endpoint: str, port: int, peer: str) -> bool:
        async with self._process("asyncio", endpoint, str(port)) as workload:
            return bool((await workload.answer()).get("connected"))


class _TheirWorkload(Workload):
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(2 * LONG):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("other_side.py ended without an answer")
        found: dict[str, Any] = json.loads(line)
        return found

    async def state(self) -> State:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        found = await self.answer()
        serial = None if found["serial"] is None else int(found["serial"], 16)
        return State(found["closed"], serial, found["authorities"])


class Ours(Side):
    """`ztmtls`, in this process."""

    @contextlib.asynccontextmanager
    async def workload(self, endpoint: str, authorizer: str | None = None) -> AsyncIterator[Workload]:
        async with X509Source(endpoint) as source:
            workload = _OurWorkload(source)
            if authorizer is None:
                yield workload
                return
            await source.ready(LONG)
            context = server_context(source, authorizer=_authorizer(authorizer))
            server = await asyncio.start_server(_greet, HOST, 0, ssl=context, ssl_handshake_timeout=5)
            workload.port = server.sockets[0].getsockname()[1]
            try:
                yield workload
            finally:
                server.close()

    async def parses(self, texts: list[str]) -> list[bool]:
        def taken(text: str) -> bool:
            try:
                return bool(SpiffeId.parse(text))
            except InvalidSpiffeId:
                return False

        return [taken(text) for text in texts]

    async def asyncio_client(self, endpoint: str, port: int, peer: str) -> bool:
        async with X509Source(endpoint) as source:
            await source.ready(LONG)
            try:
                _, writer = await asyncio.open_connection(HOST, port, ssl=client_context(source, exact(peer)))
            except (OSError, Refusal) as error:
                print(error, file=sys.stderr)
                return False
            writer.transport.abort()
            return True


class _OurWorkload(Workload):
    def __init__(self, source: X509Source) -> None:
        self._source = source

    async def state(self) -> State:
        status = self._source.status()
        try:
            serial: int | None = self._source.context.svid.leaf.serial_number
        except NoIdentity:
            serial = None
        return State(status.state == "closed", serial, status.authorities, status.failures)


def _authorizer(text: str) -> Authorizer | None:
    kind, _, value = text.partition("=")
    if kind in ("none", "any"):
        return None
    return trust_domain(value) if kind == "domain" else one_of(value)


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.write(b"accepted\n")
        await writer.drain()
        writer.close()
