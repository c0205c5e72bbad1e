"""From start to stop: waiting for what is late, and work that goes on beside the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from .reasons import Reason, Refusal

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 2.0


class StartupTimeout(Refusal):
    """What the service needs was not there in time. Reason: `dependency_unavailable`."""


async def wait_for(check: Callable[[], Awaitable[str | None]], timeout: float | None) -> None:
    """Return when `check` finds nothing wrong. Each new fault is one line in the log.

    Raises `StartupTimeout` with the last fault after `timeout` seconds; None waits for ever.
    """
    said, pause = None, FIRST_PAUSE_SECONDS
    try:
        async with asyncio.timeout(timeout):
            while (fault := await check()) is not None:
                if fault != said:
                    logger.warning("waiting: %s", fault)
                said = fault
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
    except TimeoutError:
        raise StartupTimeout(Reason.DEPENDENCY_UNAVAILABLE, f"after {timeout:g} s: {said}") from None


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """Let `work` run as long as the block does."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
