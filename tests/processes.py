"""Programs that tests start with an environment of their own, and what the tests' own process has open."""

from __future__ import annotations

import contextlib
import gc
import os


def environment(**variables: str) -> dict[str, str]:
    """`variables` and the search path, and nothing else of ours but what measures coverage."""
    measured = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return {"PATH": os.environ["PATH"], **measured, **variables}


def open_files() -> set[tuple[str, str]]:
    """The descriptors of this process, each with what it is of.

    What earlier tests left to the garbage collector is closed first: it would be while a test runs, and a
    mere count of descriptors would go down.
    """
    gc.collect()
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that reads the directory
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found
