"""The other side of a connection: plain OpenSSL, without a context or a check of ours."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

from cryptography import x509

from ztmtls.svid import X509Bundle, X509Svid

HOST = "127.0.0.1"
DEADLINE = 15.0


@dataclass(frozen=True)
class Answer:
    """What a caller got: the server's line ("" when it was refused) and the server's leaf, if any came."""

    line: str
    leaf: x509.Certificate | None


def plain_context(side: ssl._SSLMethod, svid: X509Svid, trust: X509Bundle | None) -> ssl.SSLContext:
    """Presents `svid`, whatever it is; asks for a path to `trust`, or for nothing."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE if trust is None else ssl.CERT_REQUIRED
    if trust is not None:
        context.load_verify_locations(cadata=trust.der())
    with tempfile.NamedTemporaryFile() as file:
        file.write(svid.pem())
        file.flush()
        context.load_cert_chain(file.name)
    return context


async def call(port: int, svid: X509Svid, trust: X509Bundle | None = None) -> Answer:
    """Connect as a client that presents `svid`, and read to the end.

    Under TLS 1.3 the client's handshake ends before the server has seen its certificate, so only a line
    proves that it was accepted.
    """
    context = plain_context(ssl.PROTOCOL_TLS_CLIENT, svid, trust)
    async with asyncio.timeout(DEADLINE):
        try:
            reader, writer = await asyncio.open_connection(HOST, port, ssl=context)
        except OSError:
            return Answer("", None)
        leaf = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(True))
        try:
            line = await reader.read()
        except OSError:
            line = b""
        finally:
            writer.transport.abort()
    return Answer(line.decode().removesuffix("\n"), leaf)


@contextlib.asynccontextmanager
async def plain_server(svid: X509Svid, trust: X509Bundle) -> AsyncIterator[int]:
    """Listen on a free port with `svid`, for callers with a certificate below `trust`."""
    connections: set[asyncio.StreamWriter] = set()
    context = plain_context(ssl.PROTOCOL_TLS_SERVER, svid, trust)
    server = await asyncio.start_server(lambda _, writer: connections.add(writer), HOST, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in connections:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def tcp_front(path: str) -> AsyncIterator[int]:
    """Listen on TCP and pass every byte to and from the Unix socket at `path`."""
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        tasks.add(asyncio.create_task(copy(reader, inner_writer)))
        tasks.add(asyncio.create_task(copy(inner_reader, writer)))

    server = await asyncio.start_server(connected, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
