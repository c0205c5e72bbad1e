"""Programs that tests start with an environment of their own."""

from __future__ import annotations

import os


def environment(**variables: str) -> dict[str, str]:
    """`variables` and the search path, and nothing else of ours but what measures coverage."""
    measured = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return {"PATH": os.environ["PATH"], **measured, **variables}
