"""Mutual TLS over plain asyncio streams: lines in, lines out.

`server_context` and `client_context` go wherever asyncio takes an `ssl.SSLContext`. They verify the peer in
the handshake. What comes after it is the program's own: both sides here check the connection again before
each request, and the client makes a new one when its identity has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime

from options import HOST, call_again_async, ending, options

from ztmtls import Connection, Refusal, X509Source, client_context, connection_of, exact, server_context
from ztmtls.audit import AuditLog


async def serve(port: int, allow: str) -> None:
    """Answer each line of a connection, for as long as its peer is acceptable."""
    async with X509Source() as source:
        await source.ready(30)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = connection_of(writer.get_extra_info("ssl_object"))
            try:
                while await reader.readline():
                    connection.recheck(source.context, datetime.now(UTC))
                    writer.write(f"hello, {connection.peer.id} {connection.peer.serial}\n".encode())
                    await writer.drain()
            except Refusal as refusal:
                print(f"no longer served: {refusal}", flush=True)
            except (OSError, ValueError) as error:  # hung up, or a line without an end
                print(f"connection ended: {error}", flush=True)
            finally:
                writer.close()

        context = server_context(source, authorizer=exact(allow), audit=AuditLog("server"))
        server = await asyncio.start_server(answer, HOST, port, ssl=context, ssl_handshake_timeout=10)
        print(f"serving on {HOST}:{port}", flush=True)
        await server.serve_forever()


class Caller:
    """A client that keeps one connection open while both identities on it are good."""

    def __init__(self, source: X509Source, port: int, peer: str) -> None:
        self._source = source
        self._port = port
        self._context = client_context(source, exact(peer))
        self._open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self) -> str:
        """Send one line and return the answer. Nothing is sent to a server that is not `peer`."""
        if self._open is None or not self._current(self._connection(self._open[1])):
            self.close()
            self._open = await asyncio.open_connection(HOST, self._port, ssl=self._context)
        reader, writer = self._open
        try:
            writer.write(b"hello\n")
            await writer.drain()
            answer = await reader.readline()
            if not answer.endswith(b"\n"):
                raise ConnectionResetError("the server closed the connection")
        except BaseException:
            self.close()
            raise
        peer = self._connection(writer).peer
        return f"{answer.decode().strip()} from {peer.id} {peer.serial}"

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _current(self, connection: Connection) -> bool:
        with contextlib.suppress(Refusal):  # a new handshake says why, if it is still so
            snapshot = self._source.context
            connection.recheck(snapshot, datetime.now(UTC))
            return connection.generation == snapshot.generation
        return False

    @staticmethod
    def _connection(writer: asyncio.StreamWriter) -> Connection:
        return connection_of(writer.get_extra_info("ssl_object"))


async def call(port: int, peer: str, every: float | None) -> None:
    """Call once, or again and again."""
    async with X509Source() as source:
        await source.ready(30)
        caller = Caller(source, port, peer)
        await call_again_async(every, caller.call)
        caller.close()


if __name__ == "__main__":
    given = options(__doc__, ["server", "client"])
    with ending():
        if given.role == "server":
            asyncio.run(serve(given.port, given.allow))
        else:
            asyncio.run(call(given.port, given.peer, given.every))
