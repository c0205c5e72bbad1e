"""XF: peers of other trust domains."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.mtls.conftest import until
from ztmtls.reasons import Reason
from ztmtls.testing import CertificateAuthority

from .clauses import BOTH
from .conftest import OURS, PEER, OurSide, agent, conformance, our_side

FRIEND = "spiffe://friend.example/peer"


@pytest.fixture
def friend() -> CertificateAuthority:
    return CertificateAuthority("friend.example")


@pytest.fixture
async def ours(ca: CertificateAuthority, friend: CertificateAuthority) -> AsyncIterator[OurSide]:
    async with agent(ca, federates_with=[friend]) as workload, our_side(workload) as ours:
        yield ours


def on_both_sides(clause: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "role", [pytest.param(role, marks=conformance(clause, role)) for role in BOTH]
    )


@on_both_sides("XF-1")
async def test_workload_of_a_federated_domain(ours: OurSide, friend: CertificateAuthority, role: str) -> None:
    assert await ours.verdict(role, friend.issue(FRIEND)) == FRIEND
    assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER


@on_both_sides("XF-2")
async def test_authority_vouches_for_its_own_domain_only(
    ours: OurSide, friend: CertificateAuthority, role: str
) -> None:
    assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER
    assert await ours.verdict(role, friend.issue(FRIEND)) == FRIEND

    assert await ours.verdict(role, ours.ca.issue(FRIEND)) is Reason.UNTRUSTED_AUTHORITY
    assert await ours.verdict(role, friend.issue(PEER)) is Reason.UNTRUSTED_AUTHORITY


@on_both_sides("XF-3")
async def test_domain_that_an_update_leaves_out(
    ours: OurSide, friend: CertificateAuthority, role: str
) -> None:
    theirs = friend.issue(FRIEND)
    assert await ours.verdict(role, theirs) == FRIEND

    ours.workload.set_federation()
    await ours.rotated()  # the barrier: later than the update without the domain

    assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER
    # Its authorities are in no bundle now, so it fails inside TLS already.
    assert await ours.verdict(role, theirs) is Reason.UNTRUSTED_AUTHORITY
    ours.workload.set_federation(friend)
    await until(lambda: friend.trust_domain in ours.source.context.bundles)
    assert await ours.verdict(role, theirs) == FRIEND


@on_both_sides("XF-3")
async def test_empty_bundle_trusts_nobody_and_spoils_nothing(
    ours: OurSide, friend: CertificateAuthority, role: str
) -> None:
    theirs, b = friend.issue(FRIEND), ours.ca.issue(OURS)
    assert await ours.verdict(role, theirs) == FRIEND

    ours.workload.push(b, federated={str(friend.trust_domain.id): b""})
    await ours.served_until(b.serial)

    assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER
    assert await ours.verdict(role, theirs) is Reason.UNTRUSTED_AUTHORITY
