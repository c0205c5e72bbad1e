"""XV: which peers are accepted, by our server and by our client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509

from ztmtls.reasons import Reason
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority

from .clauses import BOTH
from .conftest import DOMAIN, PEER, OurSide, conformance

HOUR = timedelta(hours=1)
SIGNATURE = "digital_signature"

Issue = Callable[[CertificateAuthority], X509Svid]


def shaped(**shape: Any) -> Issue:
    """Issues an SVID for the peer that differs from a good one in this."""
    return lambda ca: ca.issue(PEER, **shape)


def valid(start: timedelta, end: timedelta) -> Issue:
    """Issues an SVID with this validity, counted from now."""
    return lambda ca: ca.issue(PEER, not_before=datetime.now(UTC) + start, not_after=datetime.now(UTC) + end)


ACCEPTED: dict[str, Issue] = {
    "XV-1 plain": shaped(),
    "XV-2 below an intermediate": lambda ca: ca.issue(PEER, authority=ca.subordinate()),
    "XV-3 one DNS name": shaped(dns_names=["peer.zt.example"]),
    "XV-3 many DNS names": shaped(dns_names=[f"peer-{n}.zt.example" for n in range(32)]),
    "XV-4 empty subject": shaped(subject=x509.Name([])),
}

REFUSED: dict[str, tuple[Reason, Issue]] = {
    "XV-5 other authority": (Reason.UNTRUSTED_AUTHORITY, lambda ca: CertificateAuthority(DOMAIN).issue(PEER)),
    "XV-6 since an hour": (Reason.EXPIRED, valid(-2 * HOUR, -HOUR)),
    "XV-7 in an hour": (Reason.NOT_YET_VALID, valid(HOUR, 2 * HOUR)),
    "XV-8 CA": (Reason.LEAF_IS_CA, shaped(is_ca=True)),
    "XV-9 keyCertSign": (
        Reason.LEAF_CAN_SIGN_CERTIFICATES,
        shaped(key_usage={SIGNATURE, "key_cert_sign"}),
    ),
    "XV-10 cRLSign": (Reason.LEAF_CAN_SIGN_CRLS, shaped(key_usage={SIGNATURE, "crl_sign"})),
    "XV-11 two SPIFFE IDs": (
        Reason.MULTIPLE_URI_SANS,
        shaped(uris=[PEER, "spiffe://zt.example/second"]),
    ),
    "XV-11 a SPIFFE ID and one that is too long": (
        Reason.MULTIPLE_URI_SANS,
        shaped(uris=[PEER, "spiffe://zt.example/" + "a" * 2048]),
    ),
    "XV-11 a web address and a SPIFFE ID": (
        Reason.MULTIPLE_URI_SANS,
        shaped(uris=["https://zt.example/", PEER]),
    ),
    "XV-12 DNS name only": (Reason.NO_URI_SAN, shaped(uris=[], dns_names=["peer.zt.example"])),
    "XV-12 no name": (Reason.NO_URI_SAN, shaped(uris=[])),
    "XV-13 https": (Reason.INVALID_SPIFFE_ID, shaped(uris=["https://zt.example/peer"])),
    "XV-14 no path": (Reason.ROOT_PATH_ID, shaped(uris=["spiffe://zt.example"])),
    "XV-15 no bundle": (
        Reason.UNKNOWN_TRUST_DOMAIN,
        lambda ca: ca.issue("spiffe://other.example/peer"),
    ),
}


def by_role(cases: Iterable[str]) -> list[Any]:
    """Each case on both sides, marked with the clause that its name begins with."""
    return [
        pytest.param(role, name, marks=conformance(name.split()[0], role), id=f"{name}, {role}")
        for name in cases
        for role in BOTH
    ]


@pytest.mark.parametrize(("role", "case"), by_role(ACCEPTED))
async def test_valid_peer_is_accepted(ours: OurSide, role: str, case: str) -> None:
    assert await ours.verdict(role, ACCEPTED[case](ours.ca)) == PEER


@pytest.mark.parametrize(("role", "case"), by_role(REFUSED))
async def test_invalid_peer_is_refused(ours: OurSide, role: str, case: str) -> None:
    reason, issue = REFUSED[case]
    assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER

    assert await ours.verdict(role, issue(ours.ca)) is reason
