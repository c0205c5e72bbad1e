"""How the commands speak: exit statuses, colours, times as a person reads them, JSON for machines."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, TextIO

from ztmtls.reasons import printable


class Exit(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    FINDINGS = 1
    USAGE = 2
    INTERRUPTED = 130


EXIT_STATUSES = "exit status: 0 fine; 1 findings, or refused; 2 wrong use; 130 interrupted"


class CommandError(Exception):
    """The command can't do what it was asked. Says what is wrong, where, and what to do about it."""

    def __init__(self, message: str, status: Exit = Exit.FINDINGS) -> None:
        super().__init__(message)
        self.status = status


class UsageError(CommandError):
    """The command line is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.USAGE)


def command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A new command with the help that each has: what it does, examples, exit statuses."""
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 78),
        epilog=f"examples:\n{examples}\n{EXIT_STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class Style:
    """Colours, on a terminal only, and never when ``NO_COLOR`` is set (https://no-color.org)."""

    def __init__(self, stream: TextIO) -> None:
        dull = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._on = stream.isatty() and not dull

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._on else text

    def good(self, text: str) -> str:
        """Green."""
        return self._paint("32", text)

    def doubtful(self, text: str) -> str:
        """Yellow."""
        return self._paint("33", text)

    def bad(self, text: str) -> str:
        """Bold red."""
        return self._paint("1;31", text)

    def strong(self, text: str) -> str:
        """Bold."""
        return self._paint("1", text)


def write(text: str = "") -> None:
    """One line to standard output, at once: others may be reading along."""
    print(text, flush=True)


def write_json(document: Any, *, indent: int | None = 2) -> None:
    """One JSON document to standard output; on one line when `indent` is None."""
    write(json.dumps(document, indent=indent, default=str))


def complain(message: str) -> None:
    """One line to standard error, in the name of the program."""
    print(f"{Style(sys.stderr).bad('ztmtls:')} {message}", file=sys.stderr, flush=True)


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> list[str]:
    """`rows` as lines with aligned columns."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)] if cells else []
    return [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def moment(when: datetime) -> str:
    """A time to the second, in UTC: ``2026-05-01 12:00:00 UTC``."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def expiry(when: datetime, now: datetime) -> str:
    """The end of a validity and how far off it is: ``2026-05-01 12:00:00 UTC, in 43 s``."""
    seconds = (when - now).total_seconds()
    return f"{moment(when)}, " + (
        f"in {duration(seconds)}" if seconds > 0 else f"expired {duration(-seconds)} ago"
    )


def duration(seconds: float) -> str:
    """A length of time in its two largest units: ``43 s``, ``2 min 5 s``, ``3 h``, ``12 d 4 h``."""
    whole = int(seconds)
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, whole = divmod(whole, size)
        parts.append(f"{count} {unit}" if count else "")
    first = next((i for i, part in enumerate(parts) if part), len(parts) - 1)
    return " ".join(part for part in parts[first : first + 2] if part) or "0 s"


def shown(text: str, limit: int = 512) -> str:
    """Text from elsewhere, safe for a terminal: one line, control characters escaped."""
    return text if text.isprintable() and len(text) <= limit else printable(text, limit)
