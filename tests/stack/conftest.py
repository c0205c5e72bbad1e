"""The whole stack, started once for the session, on free ports and with data of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ztdev.stack import BackgroundStack
from ztdev.testing import shared_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundStack]:
    """Every service with its identity, database and secret. Its coroutines are called through `stack.run`."""
    with shared_stack(lambda: tmp_path_factory.mktemp("stack")) as stack:
        yield stack
