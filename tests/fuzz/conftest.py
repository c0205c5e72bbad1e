"""How long the fuzz tests run: in CI the same examples each time, by hand (`make fuzz`) ever new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# A deadline for one example would measure the machine, and the first one pays for imports and keys.
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile(
    "ci", derandomize=True, database=None, max_examples=250, deadline=None, suppress_health_check=_QUIET
)
settings.register_profile(
    "long",
    max_examples=2000,
    deadline=None,
    suppress_health_check=_QUIET,
    print_blob=True,
    database=DirectoryBasedExampleDatabase(Path("build/hypothesis")),
)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(config.getoption("--hypothesis-profile") or "ci")
