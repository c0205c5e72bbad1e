"""One SPIRE for the whole run; each test starts without entries."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mtls.conftest import until
from ztmtls.source import SourceState, X509Source

from .spire import BINARIES, Spire


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Spire]:
    """A SPIRE server and agent of their own."""
    if not (BINARIES / ".built").exists():
        pytest.fail("SPIRE is not built: run `make spire`", pytrace=False)
    with tempfile.TemporaryDirectory(prefix="spire-") as folder:
        spire = Spire(Path(folder), **options)
        try:
            yield spire
        finally:
            spire.close()


@pytest.fixture(scope="session")
def spire_processes() -> Iterator[Spire]:
    """SPIRE server and agent, running."""
    with running() as spire:
        asyncio.run(spire.start())
        yield spire


@pytest.fixture
async def spire(spire_processes: Spire) -> Spire:
    """SPIRE with no entries, which the agent knows."""
    for entry in await spire_processes.entries():
        await spire_processes.unregister(entry)
    async with X509Source(spire_processes.endpoint) as nobody:
        await until(lambda: nobody.state is SourceState.DENIED, timeout=20)
    return spire_processes


@contextlib.asynccontextmanager
async def source_of(spire: Spire, spiffe_id: str | None = None) -> AsyncIterator[X509Source]:
    """A source that has got its identity from the agent."""
    async with X509Source(spire.endpoint, expected_id=spiffe_id) as source:
        await source.ready(15)
        yield source


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what SPIRE said when a test failed."""
    outcome: Any = yield
    report = outcome.get_result()
    spire = getattr(item, "funcargs", {}).get("spire_processes")
    if report.failed and spire is not None:
        for name in ("server", "agent"):
            report.sections.append((f"spire-{name}'s log", spire.log(name)))
