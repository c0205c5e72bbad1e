"""Log lines as a person reads them: the services write JSON, people read sentences."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def parse_line(line: str) -> dict[str, Any] | None:
    """The JSON object of a log line, or None when it is plain text (a traceback, a program's own message)."""
    if not line.startswith("{"):
        return None
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def is_audit(data: dict[str, Any]) -> bool:
    return data.get("log") == "audit"


def readable(line: str) -> str:
    """One log line for people. Plain text passes unchanged; control characters do not reach the terminal."""
    data = parse_line(line)
    if data is None:
        return _printable(line)
    moment = str(data.get("time", ""))[11:23]
    if is_audit(data):
        words = [moment, "audit", str(data.get("decision", "")), str(data.get("event", ""))]
        words += [str(data[name]) for name in ("reason", "method", "path", "status") if data.get(name)]
        if data.get("peer_id"):
            words.append(f"peer {data['peer_id']}")
        if data.get("rule"):
            words.append(f"rule {data['rule']}")
        if data.get("detail"):
            words.append(f"({data['detail']})")
        return _printable(" ".join(words))
    if data.get("log") == "identity":
        words = [moment, "identity", str(data.get("event", "")), str(data.get("decision", ""))]
        words += [str(data[name]) for name in ("workload", "id", "detail") if data.get(name)]
        words += [f"{name} {data[name]}" for name in ("serial", "not_after") if data.get(name)]
        return _printable(" ".join(word for word in words if word))
    if data.get("log") == "rotation":
        words = [moment, "rotation", str(data.get("service", "")), str(data.get("event", ""))]
        words += [str(data[name]) for name in ("step", "outcome", "user", "detail") if data.get(name)]
        if data.get("version"):
            words.append(f"(version {str(data['version'])[:8]})")
        return _printable(" ".join(word for word in words if word))
    text = f"{moment} {data.get('level', '')!s:7} {data.get('logger', '')}: {data.get('message', '')}"
    if data.get("exception"):
        text += "\n" + str(data["exception"])
    return "\n".join(_printable(part) for part in text.split("\n"))


def _printable(text: str) -> str:
    return "".join(
        character if character.isprintable() or character == "\t" else f"\\x{ord(character):02x}"
        for character in text
    )


class Tail:
    """A log file that grows and is rotated away now and then. It is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._pending = b""

    def read(self) -> list[str]:
        """The lines that have come since the last time, also across one rotation."""
        data = self._file.read()
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(self._file.fileno()).st_ino != self._path.stat().st_ino:
                data += self._file.read()
                self._file.close()
                self._file = self._path.open("rb")
                data += self._file.read()
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in lines]
