"""What the checks of ``ztmtls doctor`` are made of: a result, and the time that is left."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from ztmtls.reasons import Reason

T = TypeVar("T")

_SLICE_SECONDS = 0.2


class Status(StrEnum):
    """How a check ended. `skip`: what it needs is not there, as an earlier check says."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One result: what was found, what to do about it, and the reason code where there is one."""

    name: str
    status: Status
    text: str
    advice: str = ""
    reason: Reason | None = None

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.name,
            "status": str(self.status),
            "reason": self.reason,
            "text": self.text,
            "advice": self.advice or None,
        }


def ok(name: str, text: str) -> Check:
    """All is well."""
    return Check(name, Status.OK, text)


def warn(name: str, text: str, advice: str) -> Check:
    """It works, and something is odd."""
    return Check(name, Status.WARN, text, advice)


def fail(name: str, text: str, advice: str, reason: Reason | None = None) -> Check:
    """It does not work."""
    return Check(name, Status.FAIL, text, advice, reason)


def skip(name: str, text: str) -> Check:
    """It could not be looked at."""
    return Check(name, Status.SKIP, text)


class Overdue(BaseException):
    """Time is up. No `Exception`: code of an application that runs meanwhile must not swallow it."""


class Deadline:
    """The time that all checks have together, in seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left, never less than a moment: what is asked then answers at once or not at all."""
        return max(self._end - time.monotonic(), 0.01)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise `Overdue` in foreign Python code that is still running at the deadline."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def overdue(number: int, frame: object) -> None:
            raise Overdue

        before = signal.signal(signal.SIGALRM, overdue)
        signal.setitimer(signal.ITIMER_REAL, self.remaining)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def bounded(self, blocking: Callable[[], T]) -> T:
        """The result of `blocking`, which can't be interrupted. Raises `TimeoutError` at the deadline."""
        results: list[T] = []
        errors: list[Exception] = []

        def work() -> None:
            try:
                results.append(blocking())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        # In slices: a signal that comes just before a wait begins is heard only when the wait ends.
        while not (results or errors) and time.monotonic() < self._end:
            thread.join(min(self.remaining, _SLICE_SECONDS))
        if errors:
            raise errors[0]
        if not results:
            raise TimeoutError
        return results[0]
