"""A log that is followed while it is written: each line is read and parsed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

Line = dict[str, Any]
Parse = Callable[[str], Iterable[Line]]


class Followed:
    """The lines of the log `path` since this was made, or since its beginning, as `parse` understands them.

    Calling it gives all until now; the number of a line stays the same, also when the log is rotated (the
    file is renamed, and another one begun).
    """

    def __init__(self, path: Path, parse: Parse, *, from_the_beginning: bool = False) -> None:
        self._path, self._parse = path, parse
        self._lines: list[Line] = []
        self._rest = b""
        self._file: BinaryIO | None = None
        if not from_the_beginning and self._opened():
            assert self._file is not None
            self._file.seek(0, os.SEEK_END)

    def __call__(self) -> list[Line]:
        """Every line until now. What is given belongs to this object."""
        while self._opened():
            assert self._file is not None
            rotated = not self._is_at_its_path()
            self._take(self._file.read())  # after looking: what came before the rotation is read to its end
            if not rotated:
                break
            self._file.close()
            self._file = None
        return self._lines

    def _opened(self) -> bool:
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                return False
        return True

    def _is_at_its_path(self) -> bool:
        assert self._file is not None
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:  # renamed, and the next one is not there yet
            return True

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._lines.extend(self._parse(line.decode(errors="replace")))
