"""A service of the chain: ``python -m bench.hop``, told by its environment what to be.

``BENCH_KIND`` is how it talks to the others: ``plain`` (HTTP), ``ssl`` (TLS as people write it by hand, with
fixed certificates and nobody's identity looked at) or ``ztmtls``; the former two with httpx, as people write
it, or with aiohttp itself, which ztmtls has under httpx's API (``ssl, aiohttp``). Of three, ``frontend`` is
asked by people, over HTTP in each kind, and asks ``orders``, which asks ``payments``. The application is the
same in each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from fastapi import FastAPI
from pydantic import BaseModel

from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.client import DEFAULT_LIMITS, DEFAULT_TIMEOUT, AsyncClient
from ztmtls.server import serve
from ztmtls.source import X509Source

from . import by_hand

DOMAIN = "bench.example"
HOPS = ("frontend", "orders", "payments")
NEXT = {"frontend": "orders", "orders": "payments"}
CALLERS = {callee: caller for caller, callee in NEXT.items()}


def identity(name: str) -> str:
    """The SPIFFE ID of a hop."""
    return f"spiffe://{DOMAIN}/{name}"


class Order(BaseModel):
    """What is ordered."""

    item: str
    amount: int


Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def application(ask: Ask | None) -> FastAPI:
    """Passes an order on by `ask`; with none, it is the last, and answers."""
    app = FastAPI(openapi_url=None)

    @app.post("/orders")
    async def order(order: Order) -> dict[str, Any]:
        if ask is None:
            return {"paid": True, "item": order.item, "amount": order.amount}
        return {"passed_on": True, **await ask(order.model_dump())}

    return app


@contextlib.asynccontextmanager
async def _asking(kind: str, name: str, port: int, source: X509Source | None) -> AsyncIterator[Ask | None]:
    if name not in NEXT:
        yield None
        return
    url = f"{'http' if kind.startswith('plain') else 'https'}://127.0.0.1:{port}"
    verify: ssl.SSLContext | bool = True
    if kind.startswith("ssl"):
        verify = by_hand.context(Path(os.environ["BENCH_TLS"]), name, ssl.Purpose.SERVER_AUTH)
    if kind.endswith("aiohttp"):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=verify)) as session:

            async def ask_by_aiohttp(order: dict[str, Any]) -> dict[str, Any]:
                async with session.post(f"{url}/orders", json=order, raise_for_status=True) as answer:
                    found: dict[str, Any] = await answer.json()
                    return found

            yield ask_by_aiohttp
        return
    client: httpx.AsyncClient
    if source is not None:
        client = AsyncClient(source, peer=identity(NEXT[name]), base_url=url)
    else:
        client = httpx.AsyncClient(
            verify=verify, base_url=url, timeout=DEFAULT_TIMEOUT, limits=DEFAULT_LIMITS, trust_env=False
        )
    async with client:

        async def ask(order: dict[str, Any]) -> dict[str, Any]:
            answer = await client.post("/orders", json=order)
            found: dict[str, Any] = answer.raise_for_status().json()
            return found

        yield ask


async def main() -> None:
    kind, name = os.environ["BENCH_KIND"], os.environ["BENCH_NAME"]
    port, following = int(os.environ["BENCH_PORT"]), int(os.environ.get("BENCH_NEXT", "0"))
    async with contextlib.AsyncExitStack() as stack:
        source = None
        if kind == "ztmtls":
            source = await stack.enter_async_context(X509Source())
            await source.ready(30)
        app = application(await stack.enter_async_context(_asking(kind, name, following, source)))
        if source is None or name == "frontend":
            tls = None
            if kind.startswith("ssl") and name != "frontend":
                tls = by_hand.context(Path(os.environ["BENCH_TLS"]), name, ssl.Purpose.CLIENT_AUTH)
            await by_hand.serve(app, port, tls)
            return
        rule = {
            "name": "pay",
            "callers": [identity(CALLERS[name])],
            "methods": ["POST"],
            "paths": ["/orders"],
        }
        policy = Policy.parse({"version": 1, "rules": [rule]})
        with open(os.devnull, "w") as nowhere:
            await serve(
                app,
                source=source,
                policy=policy,
                host="127.0.0.1",
                port=port,
                audit=AuditLog(name, nowhere),
                http="httptools",
            )


if __name__ == "__main__":
    import uvloop

    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        uvloop.run(main())
