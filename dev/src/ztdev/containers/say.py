"""What a container of ours has to say: on its standard output, where the engine takes it."""

from __future__ import annotations

from typing import Any

from ztdev.logfile import log_line


def say(log: str, event: str, **facts: Any) -> None:
    """Write one line, as `log_line` makes it."""
    print(log_line(log, event, **facts), flush=True)
