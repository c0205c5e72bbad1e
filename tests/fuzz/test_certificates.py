"""Certificates of any shape: a value or a `Refusal`, never a peer that OpenSSL or the standard refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import assume, event, given
from hypothesis import strategies as st

from tests.fuzz.models import is_spiffe_id, openssl_accepts, readable_by_openssl, uris_by_openssl
from tests.fuzz.mutations import MUTATIONS, Mutations, der, mutate, mutate_der
from ztmtls.ids import TrustDomain
from ztmtls.reasons import Refusal
from ztmtls.svid import UNDECODABLE, X509Bundle, X509Svid
from ztmtls.testing import CertificateAuthority, new_key
from ztmtls.testing.ca import Authority
from ztmtls.verify import PeerRefused, VerifiedPeer, verify_peer

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
WORKLOAD = "spiffe://zt.example/workload"
OURS, FRIENDS = TrustDomain("zt.example"), TrustDomain("friend.example")


@dataclass
class World:
    """Two trust domains that we know, a stranger, and everyone who may sign."""

    bundles: Mapping[TrustDomain, X509Bundle]
    signers: Mapping[str, Authority]
    key: ec.EllipticCurvePrivateKey
    issue: Callable[..., X509Svid]

    def verify(self, chain: Sequence[x509.Certificate]) -> VerifiedPeer | None:
        """What `verify_peer` says; any error but a refusal is a failure of the test."""
        try:
            return verify_peer(chain, self.bundles, NOON)
        except PeerRefused as refusal:
            assert refusal.detail.isprintable()
            event(str(refusal.reason))
            return None


@pytest.fixture(scope="module")
def world() -> World:
    ours, friends, strangers = (
        CertificateAuthority(name, clock=lambda: NOON)
        for name in ("zt.example", "friend.example", "zt.example")
    )
    signers = {
        "ours": ours.active,
        "below ours": ours.subordinate(),
        "two below ours": ours.subordinate(issuer=ours.subordinate()),
        "a path length of zero": ours.subordinate(
            issuer=ours.subordinate(basic_constraints=x509.BasicConstraints(ca=True, path_length=0))
        ),
        "no CA": ours.subordinate(basic_constraints=None),
        "friends": friends.active,
        "strangers": strangers.active,
    }
    bundles = {OURS: ours.bundle, FRIENDS: friends.bundle}
    return World(bundles, signers, new_key(), ours.issue)


URIS = st.one_of(
    st.lists(
        st.sampled_from(
            [
                WORKLOAD,
                "spiffe://zt.example",
                "spiffe://friend.example/x",
                "spiffe://other.example/x",
                "",
                "https://zt.example/",
                "spiffe://zt.example/a/",
                "spiffe://ZT.example/a",
                "spiffe://zt.example/a?b",
                b"spiffe://zt.example/\x00",
                b"spiffe://zt.example/\xff",
                b"\x80",
                b"spiffe://zt.example/a\n",
            ]
        ),
        max_size=2,
    ),
    st.lists(
        st.text(st.characters(codec="ascii"), max_size=20).map("spiffe://zt.example/{}".format), max_size=2
    ),
)
USAGES = st.one_of(
    st.none(),
    st.sets(
        st.sampled_from(
            [
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "key_agreement",
                "key_cert_sign",
                "crl_sign",
            ]
        ),
        min_size=1,
    ),
)
BASICS = st.sampled_from(
    [None, x509.BasicConstraints(ca=True, path_length=None), x509.BasicConstraints(ca=True, path_length=0)]
)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
EXTRA = st.one_of(
    st.just([]),
    st.lists(
        st.sampled_from(
            [
                x509.Extension(UNKNOWN.oid, False, UNKNOWN),
                x509.Extension(UNKNOWN.oid, True, UNKNOWN),
                x509.Extension(x509.InhibitAnyPolicy.oid, True, x509.InhibitAnyPolicy(0)),
                x509.Extension(x509.OCSPNoCheck.oid, False, x509.OCSPNoCheck()),
            ]
        ),
        max_size=1,
    ),
)
SUBJECTS = st.sampled_from(
    [None, x509.Name([]), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "spiffe://zt.example/other")])]
)


SIGNERS = st.sampled_from(
    ["ours", "below ours", "two below ours", "a path length of zero", "no CA", "friends", "strangers"]
)


def mostly(usual: Any, odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Something odd now and then: where all is odd at once, the first check ends it."""
    return st.integers(0, 3).flatmap(lambda dice: odd if dice == 3 else st.just(usual))


