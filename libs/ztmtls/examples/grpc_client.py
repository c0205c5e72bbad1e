"""A gRPC client over mutual TLS: `ztmtls.grpc.channel`, an ordinary channel whose TLS is ours.

gRPC for Python can't check a server's SPIFFE ID by itself. The channel does it in the handshake, before
anything is sent. A refused server is ``UNAVAILABLE`` to gRPC; the reason is logged.
"""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from options import HOST, call_again_async, ending, options

from ztmtls import X509Source
from ztmtls.grpc import channel


async def call(port: int, peer: str, every: float | None) -> None:
    """Call once, or again and again."""
    async with X509Source() as source:
        await source.ready(30)
        async with channel(source, f"{HOST}:{port}", peer=peer) as towards:
            # With a .proto file: `GreeterStub(towards).Hello` of the generated code.
            method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = towards.unary_unary(
                "/greeter.Greeter/Hello"
            )

            async def hello() -> str:
                try:
                    said: bytes = await method(b"", timeout=10)
                except grpc.aio.AioRpcError as error:
                    raise OSError(f"{error.code().name}: {error.details()}") from error
                return f"{said.decode()} from {peer}"

            await call_again_async(every, hello)


if __name__ == "__main__":
    given = options(__doc__, ["client"])
    with ending():
        asyncio.run(call(given.port, given.peer, given.every))
