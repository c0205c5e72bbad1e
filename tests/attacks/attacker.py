"""The attacker: a process of its own, which has what it is given and nothing of ours.

    echo '{"port": 8443, "tls": {"chain": "...", "key": "..."}, "requests": [{"path": "/status"}]}' \
        | python -I attacker.py

It reads one errand as JSON from standard input, makes its requests one after the other on one connection,
and writes what came of the last one as JSON to standard output. Only the standard library: it shares no code
with what it attacks.

port: where to connect, on 127.0.0.1.
tls: null for plain TCP; else the PEM `chain` and `key` to present (neither: no certificate), and `maximum`,
    the highest TLS version to speak ("1.2").
requests: `method`, `path`, `headers` (pairs), `body` (text), `raw` (bytes as text, sent as they are),
    `not_before` (seconds since the epoch, waited for with the connection open), `pause_in_head` (seconds in
    the middle of the headers), `pause` (seconds before the body is sent), and `resume` (on a new connection,
    which offers the TLS session of the one before).
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import sys
import time
from typing import Any

TIMEOUT = 15.0


def main() -> None:
    errand = json.load(sys.stdin)
    json.dump(carry_out(errand), sys.stdout)


def carry_out(errand: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    try:
        context = errand["tls"] and _tls(errand["tls"])
        connection = _connect(errand["port"], context)
        for request in errand["requests"]:
            time.sleep(max(0.0, request.get("not_before", 0) - time.time()))
            if request.get("resume"):
                assert isinstance(connection, ssl.SSLSocket)
                # OpenSSL forgets the session of a connection that is freed without a goodbye.
                left_open = connection
                connection = _connect(errand["port"], context, left_open.session)
            head, body = _bytes(request)
            if "pause_in_head" in request:
                begun, head = head[: len(head) // 2], head[len(head) // 2 :]
                connection.sendall(begun)
                time.sleep(request["pause_in_head"])
            connection.sendall(head)
            time.sleep(request.get("pause", 0))
            connection.sendall(body)
            answer = _read(connection, request.get("method", "GET"))
    except (OSError, http.client.HTTPException) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return answer


def _tls(given: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # an attacker does not care who answers
    if given.get("maximum") == "1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if given.get("chain"):
        descriptor = os.memfd_create("credential")
        os.write(descriptor, (given["chain"] + given["key"]).encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    return context


def _connect(port: int, context: ssl.SSLContext | None, session: Any = None) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    return plain if context is None else context.wrap_socket(plain, session=session)


def _bytes(request: dict[str, Any]) -> tuple[bytes, bytes]:
    if "raw" in request:
        return str(request["raw"]).encode("latin-1"), b""
    body: bytes = request.get("body", "").encode()
    lines = [f"{request.get('method', 'GET')} {request['path']} HTTP/1.1"]
    headers = request.get("headers", [])
    if not any(name.lower() == "host" for name, _ in headers):
        lines.append("Host: 127.0.0.1")
    lines += [f"{name}: {value}" for name, value in headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1"), body


def _read(connection: socket.socket, method: str) -> dict[str, Any]:
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    body = response.read().decode(errors="replace")
    return {"status": response.status, "headers": dict(response.getheaders()), "body": body}


if __name__ == "__main__":
    main()