@given(
    signer=mostly("ours", SIGNERS),
    uris=mostly([WORKLOAD], URIS),
    usage=mostly({"digital_signature"}, USAGES),
    basics=mostly(x509.BasicConstraints(ca=False, path_length=None), BASICS),
    eku=st.sampled_from([None, [ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.CODE_SIGNING]]),
    extra=EXTRA,
    begins=mostly(-1, st.sampled_from([-1000000, -3, -2, 0, 1, 1000000])),
    lasts=mostly(5, st.sampled_from([1, 2, 3, 1000])),
    subject=SUBJECTS,
)
def test_a_leaf_of_any_shape_is_accepted_only_by_the_rules(
    world: World,
    signer: str,
    uris: list[str | bytes],
    usage: set[str] | None,
    basics: x509.BasicConstraints | None,
    eku: list[x509.ObjectIdentifier] | None,
    extra: list[Any],
    begins: int,
    lasts: int,
    subject: x509.Name | None,
) -> None:
    begin = NOON + timedelta(minutes=begins)
    end = begin + timedelta(minutes=lasts)
    try:
        svid = world.issue(
            WORKLOAD,
            key=world.key,
            authority=world.signers[signer],
            uris=uris,
            key_usage=usage,
            basic_constraints=basics,
            extended_key_usage=eku,
            extra_extensions=extra,
            not_before=begin,
            not_after=end,
            subject=subject,
        )
    except (ValueError, TypeError):
        assume(False)  # what no one can encode
        raise

    peer = world.verify(svid.chain)

    # X509-SVID 2, 3.1, 4 and 5.2, from what was put into the certificate, not from what was read out of it.
    name = uris[0] if len(uris) == 1 else b""
    name = name.decode("latin-1") if isinstance(name, bytes) else name
    domain = TrustDomain(name.split("/")[2]) if is_spiffe_id(name) and name.count("/") > 2 else None
    allowed = (
        domain in world.bundles
        and usage is not None
        and "digital_signature" in usage
        and not usage & {"key_cert_sign", "crl_sign"}
        and not (basics is not None and basics.ca)
        and begin <= NOON < end
        and openssl_accepts(svid.chain, world.bundles[domain].authorities, NOON)
        and (domain == FRIENDS) == (signer == "friends")
        and signer not in ("strangers", "no CA", "a path length of zero")
    )
    critical = any(each.critical for each in extra)
    if peer is not None:
        event("accepted")
        assert allowed
        assert str(peer.id) == name
        assert peer.valid_until == min(end, world.signers[signer].not_after)
    elif allowed:
        assert critical, "a rightful leaf is refused only for a critical extension that nobody knows"


def names_another_issuer(certificate: x509.Certificate, authorities: Sequence[x509.Certificate]) -> bool:
    """True when the authority key identifier is not that of an authority.

    It helps to find a path and is no part of validating one (RFC 5280 sections 4.2.1.1 and 6.1): OpenSSL
    insists on it, the library that we use does not.
    """
    named = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    keys = [
        extension.value.digest
        for authority in authorities
        for extension in authority.extensions
        if isinstance(extension.value, x509.SubjectKeyIdentifier)
    ]
    return named.key_identifier not in keys or bool(named.authority_cert_issuer)


def check_peer(world: World, certificate: x509.Certificate, rest: Sequence[x509.Certificate]) -> None:
    """If it is accepted, OpenSSL accepts it, too, and reads the same name in it."""
    peer = world.verify([certificate, *rest])
    if peer is None:
        return
    authorities = world.bundles[peer.id.trust_domain].authorities
    if not readable_by_openssl(certificate):
        event("never gets through TLS")  # as a subject that is no text
        return
    event("accepted")
    if not openssl_accepts([certificate, *rest], authorities, NOON):
        assert names_another_issuer(certificate, authorities)
    assert uris_by_openssl(certificate) == [str(peer.id)]
    assert is_spiffe_id(str(peer.id))


