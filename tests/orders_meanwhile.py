"""People order while something else happens, and it is told what became of each order."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ztdev.shop import NotPlaced, Visitor


def an_order_is_paid(url: str) -> bool:
    """Whether somebody who orders on the page at `url` now has paid in the end."""
    try:
        with Visitor(url) as visitor:
            return bool(visitor.order()["order"]["status"] == "paid")
    except NotPlaced:
        return False


class OrdersMeanwhile:
    """One order after the other on the page at `url`, in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._order, name="orders")

    def _order(self) -> None:
        with Visitor(self._url) as visitor:
            while not self._stop.is_set():
                try:
                    self.outcomes[visitor.order()["order"]["status"]] += 1
                except Exception as error:
                    self.outcomes[f"{type(error).__name__}: {error}"] += 1
                self._stop.wait(0.1)

    @property
    def paid(self) -> int:
        return self.outcomes["paid"]

    @property
    def failed(self) -> dict[str, int]:
        """Everything else, by what it was."""
        return {outcome: count for outcome, count in self.outcomes.items() if outcome != "paid"}

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """From the beginning of the ``with`` block to its end."""
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join(30)
