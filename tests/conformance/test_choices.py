"""ADR 7: what we do where the standards leave a choice, in real handshakes."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztmtls.reasons import Reason
from ztmtls.testing import CertificateAuthority
from ztmtls.testing.harness import dial
from ztmtls.tls import reason_of

from .clauses import BOTH
from .conftest import DOMAIN, OURS, PEER, OurSide
from .peers import plain_server

# The purpose that a peer needs: our server meets clients, our client meets servers.
PURPOSE = {"server": ExtendedKeyUsageOID.CLIENT_AUTH, "client": ExtendedKeyUsageOID.SERVER_AUTH}

ACCEPTED: dict[str, dict[str, Any]] = {
    "no basic constraints": {"basic_constraints": None},
    "no extended key usage": {"extended_key_usage": None},
    "more key usages": {"key_usage": {"digital_signature", "key_encipherment", "key_agreement"}},
}

REFUSED: dict[str, tuple[Reason, dict[str, Any]]] = {
    "no key usage": (Reason.LEAF_WITHOUT_DIGITAL_SIGNATURE, {"key_usage": None}),
    "key agreement only": (Reason.LEAF_WITHOUT_DIGITAL_SIGNATURE, {"key_usage": {"key_agreement"}}),
    "2049 bytes": (
        Reason.INVALID_SPIFFE_ID,
        {"uris": ["spiffe://zt.example/" + "p" * (2049 - len("spiffe://zt.example/"))]},
    ),
}


@pytest.mark.parametrize("role", BOTH)
@pytest.mark.parametrize("case", ACCEPTED)
async def test_peer_that_only_differs_is_accepted(ours: OurSide, role: str, case: str) -> None:
    assert await ours.verdict(role, ours.ca.issue(PEER, **ACCEPTED[case])) == PEER


@pytest.mark.parametrize("role", BOTH)
@pytest.mark.parametrize("case", REFUSED)
async def test_peer_that_others_may_accept_is_refused(ours: OurSide, role: str, case: str) -> None:
    reason, shape = REFUSED[case]
    assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER

    assert await ours.verdict(role, ours.ca.issue(PEER, **shape)) is reason


@pytest.mark.parametrize("role", BOTH)
async def test_extended_key_usage_must_allow_the_role_it_is_used_in(ours: OurSide, role: str) -> None:
    (other,) = set(PURPOSE.values()) - {PURPOSE[role]}
    assert await ours.verdict(role, ours.ca.issue(PEER, extended_key_usage=[PURPOSE[role]])) == PEER

    refused = ours.ca.issue(PEER, extended_key_usage=[other])
    assert await ours.verdict(role, refused) is Reason.UNTRUSTED_AUTHORITY


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_host_name_neither_passes_nor_fails_a_server(ours: OurSide, host: str) -> None:
    named = ours.ca.issue(PEER, dns_names=["another.example"])
    async with plain_server(named, ours.ca.bundle) as port:
        assert str(await dial(ours.source, f"{host}:{port}")) == PEER

    stranger = CertificateAuthority(DOMAIN).issue(PEER, dns_names=["localhost", "127.0.0.1"])
    async with plain_server(stranger, ours.ca.bundle) as port:
        with pytest.raises(OSError) as refused:
            await dial(ours.source, f"{host}:{port}")
    assert reason_of(refused.value) is Reason.UNTRUSTED_AUTHORITY


async def test_federated_bundle_adds_no_authority_to_our_own_domain(ours: OurSide) -> None:
    impostor, b = CertificateAuthority(DOMAIN), ours.ca.issue(OURS)
    ours.workload.push(b, federated={f"spiffe://{DOMAIN}": impostor.bundle.der()})
    await ours.served_until(b.serial)

    for role in BOTH:
        assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER
        assert await ours.verdict(role, impostor.issue(PEER)) is Reason.UNTRUSTED_AUTHORITY


async def test_broken_federated_bundle_costs_its_own_domain_only(ours: OurSide) -> None:
    friend, b = CertificateAuthority("friend.example"), ours.ca.issue(OURS)
    ours.workload.push(
        b, federated={"spiffe://friend.example": friend.bundle.der(), "spiffe://broken.example": b"\x30"}
    )
    await ours.served_until(b.serial)

    for role in BOTH:
        assert await ours.verdict(role, ours.ca.issue(PEER)) == PEER
        assert (
            await ours.verdict(role, friend.issue("spiffe://friend.example/a")) == "spiffe://friend.example/a"
        )
    assert "broken.example" in ours.source.status().reason


async def test_two_svids_of_one_domain_must_come_with_the_same_bundle(ours: OurSide) -> None:
    """The last one would win in silence, and our default SVID would verify under it no more."""
    a = await ours.rotated()
    ours.in_force.clear()
    other = CertificateAuthority(DOMAIN)
    c, b = ours.ca.issue(OURS), ours.ca.issue(OURS)
    response = ours.workload.build_response(c, ours.ca.issue(PEER))
    response.svids[1].CopyFrom(
        ours.workload.build_response(other.issue(PEER), bundle=other.bundle.der()).svids[0]
    )

    ours.workload.push_raw(response)
    ours.workload.push(b)

    assert set(await ours.served_until(b.serial)) <= {a, b.serial}
    assert ours.in_force == [b.serial]


@pytest.mark.parametrize("role", BOTH)
async def test_chain_that_is_too_long_is_refused(ours: OurSide, role: str) -> None:
    assert await ours.verdict(role, ours.ca.issue(PEER, authority=ours.ca.subordinate())) == PEER

    too_low = ours.ca.subordinate(issuer=ours.ca.subordinate())
    verdict = await ours.verdict(role, ours.ca.issue(PEER, authority=too_low))

    assert verdict in (Reason.UNTRUSTED_AUTHORITY, Reason.CHAIN_TOO_LONG)
