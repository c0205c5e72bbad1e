"""Ctrl-C and its relatives, for commands that have something to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.console import Console


@asynccontextmanager
async def stop_signals(hurry: Callable[[], None], console: Console) -> AsyncIterator[asyncio.Event]:
    """The first SIGINT, SIGTERM or SIGHUP sets the event; a second one hurries."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if event.is_set():
            console.print("Hurrying: what still runs is killed")
            hurry()
        event.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
