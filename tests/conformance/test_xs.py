"""XS: which SVID we present, and whose SVIDs we trust."""

from __future__ import annotations

from dataclasses import replace

from tests.mtls.conftest import until
from ztmtls.reasons import Reason
from ztmtls.svid import X509Bundle, spiffe_id_of
from ztmtls.testing import CertificateAuthority

from .clauses import BOTH
from .conftest import DOMAIN, OURS, PEER, OurSide, agent, conformance, our_side
from .peers import call


@conformance("XS-1")
async def test_presents_what_the_agent_delivered(ours: OurSide) -> None:
    answer = await ours.ask()

    assert answer.leaf == ours.workload.svid.leaf
    assert answer.leaf is not None
    assert str(spiffe_id_of(answer.leaf)) == OURS


@conformance("XS-2")
async def test_presents_the_whole_chain() -> None:
    async with agent(CertificateAuthority(DOMAIN, upstream=True)) as workload, our_side(workload) as ours:
        assert len(workload.svid.chain) == 2
        (root,) = ours.ca.bundle.authorities
        assert workload.svid.leaf.issuer != root.subject

        # Plain OpenSSL that knows the root only: it accepts us by the intermediate that we send.
        answer = await ours.ask()

        assert answer.leaf == workload.svid.leaf
        assert answer.line == PEER
        stranger = CertificateAuthority(DOMAIN).bundle
        assert (await call(ours.port, ours.ca.issue(PEER), stranger)).leaf is None


@conformance("XS-3")
async def test_new_connections_use_the_rotated_svid(ours: OurSide) -> None:
    first = await ours.served()

    second, third = await ours.rotated(), await ours.rotated()

    assert len({first, second, third}) == 3
    assert ours.in_force == [first, second, third]


@conformance("XS-4")
async def test_every_authority_of_the_bundle_is_trusted(ours: OurSide) -> None:
    old = ours.ca.active
    ours.ca.prepare()
    new = ours.ca.activate()
    await until(lambda: len(ours.source.context.bundles[ours.ca.trust_domain].authorities) == 2)

    for role in BOTH:
        for authority in (old, new):
            assert await ours.verdict(role, ours.ca.issue(PEER, authority=authority)) == PEER


@conformance("XS-5")
async def test_removed_authority_is_no_longer_trusted(ours: OurSide) -> None:
    old = ours.ca.active
    ours.ca.prepare()
    new = ours.ca.activate()
    await ours.rotated()
    of_old, of_new = (ours.ca.issue(PEER, authority=authority) for authority in (old, new))
    for role in BOTH:
        assert await ours.verdict(role, of_old) == PEER

    ours.ca.retire(old)
    await ours.rotated()  # the barrier: later than the smaller bundle

    for role in BOTH:
        assert await ours.verdict(role, of_new) == PEER
        assert await ours.verdict(role, of_old) is Reason.UNTRUSTED_AUTHORITY


@conformance("XS-5")
async def test_intermediate_does_not_keep_its_removed_root_alive(ours: OurSide) -> None:
    # Only the intermediate stands in the bundle: its own anchor vouches for nothing more.
    root, middle = ours.ca.active, ours.ca.subordinate()
    of_middle, of_root = ours.ca.issue(PEER, authority=middle), ours.ca.issue(PEER, authority=root)
    for role in BOTH:
        assert await ours.verdict(role, of_root) == PEER

    own = ours.ca.issue(OURS, authority=middle)
    bundle = X509Bundle(ours.ca.trust_domain, (middle.certificate,))
    ours.workload.push(replace(own, chain=own.chain[:1]), bundle=bundle)
    await until(lambda: ours.source.context.svid.serial == own.serial)

    # The peer's side trusts the root still and could not verify our short chain: ask as a server only.
    assert await ours.verdict("server", of_root) is Reason.UNTRUSTED_AUTHORITY
    assert (await call(ours.port, of_middle)).line == PEER