@given(MUTATIONS, st.sampled_from([mutate_der, mutate_der, mutate_der, mutate]))
def test_changed_bytes_under_a_good_signature(
    world: World, mutations: Mutations, change: Callable[[bytes, Mutations], bytes]
) -> None:
    """A certificate that only its issuer can make: what it says is changed, then it is signed."""
    good = world.issue(WORKLOAD, key=world.key)
    assert world.verify(good.chain) is not None
    signer = world.signers["ours"]
    body = change(good.leaf.tbs_certificate_bytes, mutations)
    algorithm = der(0x30, bytes.fromhex("06082a8648ce3d040302"))  # ecdsa-with-SHA256, RFC 5758 section 3.2
    signature = signer.key.sign(body, ec.ECDSA(hashes.SHA256()))
    try:
        certificate = x509.load_der_x509_certificate(der(0x30, body, algorithm, der(0x03, b"\0", signature)))
    except UNDECODABLE:
        event("can't be read")
        return
    check_peer(world, certificate, ())


@given(MUTATIONS, st.booleans(), st.sampled_from([mutate, mutate_der]))
def test_changed_bytes_of_a_whole_chain(
    world: World, mutations: Mutations, own_key: bool, change: Callable[[bytes, Mutations], bytes]
) -> None:
    """As it comes from a Workload API or from a peer: the bytes are no longer what was signed."""
    good = world.issue(WORKLOAD, key=world.key, authority=world.signers["below ours"])
    assert world.verify(good.chain) is not None
    chain, key = good.chain_der(), good.key_der()
    try:
        if own_key:
            svid = X509Svid.from_der(chain, change(key, mutations))
        else:
            svid = X509Svid.from_der(change(chain, mutations), key)
    except Refusal as refusal:
        assert refusal.detail.isprintable()
        event(str(refusal.reason))
        return
    check_peer(world, svid.leaf, svid.chain[1:])


@given(MUTATIONS, st.sampled_from([mutate, mutate_der]))
def test_changed_bytes_of_a_bundle(
    world: World, mutations: Mutations, change: Callable[[bytes, Mutations], bytes]
) -> None:
    good = world.bundles[OURS].der() + world.bundles[FRIENDS].der()
    assert len(X509Bundle.from_der(OURS, good).authorities) == 2
    try:
        bundle = X509Bundle.from_der(OURS, change(good, mutations))
    except Refusal as refusal:
        event(str(refusal.reason))
        return
    leaf = world.issue(WORKLOAD, key=world.key).leaf
    try:
        verify_peer([leaf], {OURS: bundle}, NOON)
    except PeerRefused as refusal:
        event(str(refusal.reason))
        return
    event("accepted")
    readable = [each for each in bundle.authorities if readable_by_openssl(each)]
    if readable and not openssl_accepts([leaf], readable, NOON):
        assert names_another_issuer(leaf, readable)


@given(
    st.one_of(st.binary(max_size=80), st.binary(max_size=40).map(lambda data: der(0x30, data))), st.binary()
)
def test_any_bytes_at_all(chain: bytes, key: bytes) -> None:
    for read in (
        lambda: X509Svid.from_der(chain, key),
        lambda: X509Bundle.from_der(OURS, chain),
    ):
        try:
            value = read()
        except Refusal:
            continue
        assert value == X509Bundle(OURS, ()), "only the empty bundle is that easy to make"
        assert not chain


def test_the_second_opinion_is_one(world: World) -> None:
    """What the other tests compare with says yes to the rightful, and no to the others."""
    for signer, expected in (("ours", True), ("below ours", True), ("strangers", False), ("no CA", False)):
        svid = world.issue(WORKLOAD, authority=world.signers[signer])
        assert openssl_accepts(svid.chain, world.bundles[OURS].authorities, NOON) is expected, signer
        assert uris_by_openssl(svid.leaf) == [WORKLOAD]
    assert not openssl_accepts(svid.chain, [], NOON)
