"""Mutual TLS over blocking sockets, in a program without an event loop.

The source runs on a thread of its own (plain ``with``). The contexts go wherever an `ssl.SSLContext` is
taken. The client makes a connection for each request here, so that each one is verified by its handshake.
"""

from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime

from options import HOST, call_again, ending, options

from ztmtls import Refusal, X509Source, client_context, connection_of, exact, server_context
from ztmtls.audit import AuditLog


def serve(port: int, allow: str) -> None:
    """Serve each connection on a thread."""
    with X509Source() as source, socket.create_server((HOST, port)) as listener:
        source.wait(30)
        context = server_context(source, authorizer=exact(allow), audit=AuditLog("server"))
        print(f"serving on {HOST}:{port}", flush=True)
        while True:
            raw, _ = listener.accept()
            # The handshake belongs on the thread, too: a slow caller must not keep the others waiting.
            threading.Thread(target=answer, args=(raw, context, source), daemon=True).start()


def answer(raw: socket.socket, context: ssl.SSLContext, source: X509Source) -> None:
    """Answer each line of a connection, for as long as its peer is acceptable."""
    raw.settimeout(60)
    try:
        with raw, context.wrap_socket(raw, server_side=True) as tls, tls.makefile("rb") as lines:
            connection = connection_of(tls)
            while lines.readline(1024):
                connection.recheck(source.context, datetime.now(UTC))
                tls.sendall(f"hello, {connection.peer.id} {connection.peer.serial}\n".encode())
    except Refusal as refusal:
        print(f"no longer served: {refusal}", flush=True)
    except OSError as error:
        print(f"connection ended: {error}", flush=True)


def call(context: ssl.SSLContext, port: int) -> str:
    """Send one line and return the answer. Nothing is sent to a server that is not the peer."""
    with (
        socket.create_connection((HOST, port), timeout=10) as raw,
        context.wrap_socket(raw) as tls,
        tls.makefile("rb") as lines,
    ):
        peer = connection_of(tls).peer
        tls.sendall(b"hello\n")
        said = lines.readline(1024)
        if not said.endswith(b"\n"):
            raise ConnectionResetError("the server closed the connection")
        return f"{said.decode().strip()} from {peer.id} {peer.serial}"


if __name__ == "__main__":
    given = options(__doc__, ["server", "client"])
    with ending():
        if given.role == "server":
            serve(given.port, given.allow)
        else:
            with X509Source() as ours:
                ours.wait(30)
                towards = client_context(ours, exact(given.peer))
                call_again(given.every, lambda: call(towards, given.port))
