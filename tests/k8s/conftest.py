"""overlays/local, deployed once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.k8s import cluster


@pytest.fixture(scope="session", autouse=True)
def deployed() -> Iterator[None]:
    """Everything is on the cluster and ready; at the end it is taken away again."""
    try:
        cluster.deploy()
        yield
    finally:
        cluster.LOG.parent.mkdir(exist_ok=True)
        cluster.LOG.write_text(cluster.told())
        cluster.remove()


@pytest.fixture(scope="session")
def page(deployed: None) -> Iterator[str]:
    """The address of the page."""
    with cluster.page() as url:
        yield url
