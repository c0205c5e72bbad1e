"""A Starlette application, or any other ASGI application, on `ztmtls.server.serve`.

The policy is asked before the application is; connections are watched over and closed when their peer is no
longer acceptable. The peer is in the ASGI scope: `ztmtls.identity.request_identity` reads it.
"""

from __future__ import annotations

from options import HOST, options
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ztmtls import Policy, X509Source
from ztmtls.audit import AuditLog
from ztmtls.identity import request_identity
from ztmtls.server import run, serve


async def hello(request: Request) -> PlainTextResponse:
    """A handler: its caller is verified, and a rule lets it come here."""
    peer = request_identity(request.scope).connection.peer
    return PlainTextResponse(f"hello, {peer.id} {peer.serial}")


async def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    policy = Policy.parse(
        {
            "version": 1,
            "rules": [
                {"name": "hello", "callers": [given.allow], "methods": ["GET"], "paths": ["/hello"]},
            ],
        }
    )
    async with X509Source() as source:
        await source.ready(30)
        await serve(
            Starlette(routes=[Route("/hello", hello)]),
            source=source,
            policy=policy,
            host=HOST,
            port=given.port,
            audit=AuditLog("server"),
            on_serving=lambda: print(f"serving on {HOST}:{given.port}", flush=True),
        )


if __name__ == "__main__":
    given = options(__doc__, ["server"])
    run(main)
