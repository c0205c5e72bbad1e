"""Whether the memory of a process grows, or only settles."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence

# What allocators and caches do before they settle is no leak.
ALLOWED_MIB, ALLOWED_PART = 4.0, 0.10


def resident(pid: int) -> float:
    """MiB of memory that are resident (proc_pid_statm(5))."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / (1 << 20)


def grown_and_allowed(memory: Sequence[float]) -> tuple[float, float]:
    """By how much it grew steadily from the first sample to the last, and by how much it may; in MiB."""
    slope = statistics.linear_regression(range(len(memory)), memory).slope
    return slope * (len(memory) - 1), ALLOWED_MIB + ALLOWED_PART * memory[0]
