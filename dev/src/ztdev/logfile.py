"""A log file that is rotated by size, written by the supervisor from the output of the process that it
watches."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_BYTES = 8 * 1024 * 1024
BACKUPS = 4
TAIL_LINES = 40

#: A line longer than this is cut in two: no output of a process may grow the supervisor without bound.
MAX_LINE = 256 * 1024


def log_line(log: str, event: str, **facts: Any) -> str:
    """A line of ours, like those of the services: what happened, and the facts of it, as JSON."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": moment, "log": log, "event": event, **facts})


class LogFile:
    """Whole lines into `<name>.log`; when it is full, `<name>.log.1` … `.4` keep the older ones.

    A new `LogFile` starts a new file, so that `lines()` gives this run only. A full disk loses lines
    (`dropped` counts them) but never stops the process that writes them.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, backups: int = BACKUPS) -> None:
        self.path = path
        self.dropped = 0
        self._max_bytes = max_bytes
        self._backups = backups
        self._rotations = 0
        self._pending = b""
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() and path.stat().st_size:
            self._shift()
        self._descriptor = self._open()
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Output of the process as it comes: complete lines are written, the rest waits for its end."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._write(line)
        while len(self._pending) > MAX_LINE:
            self._write(self._pending[:MAX_LINE])
            self._pending = self._pending[MAX_LINE:]

    def end_of_output(self) -> None:
        """The process has closed its output: a last line without an end is a line too."""
        if self._pending:
            self._write(self._pending)
            self._pending = b""

    def close(self) -> None:
        if self._descriptor >= 0:
            self.end_of_output()
            os.close(self._descriptor)
            self._descriptor = -1

    def tail(self, count: int = 15) -> list[str]:
        """The last lines of the process, for a message that says why it did not come up."""
        return list(self._tail)[-count:]

    def lines(self) -> Iterator[str]:
        """Every line of this run that is still kept, oldest first."""
        kept = min(self._rotations, self._backups)
        for path in [*(self._backup(number) for number in range(kept, 0, -1)), self.path]:
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                continue
            yield from text.split("\n")[:-1]

    def _write(self, line: bytes) -> None:
        self._tail.append(line.decode("utf-8", errors="replace"))
        data = line + b"\n"
        try:
            if self._size and self._size + len(data) > self._max_bytes:
                os.close(self._descriptor)
                self._descriptor = -1
                self._shift()
                self._rotations += 1
            if self._descriptor < 0:
                self._descriptor, self._size = self._open(), 0
            self._size += os.write(self._descriptor, data)
        except OSError:
            self.dropped += 1

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _backup(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _shift(self) -> None:
        for number in range(self._backups - 1, 0, -1):
            if (older := self._backup(number)).exists():
                older.replace(self._backup(number + 1))
        self.path.replace(self._backup(1))
