"""An aiohttp client over mutual TLS.

aiohttp asks nobody before it uses a pooled connection again, so this one makes a connection for each
request (``force_close``), and each is verified by its handshake. `ztmtls.client.AsyncClient` runs on aiohttp,
too, and keeps a pool for each generation: use it where a handshake for each request costs too much.
"""

from __future__ import annotations

import asyncio

import aiohttp
from options import HOST, call_again_async, ending, options

from ztmtls import X509Source, client_context, exact


async def call(port: int, peer: str, every: float | None) -> None:
    """Call once, or again and again."""
    async with X509Source() as source:
        await source.ready(30)
        connector = aiohttp.TCPConnector(ssl=client_context(source, exact(peer)), force_close=True)
        # trust_env stays False: no proxy and no .netrc comes from the environment.
        async with aiohttp.ClientSession(f"https://{HOST}:{port}", connector=connector) as session:

            async def hello() -> str:
                try:
                    async with session.get(
                        "/hello", allow_redirects=False, raise_for_status=True
                    ) as response:
                        return f"{await response.text()} from {peer}"
                except aiohttp.ClientError as error:
                    raise OSError(str(error)) from error

            await call_again_async(every, hello)


if __name__ == "__main__":
    given = options(__doc__, ["client"])
    with ending():
        asyncio.run(call(given.port, given.peer, given.every))
