"""A gRPC server over mutual TLS: gRPC's own TLS, and a guard that verifies each RPC's peer.

gRPC itself accepts any certificate under any known authority. `ztmtls.grpc.Guard` verifies the chain as every
other server of ztmtls does, and asks the policy, where a gRPC method is a path under POST.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from options import HOST, ending, options

from ztmtls import Policy, X509Source
from ztmtls.audit import AuditLog
from ztmtls.grpc import Guard, peer, server_credentials


async def hello(request: bytes, context: Any) -> bytes:
    """A handler: its caller is verified, and a rule lets it come here."""
    return f"hello, {peer().id} {peer().serial}".encode()


# With a .proto file, this is what `add_GreeterServicer_to_server` of the generated code does.
GREETER = grpc.method_handlers_generic_handler(
    "greeter.Greeter", {"Hello": grpc.unary_unary_rpc_method_handler(hello)}
)


async def serve(port: int, allow: str) -> None:
    """Serve until the task is cancelled."""
    policy = Policy.parse(
        {
            "version": 1,
            "rules": [
                {
                    "name": "hello",
                    "callers": [allow],
                    "methods": ["POST"],
                    "paths": ["/greeter.Greeter/Hello"],
                },
            ],
        }
    )
    async with X509Source() as source:
        await source.ready(30)
        server = grpc.aio.server(
            interceptors=[Guard(source, policy=policy, audit=AuditLog("server"))],
            # Clients are asked to make a new connection now and then, and so follow rotations.
            options=[("grpc.max_connection_age_ms", 2_000), ("grpc.so_reuseport", 0)],
        )
        server.add_generic_rpc_handlers((GREETER,))
        server.add_secure_port(f"{HOST}:{port}", server_credentials(source))
        await server.start()
        print(f"serving on {HOST}:{port}", flush=True)
        try:
            await server.wait_for_termination()
        finally:
            await server.stop(5)


if __name__ == "__main__":
    given = options(__doc__, ["server"])
    with ending():
        asyncio.run(serve(given.port, given.allow))
