"""A steady load of requests, and what became of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from ztmtls.client import AsyncClient, hop


class Load:
    """What a load has seen so far: outcomes, and the serial numbers that each side presented."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.caller_serials: set[str] = set()
        self.server_serials: set[str] = set()

    @property
    def served(self) -> int:
        """Requests that were answered with 200."""
        return self.outcomes["200"]

    @property
    def failed(self) -> dict[str, int]:
        """Everything else, by status code or by exception."""
        return {outcome: count for outcome, count in self.outcomes.items() if outcome != "200"}

    async def one(self, client: AsyncClient, method: str) -> None:
        """Send one request and note what comes of it."""
        try:
            response = await client.request(method, "/thing")
        except Exception as error:
            self.outcomes[f"{method} {type(error).__name__}: {error}"] += 1
            return
        self.outcomes[str(response.status_code)] += 1
        if response.status_code == 200:
            self.caller_serials.add(hop(response).own.serial)
            self.server_serials.add(hop(response).peer.serial)


@contextlib.asynccontextmanager
async def load_on(client: AsyncClient, workers: int = 4, pause: float = 0.02) -> AsyncIterator[Load]:
    """Keep `workers` busy with GET and POST in turn, `pause` seconds apart, until the block ends."""
    load = Load()
    stop = asyncio.Event()

    async def work(number: int) -> None:
        count = number
        while not stop.is_set():
            await load.one(client, ("GET", "POST")[count % 2])
            count += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)

    async with asyncio.TaskGroup() as group:
        for number in range(workers):
            group.create_task(work(number))
        try:
            yield load
        finally:
            stop.set()
