"""The compose project, started once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.project import Project, running


@pytest.fixture(scope="session")
def project() -> Iterator[Project]:
    with running() as project:
        yield project
