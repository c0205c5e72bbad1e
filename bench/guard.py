"""What must not become worse: ratios of one run, with room for what a busy machine does to them.

Never times: they are the machine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """Where in the results a ratio is, and what it may be."""

    place: tuple[str, ...]
    least: float = 0.0
    most: float = float("inf")

    def crossed(self, results: Mapping[str, Any]) -> str | None:
        """What is wrong; None when the ratio keeps within, or was not measured."""
        if self.place[0] not in results:
            return None
        found: Any = results
        for key in self.place:
            found = found[key]
        if self.least <= found <= self.most:
            return None
        bound = f"at least {self.least:g}" if found < self.least else f"at most {self.most:g}"
        return f"{' / '.join(self.place)}: {found:g}, and it must be {bound}"


LIMITS = (
    # Beside what people write by hand, with httpx, in the chain.
    Limit(("chain", "ratio", "ztmtls/(ssl, httpx)", "throughput"), least=1.0),
    Limit(("chain", "ratio", "ztmtls/(ssl, httpx)", "cpu"), most=1.0),
    Limit(("chain", "ratio", "ztmtls/(plain, httpx)", "throughput"), least=0.9),
    # Beside the least that TLS costs in Python, on the same client without httpx's objects.
    Limit(("chain", "ratio", "ztmtls/(ssl, aiohttp)", "cpu"), most=4.0),
    Limit(("chain", "ratio", "ztmtls/(ssl, httpx)", "memory"), most=1.25),
    # As rules become ten thousand times more: what is not in the processor's cache takes its time, 2.4 times
    # on a quiet machine. Looking at each rule, it was thousands.
    Limit(("decisions", "one of many callers", "ratio"), most=8.0),
    Limit(("decisions", "one of many paths", "ratio"), most=8.0),
    Limit(("kept", "ratio", "ztmtls/ssl, httpx", "cpu"), most=1.2),
)


def crossed(results: Mapping[str, Any]) -> list[str]:
    """Which limits are crossed, a line each."""
    return [fault for limit in LIMITS if (fault := limit.crossed(results)) is not None]
