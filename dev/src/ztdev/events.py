"""What the stack tells while it works: steps with their time, and notices. The CLI prints them; tests may
collect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Step:
    """One step of starting or stopping. `seconds` counts from its beginning."""

    name: str
    phase: Literal["begin", "done", "failed"]
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened by itself: a service died, leftovers were found."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


Event = Step | Notice
Report = Callable[[Event], None]


class Steps:
    """Reports steps and keeps their times."""

    def __init__(self, report: Report | None = None) -> None:
        self._report = report
        self.timings: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[StepDetail]:
        """Report the beginning and the end of a step around the body."""
        began = time.monotonic()
        detail = StepDetail()
        self.tell(Step(name, "begin"))
        try:
            yield detail
        except BaseException:
            self.tell(Step(name, "failed", time.monotonic() - began))
            raise
        self.timings[name] = time.monotonic() - began
        self.tell(Step(name, "done", self.timings[name], detail.text))

    def notice(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        self.tell(Notice(text, level))

    def tell(self, event: Event) -> None:
        if self._report is not None:
            self._report(event)


@dataclass(slots=True)
class StepDetail:
    """What the body of a step adds to its last line."""

    text: str = ""
