"""An aiohttp server over mutual TLS.

The context verifies the peer and checks who may call, in the handshake. The middleware checks the connection
again before each request, and gives the peer to the handlers. Rules by method and path, limits, probes and
the closing of idle connections are what `ztmtls.server.serve` adds for ASGI applications.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from aiohttp import web
from aiohttp.typedefs import Handler
from options import HOST, ending, options

from ztmtls import Refusal, VerifiedPeer, X509Source, connection_of, exact, server_context
from ztmtls.audit import AuditLog

PEER = web.RequestKey("peer", VerifiedPeer)


async def hello(request: web.Request) -> web.Response:
    """A handler: its caller is verified."""
    return web.Response(text=f"hello, {request[PEER].id} {request[PEER].serial}")


def application(source: X509Source) -> web.Application:
    """The application, behind the check of each request."""

    @web.middleware
    async def verified(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            transport = request.transport
            connection = connection_of(transport and transport.get_extra_info("ssl_object"))
            connection.recheck(source.context, datetime.now(UTC))
        except Refusal as refusal:
            refused = web.json_response({"reason": refusal.reason, "detail": refusal.detail}, status=401)
            refused.force_close()
            return refused
        request[PEER] = connection.peer
        return await handler(request)

    app = web.Application(middlewares=[verified])
    app.router.add_get("/hello", hello)
    return app


async def serve(port: int, allow: str) -> None:
    """Serve until the task is cancelled."""
    async with X509Source() as source:
        await source.ready(30)
        runner = web.AppRunner(application(source), access_log=None)
        await runner.setup()
        try:
            context = server_context(source, authorizer=exact(allow), audit=AuditLog("server"))
            await web.TCPSite(runner, HOST, port, ssl_context=context).start()
            print(f"serving on {HOST}:{port}", flush=True)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


if __name__ == "__main__":
    given = options(__doc__, ["server"])
    with ending():
        asyncio.run(serve(given.port, given.allow))
