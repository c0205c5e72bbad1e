"""HX: updates that would make us somebody we are not, or nobody."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority, Workload, with_broken_signature, with_other_key
from ztmtls.testing.workload_api import FETCH_X509_SVID

from .conftest import DOMAIN, OURS, OurSide, conformance

HOUR = timedelta(hours=1)
SIGNATURE = "digital_signature"


def delivering(issue: Callable[[CertificateAuthority], X509Svid]) -> Callable[[Workload], Any]:
    """An update with this SVID and the workload's own bundle."""
    return lambda workload: workload.build_response(issue(workload.ca))


def announced_as_another(workload: Workload) -> Any:
    response = workload.build_response(workload.ca.issue(OURS))
    response.svids[0].spiffe_id = "spiffe://zt.example/another"
    return response


def expired(ca: CertificateAuthority) -> X509Svid:
    now = datetime.now(UTC)
    return ca.issue(OURS, not_before=now - 2 * HOUR, not_after=now - HOUR)


SPOILT: dict[str, Callable[[Workload], Any]] = {
    "HX-1": delivering(lambda ca: with_broken_signature(ca.issue(OURS))),
    "HX-2": delivering(lambda ca: CertificateAuthority(DOMAIN).issue(OURS)),
    "HX-3": delivering(expired),
    "HX-4": delivering(lambda ca: ca.issue(OURS, is_ca=True)),
    "HX-5": delivering(lambda ca: ca.issue(OURS, key_usage={SIGNATURE, "key_cert_sign"})),
    "HX-6": delivering(lambda ca: ca.issue(OURS, uris=[OURS, "spiffe://zt.example/second"])),
    "HX-7": delivering(lambda ca: ca.issue(OURS, uris=["https://zt.example/ours"])),
    "HX-8": delivering(lambda ca: with_other_key(ca.issue(OURS))),
    "HX-9": announced_as_another,
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=conformance(case)) for case in SPOILT])
async def test_spoilt_update_never_comes_into_force(ours: OurSide, case: str) -> None:
    a = await ours.rotated()
    ours.in_force.clear()
    b = ours.ca.issue(OURS)

    ours.workload.push_raw(SPOILT[case](ours.workload))
    assert await ours.served() == a
    ours.workload.push(b)
    seen = await ours.served_until(b.serial)

    assert set(seen) <= {a, b.serial}
    assert ours.in_force == [b.serial]
    assert ours.workload.calls[FETCH_X509_SVID] == 1, "and on the same stream"
