"""pytest fixtures, registered as a plugin by installing ztmtls: nothing to import.

They need no asynchronous pytest plugin: `workload_api` is handed out unstarted, for the test to enter in
its own event loop, whichever runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ztmtls.source import StaticSource

    from .ca import CertificateAuthority
    from .workload_api import WorkloadApi


@pytest.fixture
def spiffe_ca() -> CertificateAuthority:
    """A new `CertificateAuthority` for the trust domain ``example.test``."""
    from .ca import CertificateAuthority

    return CertificateAuthority("example.test")


@pytest.fixture
def workload_api() -> WorkloadApi:
    """A new `WorkloadApi` in a short private directory, to be entered by the test.

    An example:

        async def test_orders(workload_api, spiffe_ca):
            async with workload_api as api:
                orders = await api.add_workload("orders", "spiffe://example.test/orders", ca=spiffe_ca)
                orders.allow(pid=os.getpid())
    """
    from .workload_api import WorkloadApi

    return WorkloadApi()


@pytest.fixture
def static_source(spiffe_ca: CertificateAuthority) -> Callable[[str], StaticSource]:
    """Makes a source that holds an SVID of `spiffe_ca`: ``static_source("spiffe://example.test/me")``."""
    from ztmtls.source import StaticSource

    def make(spiffe_id: str) -> StaticSource:
        return StaticSource(spiffe_ca.context(spiffe_ca.issue(spiffe_id)))

    return make
