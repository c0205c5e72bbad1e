"""A line of a container's log, like those of the services."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any


def say(log: str, event: str, **facts: Any) -> None:
    """Write one line of JSON to standard output."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    print(json.dumps({"time": moment, "log": log, "event": event, **facts}), flush=True)
