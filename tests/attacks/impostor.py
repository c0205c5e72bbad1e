"""An attacker that is a server: answers where payments should be, as payments would.

    python -I impostor.py

It reads the PEM `chain` and `key` to present as one line of JSON from standard input, writes its port on
127.0.0.1 as one line, and answers each charge with a payment that never was, until standard input ends.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Impostor(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        payment = asked | {
            "id": str(uuid.uuid4()),
            "status": "charged",
            "refunded": 0,
            "created_at": "2026-01-01T00:00:00Z",
        }
        self._answer(201, {"payment": payment, "seen_by_callee": {}, "database": {}})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    given = json.loads(sys.stdin.readline())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    descriptor = os.memfd_create("credential")
    os.write(descriptor, (given["chain"] + given["key"]).encode())
    context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    # Anybody may call; the certificate that a caller shows is not looked at.
    server = ThreadingHTTPServer(("127.0.0.1", 0), Impostor)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
