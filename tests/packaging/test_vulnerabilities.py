"""`make vulnerabilities`: asked of a service that we script, since the real one is on the internet."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

#: As OSV answers (https://google.github.io/osv.dev/post-v1-query/), for one distribution.
FOUND = {
    "vulns": [
        {
            "id": "PYSEC-2026-1",
            "modified": "2026-01-02T00:00:00Z",
            "summary": "made up",
            "affected": [
                {
                    "package": {"name": "cryptography", "ecosystem": "PyPI"},
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9999"}]}],
                }
            ],
        }
    ]
}


@contextmanager
def osv(answers: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """A service that knows of `answers`, by distribution, and the names that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            asked.append(name)
            body = json.dumps(answers.get(name, {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        server.server_close()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--silent", "vulnerabilities", f"ARGS=--osv-url {url} --timeout 5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_every_locked_distribution_is_asked_about_and_one_that_is_vulnerable_fails() -> None:
    with osv({}) as (url, asked):
        done = audit(url)
    assert done.returncode == 0, done.stderr
    assert {"cryptography", "grpcio", "fastapi", "sqlalchemy", "psycopg", "boto3"} <= set(asked)

    with osv({"cryptography": FOUND}) as (url, _):
        done = audit(url)
    assert done.returncode != 0
    assert "PYSEC-2026-1" in done.stdout
    assert "cryptography" in done.stdout


def test_no_answer_is_no_clean_bill() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = audit(f"http://127.0.0.1:{port}/v1/query")
    assert done.returncode != 0
