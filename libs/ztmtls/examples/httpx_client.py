"""An httpx client over mutual TLS: `ztmtls.client.Client`, which is an `httpx.Client`.

`httpx.Client(verify=client_context(...))` would work, too, but keep pooled connections in use after a
rotation, without a check. `ztmtls.client` retires them. `AsyncClient` is the same for asyncio.
"""

from __future__ import annotations

import httpx
from options import HOST, call_again, ending, options

from ztmtls import Refusal, X509Source
from ztmtls.client import Client, hop


def hello(client: Client) -> str:
    """One request. What httpx raises for a refused identity has a reason; other failures have none."""
    try:
        response = client.get("/hello")
    except httpx.TransportError as error:
        if isinstance(error, Refusal):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error
    if response.is_error:
        raise OSError(f"status {response.status_code}: {response.text}")
    server = hop(response).peer
    return f"{response.text} from {server.id} {server.serial}"


if __name__ == "__main__":
    given = options(__doc__, ["client"])
    with ending(), X509Source() as source:
        source.wait(30)
        with Client(source, peer=given.peer, base_url=f"https://{HOST}:{given.port}") as towards:
            call_again(given.every, lambda: hello(towards))
