"""`verify_peer`: which certificate chains are acceptable peers, and what is proven about them.

Tags such as XV-8, XF-2 and HX-1 are the names of the cases in the SPIFFE conformance suite.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.unit.resigned import resigned
from ztmtls.ids import TrustDomain
from ztmtls.reasons import Reason
from ztmtls.svid import InvalidSvid, X509Bundle, X509Svid, certificates_from_der, serial_text
from ztmtls.testing import CertificateAuthority, new_key
from ztmtls.testing.ca import Authority
from ztmtls.verify import PeerRefused, VerifiedPeer, verify_peer

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
HOUR, SECOND = timedelta(hours=1), timedelta(seconds=1)
DOMAIN = TrustDomain("zt.example")
WORKLOAD = "spiffe://zt.example/ns/zt-demo/sa/orders"
OTHER = "spiffe://zt.example/ns/zt-demo/sa/payments"
UNKNOWN = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")
DIGITAL_SIGNATURE = "digital_signature"

Bundles = Mapping[TrustDomain, X509Bundle]


@dataclasses.dataclass
class Clock:
    now: datetime = NOON

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example", clock=Clock())


@pytest.fixture(scope="module")
def friend() -> CertificateAuthority:
    return CertificateAuthority("friend.example", clock=Clock())


def bundles(*authorities: CertificateAuthority) -> Bundles:
    return {each.trust_domain: each.bundle for each in authorities}


def bundle(*certificates: x509.Certificate) -> Bundles:
    return {DOMAIN: X509Bundle(DOMAIN, certificates)}


def accepted(svid: X509Svid, trusted: Bundles, now: datetime = NOON) -> VerifiedPeer:
    return verify_peer(svid.chain, trusted, now)


def refused(svid: X509Svid, trusted: Bundles, reason: Reason, now: datetime = NOON) -> PeerRefused:
    with pytest.raises(PeerRefused) as caught:
        verify_peer(svid.chain, trusted, now)
    assert caught.value.reason is reason, caught.value
    assert caught.value.detail.isprintable()
    return caught.value


def extension(value: x509.ExtensionType, critical: bool = False) -> x509.Extension[x509.ExtensionType]:
    return x509.Extension(value.oid, critical, value)


def unknown(critical: bool) -> x509.Extension[x509.ExtensionType]:
    return extension(x509.UnrecognizedExtension(UNKNOWN, b"\x05\x00"), critical)


def certify(
    subject: x509.Name,
    key: Any,
    issuer: Authority | None = None,
    signing_key: Any = None,
    **validity: datetime,
) -> x509.Certificate:
    """A signing certificate for any key: a self-signed one, or one below `issuer`."""
    usage = {name: name in ("key_cert_sign", "crl_sign") for name in (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )}  # fmt: skip
    signer = issuer.key if issuer else signing_key or key
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity.get("not_before", NOON - HOUR))
        .not_valid_after(validity.get("not_after", NOON + 24 * HOUR))
        .add_extension(x509.BasicConstraints(True, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(DOMAIN.id))]), critical=False
        )
        .sign(signer, hashes.SHA256())
    )


def signer(
    ca: CertificateAuthority, certificate: x509.Certificate, key: Any, *intermediates: x509.Certificate
) -> Authority:
    """An authority for ``issue(authority=…)`` that signs with `key` and sends `intermediates` along."""
    return dataclasses.replace(ca.active, certificate=certificate, key=key, intermediates=intermediates)


# -- The rightful peer ----------------------------------------------------------------------------------


def test_rightful_peer_is_described_as_it_is(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD, ttl=HOUR)

    peer = accepted(svid, bundles(ca))

    assert str(peer.id) == WORKLOAD
    assert peer.serial == svid.serial
    assert peer.fingerprint == hashlib.sha256(svid.chain_der()).hexdigest()
    assert peer.not_before == svid.leaf.not_valid_before_utc
    assert peer.not_after == NOON + HOUR
    assert peer.valid_until == NOON + HOUR
    assert peer.authority == serial_text(ca.active.certificate)
    assert peer.chain == svid.chain
    assert peer.summary.as_dict() == {
        "id": WORKLOAD, "serial": svid.serial, "not_after": "2026-05-01T13:00:00Z",
    }  # fmt: skip


ACCEPTED: dict[str, dict[str, Any]] = {
    "XV-4 empty subject": {"subject": x509.Name([])},
    "XV-3 names of other kinds": {"dns_names": ["other.example", "payments"]},
    "subject that names another workload": {
        "subject": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, OTHER)])
    },
    "no basic constraints": {"basic_constraints": None},
    "extended key usage absent": {"extended_key_usage": None},
    "extended key usage for both roles": {
        "extended_key_usage": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    },
    "more key usages": {"key_usage": [DIGITAL_SIGNATURE, "key_encipherment", "key_agreement"]},
    "unknown extension that is not critical": {"extra_extensions": [unknown(critical=False)]},
    "longest ID": {"uris": ["spiffe://zt.example/" + "a" * (2048 - len("spiffe://zt.example/"))]},
    "valid since this second": {"not_before": NOON},
    "one second left": {"not_after": NOON + SECOND},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_acceptable_leaf(ca: CertificateAuthority, case: str) -> None:
    svid = ca.issue(WORKLOAD, **ACCEPTED[case])

    assert str(accepted(svid, bundles(ca)).id) == ACCEPTED[case].get("uris", [WORKLOAD])[0]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(lambda: rsa.generate_private_key(65537, 2048), id="RSA"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP384R1()), id="P-384"),
    ],
)
def test_other_keys_than_p256(ca: CertificateAuthority, key: Callable[[], Any]) -> None:
    leaf_key, root_key, name = key(), key(), ca.active.certificate.subject
    root = certify(name, root_key)

    assert accepted(ca.issue(WORKLOAD, key=leaf_key), bundles(ca))
    assert accepted(ca.issue(WORKLOAD, authority=signer(ca, root, root_key)), bundle(root))
    refused(
        ca.issue(WORKLOAD, authority=signer(ca, root, root_key)),
        bundles(ca),
        Reason.UNTRUSTED_AUTHORITY,
    )


# -- The leaf itself ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Reason, dict[str, Any]]] = {
    "XV-12 no URI": (Reason.NO_URI_SAN, {"uris": [], "dns_names": ["zt.example"]}),
    "XV-12 no name at all": (Reason.NO_URI_SAN, {"uris": []}),
    "ID in the subject only": (
        Reason.NO_URI_SAN,
        {"uris": [], "subject": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, WORKLOAD)])},
    ),
    "ID in a DNS name only": (Reason.NO_URI_SAN, {"uris": [], "dns_names": [WORKLOAD]}),
    "XV-11 two SPIFFE IDs": (Reason.MULTIPLE_URI_SANS, {"uris": [WORKLOAD, OTHER]}),
    "the same ID twice": (Reason.MULTIPLE_URI_SANS, {"uris": [WORKLOAD, WORKLOAD]}),
    "XV-11 a SPIFFE ID and another URI": (
        Reason.MULTIPLE_URI_SANS,
        {"uris": [WORKLOAD, "https://zt.example/"]},
    ),
    "another URI, then a SPIFFE ID": (
        Reason.MULTIPLE_URI_SANS,
        {"uris": ["https://zt.example/", WORKLOAD]},
    ),
    "XV-13 https": (Reason.INVALID_SPIFFE_ID, {"uris": ["https://zt.example/ns/zt-demo/sa/orders"]}),
    "sparfe": (Reason.INVALID_SPIFFE_ID, {"uris": ["sparfe://zt.example/orders"]}),
    "percent-encoded": (Reason.INVALID_SPIFFE_ID, {"uris": ["spiffe://zt.example/%6frders"]}),
    "trailing slash": (Reason.INVALID_SPIFFE_ID, {"uris": [WORKLOAD + "/"]}),
    "empty segment": (Reason.INVALID_SPIFFE_ID, {"uris": ["spiffe://zt.example//orders"]}),
    "dot segments": (Reason.INVALID_SPIFFE_ID, {"uris": ["spiffe://zt.example/x/../orders"]}),
    "port": (Reason.INVALID_SPIFFE_ID, {"uris": ["spiffe://zt.example:443/orders"]}),
    "query": (Reason.INVALID_SPIFFE_ID, {"uris": [WORKLOAD + "?x=1"]}),
    "upper case": (Reason.INVALID_SPIFFE_ID, {"uris": ["spiffe://ZT.example/orders"]}),
    "newline": (Reason.INVALID_SPIFFE_ID, {"uris": [f"{WORKLOAD}\n".encode()]}),
    "NUL": (Reason.INVALID_SPIFFE_ID, {"uris": [f"{WORKLOAD}\0.evil".encode()]}),
    "comma": (Reason.INVALID_SPIFFE_ID, {"uris": [f"{WORKLOAD},URI:{OTHER}"]}),
    "empty URI": (Reason.INVALID_SPIFFE_ID, {"uris": [""]}),
    "too long": (Reason.INVALID_SPIFFE_ID, {"uris": ["spiffe://zt.example/" + "a" * 2048]}),
    "XV-14 no path": (Reason.ROOT_PATH_ID, {"uris": ["spiffe://zt.example"]}),
    "XV-8 CA": (Reason.LEAF_IS_CA, {"is_ca": True}),
    "XV-9 may sign certificates": (
        Reason.LEAF_CAN_SIGN_CERTIFICATES,
        {"key_usage": [DIGITAL_SIGNATURE, "key_cert_sign"]},
    ),
    "XV-10 may sign CRLs": (Reason.LEAF_CAN_SIGN_CRLS, {"key_usage": [DIGITAL_SIGNATURE, "crl_sign"]}),
    "no digital signature": (Reason.LEAF_WITHOUT_DIGITAL_SIGNATURE, {"key_usage": ["key_agreement"]}),
    "no key usage": (Reason.LEAF_WITHOUT_DIGITAL_SIGNATURE, {"key_usage": None}),
    "XV-6 expired an hour ago": (Reason.EXPIRED, {"not_before": NOON - 2 * HOUR, "not_after": NOON - HOUR}),
    "expired a second ago": (Reason.EXPIRED, {"not_before": NOON - HOUR, "not_after": NOON - SECOND}),
    "XV-7 valid in an hour": (
        Reason.NOT_YET_VALID,
        {"not_before": NOON + HOUR, "not_after": NOON + 2 * HOUR},
    ),
    "valid in a second": (Reason.NOT_YET_VALID, {"not_before": NOON + SECOND}),
    "unknown critical extension": (
        Reason.UNTRUSTED_AUTHORITY,
        {"extra_extensions": [unknown(critical=True)]},
    ),
    "key usage that can't be decoded": (
        Reason.MALFORMED_CERTIFICATE,
        {
            "key_usage": None,
            "extra_extensions": [extension(x509.UnrecognizedExtension(x509.KeyUsage.oid, b"\x01\x02"))],
        },
    ),
    "basic constraints that can't be decoded": (
        Reason.MALFORMED_CERTIFICATE,
        {
            "basic_constraints": None,
            "extra_extensions": [
                extension(x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"\x01\x02"))
            ],
        },
    ),
    "name of a kind that can't be decoded": (
        Reason.MALFORMED_CERTIFICATE,
        {
            "uris": [],
            "extra_extensions": [
                extension(
                    x509.UnrecognizedExtension(
                        x509.SubjectAlternativeName.oid,
                        bytes((0x30, len(WORKLOAD) + 4, 0xA3, 0, 0x86, len(WORKLOAD))) + WORKLOAD.encode(),
                    )
                )
            ],
        },
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_leaf_that_breaks_the_profile(ca: CertificateAuthority, case: str) -> None:
    reason, shape = REFUSED[case]
    assert accepted(ca.issue(WORKLOAD), bundles(ca))

    refused(ca.issue(WORKLOAD, **shape), bundles(ca), reason)


def test_no_certificate_at_all(ca: CertificateAuthority) -> None:
    refused(dataclasses.replace(ca.issue(WORKLOAD), chain=()), bundles(ca), Reason.NO_CERTIFICATE)


def test_extension_given_twice_is_malformed(ca: CertificateAuthority) -> None:
    # The subject key identifier (2.5.29.14) made into a second key usage (2.5.29.15).
    der = ca.issue(WORKLOAD).chain_der()
    leaf = x509.load_der_x509_certificate(der.replace(b"\x06\x03\x55\x1d\x0e", b"\x06\x03\x55\x1d\x0f"))

    with pytest.raises(PeerRefused) as caught:
        verify_peer([leaf], bundles(ca), NOON)
    assert caught.value.reason is Reason.MALFORMED_CERTIFICATE


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_hx_1_no_changed_bit_of_a_certificate_is_accepted(ca: CertificateAuthority) -> None:
    leaf, trusted = ca.issue(WORKLOAD).leaf, bundles(ca)
    der = leaf.public_bytes(Encoding.DER)
    surprises: dict[str, int] = {}
    for position in range(len(der) * 8):
        changed = bytearray(der)
        changed[position // 8] ^= 1 << position % 8
        try:
            chain = certificates_from_der(bytes(changed), limit=16)
            verify_peer(chain, trusted, NOON)
        except (PeerRefused, InvalidSvid):
            continue
        except Exception as error:
            surprises[type(error).__name__] = surprises.get(type(error).__name__, 0) + 1
        else:
            # Only the count of unused bits after the signature has more than one accepted spelling.
            assert chain[0].tbs_certificate_bytes == leaf.tbs_certificate_bytes
            assert chain[0].signature == leaf.signature

    assert surprises == {}, "a refusal must be a PeerRefused or an InvalidSvid"


# -- Whose authority ------------------------------------------------------------------------------------


def test_xv_5_authority_of_another_domain_with_the_same_name(ca: CertificateAuthority) -> None:
    impostor = CertificateAuthority("zt.example", clock=ca.clock)
    assert accepted(ca.issue(WORKLOAD), bundles(ca))

    refused(impostor.issue(WORKLOAD), bundles(ca), Reason.UNTRUSTED_AUTHORITY)


def test_authority_with_the_same_subject_and_another_key(ca: CertificateAuthority) -> None:
    key = new_key()
    certificate = certify(ca.active.certificate.subject, key)
    impostor = signer(ca, certificate, key, certificate)

    refused(ca.issue(WORKLOAD, authority=impostor), bundles(ca), Reason.UNTRUSTED_AUTHORITY)


def test_self_signed_leaf(ca: CertificateAuthority) -> None:
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "orders")])
    itself = signer(ca, certify(name, key), key)

    refused(
        ca.issue(WORKLOAD, key=key, subject=name, authority=itself), bundles(ca), Reason.UNTRUSTED_AUTHORITY
    )


def test_xv_15_id_of_another_domain_signed_by_ours(
    ca: CertificateAuthority, friend: CertificateAuthority
) -> None:
    theirs = ca.issue("spiffe://friend.example/orders")

    error = refused(theirs, bundles(ca), Reason.UNKNOWN_TRUST_DOMAIN)
    assert "friend.example" in error.detail
    refused(theirs, bundles(ca, friend), Reason.UNTRUSTED_AUTHORITY)


def test_xf_1_workload_of_a_federated_domain(ca: CertificateAuthority, friend: CertificateAuthority) -> None:
    peer = accepted(friend.issue("spiffe://friend.example/orders"), bundles(ca, friend))

    assert peer.id.trust_domain.name == "friend.example"
    assert peer.authority == serial_text(friend.active.certificate)


def test_xf_2_federated_authority_vouches_for_its_own_domain_only(
    ca: CertificateAuthority, friend: CertificateAuthority
) -> None:
    trusted = bundles(ca, friend)
    assert accepted(ca.issue(WORKLOAD), trusted)
    assert accepted(friend.issue("spiffe://friend.example/orders"), trusted)

    refused(friend.issue(WORKLOAD), trusted, Reason.UNTRUSTED_AUTHORITY)
    refused(ca.issue("spiffe://friend.example/orders"), trusted, Reason.UNTRUSTED_AUTHORITY)


def test_federated_authority_can_not_be_sent_along_as_an_intermediate(
    ca: CertificateAuthority, friend: CertificateAuthority
) -> None:
    svid = friend.issue(WORKLOAD)
    padded = X509Svid(svid.id, (*svid.chain, friend.active.certificate, ca.active.certificate), svid.key)

    refused(padded, bundles(ca, friend), Reason.UNTRUSTED_AUTHORITY)


def test_xf_3_redacted_federated_bundle_trusts_nobody(
    ca: CertificateAuthority, friend: CertificateAuthority
) -> None:
    svid = friend.issue("spiffe://friend.example/orders")
    assert accepted(svid, bundles(ca, friend))

    refused(svid, bundles(ca), Reason.UNKNOWN_TRUST_DOMAIN)


def test_empty_bundle_trusts_nobody(ca: CertificateAuthority) -> None:
    error = refused(ca.issue(WORKLOAD), bundle(), Reason.UNTRUSTED_AUTHORITY)

    assert "no authority" in error.detail
    refused(ca.issue(WORKLOAD), {}, Reason.UNKNOWN_TRUST_DOMAIN)


@pytest.mark.parametrize(
    "domain",
    ["zt.examp1e", "zt.example.evil", "evil.zt.example", "zt-example", "zt.exampl", "ztexample",
     "zt.example.",
     "zt..example", "xzt.example", "xn--zt-example"],
)  # fmt: skip
def test_look_alike_domain(ca: CertificateAuthority, domain: str) -> None:
    refused(ca.issue(f"spiffe://{domain}/ns/zt-demo/sa/orders"), bundles(ca), Reason.UNKNOWN_TRUST_DOMAIN)


# -- Bundles of several authorities ---------------------------------------------------------------------


def test_xs_4_every_authority_of_a_bundle_is_trusted(ca: CertificateAuthority) -> None:
    rotated = CertificateAuthority("zt.example", clock=ca.clock)
    before = rotated.issue(WORKLOAD)
    old = rotated.active
    rotated.prepare()
    rotated.activate()
    after = rotated.issue(WORKLOAD)

    assert accepted(before, bundles(rotated)).authority == serial_text(old.certificate)
    assert accepted(after, bundles(rotated)).authority == serial_text(rotated.active.certificate)


def test_xs_5_removed_authority_is_no_longer_trusted() -> None:
    rotated = CertificateAuthority("zt.example", clock=Clock())
    before = rotated.issue(WORKLOAD)
    rotated.prepare()
    rotated.activate()
    assert accepted(before, bundles(rotated))
    rotated.retire()

    refused(before, bundles(rotated), Reason.UNTRUSTED_AUTHORITY)
    assert accepted(rotated.issue(WORKLOAD), bundles(rotated))


def test_expired_authority_beside_a_good_one_does_no_harm(ca: CertificateAuthority) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old")])
    expired = certify(name, new_key(), not_before=NOON - 9 * HOUR, not_after=NOON - HOUR)

    assert accepted(ca.issue(WORKLOAD), bundle(expired, ca.active.certificate))
    assert accepted(ca.issue(WORKLOAD), bundle(ca.active.certificate, expired))


def test_authority_that_has_expired_vouches_for_nobody(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD, not_after=NOON + timedelta(days=9))
    assert accepted(svid, bundles(ca), ca.active.not_after - SECOND)

    refused(svid, bundles(ca), Reason.UNTRUSTED_AUTHORITY, ca.active.not_after + SECOND)


def test_intermediate_in_the_bundle_is_an_anchor(ca: CertificateAuthority) -> None:
    middle = ca.subordinate()
    svid = ca.issue(WORKLOAD, authority=middle)
    trusted = bundle(middle.certificate)
    alone = X509Svid(svid.id, svid.chain[:1], svid.key)

    for presented in (svid, alone):
        assert accepted(presented, trusted).authority == serial_text(middle.certificate)
    # It vouches for what it signed, not for what its own issuer signed.
    refused(ca.issue(WORKLOAD), trusted, Reason.UNTRUSTED_AUTHORITY)


def test_cross_signed_authority_is_accepted_by_old_and_new_bundles(ca: CertificateAuthority) -> None:
    new = CertificateAuthority("zt.example", clock=ca.clock).active
    cross = certify(new.certificate.subject, new.key, issuer=ca.active)
    svid = ca.issue(WORKLOAD, authority=signer(ca, cross, new.key, cross))
    alone = X509Svid(svid.id, svid.chain[:1], svid.key)

    assert accepted(svid, bundles(ca)).authority == serial_text(ca.active.certificate)
    assert accepted(svid, bundle(new.certificate)).authority == serial_text(new.certificate)
    assert accepted(alone, bundle(new.certificate))
    assert accepted(alone, bundle(cross)).authority == serial_text(cross)
    assert accepted(svid, bundle(ca.active.certificate, cross, new.certificate))
    refused(alone, bundles(ca), Reason.UNTRUSTED_AUTHORITY)


# -- Intermediates --------------------------------------------------------------------------------------


def test_chain_through_intermediates(ca: CertificateAuthority) -> None:
    upper = ca.subordinate(basic_constraints=x509.BasicConstraints(True, 1))
    lower = ca.subordinate(issuer=upper)
    svid = ca.issue(WORKLOAD, authority=lower)
    assert len(svid.chain) == 3

    peer = accepted(svid, bundles(ca))

    assert peer.authority == serial_text(ca.active.certificate)
    assert peer.chain == svid.chain


def test_missing_intermediate(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD, authority=ca.subordinate())
    assert accepted(svid, bundles(ca))

    refused(X509Svid(svid.id, svid.chain[:1], svid.key), bundles(ca), Reason.UNTRUSTED_AUTHORITY)


@pytest.mark.parametrize("extra", ["the root", "a foreign root", "the leaf again"])
def test_certificates_the_path_does_not_need(ca: CertificateAuthority, extra: str) -> None:
    svid = ca.issue(WORKLOAD)
    more = {
        "the root": ca.active.certificate,
        "a foreign root": CertificateAuthority("zt.example", clock=ca.clock).active.certificate,
        "the leaf again": svid.leaf,
    }[extra]

    padded = X509Svid(svid.id, (*svid.chain, more), svid.key)

    assert accepted(padded, bundles(ca)).authority == serial_text(ca.active.certificate)


def test_only_the_first_certificate_speaks_for_the_peer(ca: CertificateAuthority) -> None:
    stolen = ca.issue(OTHER).leaf
    impostor = CertificateAuthority("zt.example", clock=ca.clock).issue(WORKLOAD)

    refused(
        X509Svid(impostor.id, (impostor.leaf, stolen), impostor.key),
        bundles(ca),
        Reason.UNTRUSTED_AUTHORITY,
    )
    # The signing certificate first, as a peer of its own: it has the domain's ID and signs.
    refused(
        X509Svid(impostor.id, (ca.active.certificate, stolen), impostor.key), bundles(ca), Reason.ROOT_PATH_ID
    )


def test_workload_can_not_sign_for_another(ca: CertificateAuthority) -> None:
    mine = ca.issue(WORKLOAD)
    as_authority = signer(ca, mine.leaf, mine.key, *mine.chain)

    refused(ca.issue(OTHER, authority=as_authority), bundles(ca), Reason.UNTRUSTED_AUTHORITY)


NOT_AN_ISSUER: dict[str, dict[str, Any]] = {
    "not a CA": {"basic_constraints": x509.BasicConstraints(False, None)},
    "no basic constraints": {"basic_constraints": None},
    "no keyCertSign": {"key_usage": ["crl_sign"]},
    "digital signature only": {"key_usage": [DIGITAL_SIGNATURE]},
    "no key usage": {"key_usage": None},
    "unknown critical extension": {"extra_extensions": [unknown(critical=True)]},
    "not yet valid": {"not_before": NOON + HOUR},
    # Constraints on URIs can't be evaluated, so they are taken as broken (RFC 5280 section 4.2.1.10).
    "permits another domain only": {
        "extra_extensions": [
            extension(x509.NameConstraints([x509.UniformResourceIdentifier("other.example")], None), True)
        ]
    },
    "excludes this domain": {
        "extra_extensions": [
            extension(x509.NameConstraints(None, [x509.UniformResourceIdentifier("zt.example")]), True)
        ]
    },
}


@pytest.mark.parametrize("case", NOT_AN_ISSUER)
def test_intermediate_that_may_not_vouch(ca: CertificateAuthority, case: str) -> None:
    assert accepted(ca.issue(WORKLOAD, authority=ca.subordinate()), bundles(ca))

    middle = ca.subordinate(**NOT_AN_ISSUER[case])

    refused(ca.issue(WORKLOAD, authority=middle), bundles(ca), Reason.UNTRUSTED_AUTHORITY)


def test_unknown_extension_of_an_intermediate_that_is_not_critical(ca: CertificateAuthority) -> None:
    middle = ca.subordinate(extra_extensions=[unknown(critical=False)])

    assert accepted(ca.issue(WORKLOAD, authority=middle), bundles(ca))


def test_constraints_on_dns_names_bind_dns_names(ca: CertificateAuthority) -> None:
    constraints = x509.NameConstraints([x509.DNSName("zt.example")], [x509.DNSName("secret.zt.example")])
    middle = ca.subordinate(extra_extensions=[extension(constraints, True)])

    assert accepted(ca.issue(WORKLOAD, authority=middle), bundles(ca))
    assert accepted(ca.issue(WORKLOAD, authority=middle, dns_names=["a.zt.example"]), bundles(ca))
    for name in ("evil.example", "a.secret.zt.example"):
        refused(
            ca.issue(WORKLOAD, authority=middle, dns_names=[name]), bundles(ca), Reason.UNTRUSTED_AUTHORITY
        )


def test_path_length_is_kept(ca: CertificateAuthority) -> None:
    upper = ca.subordinate(basic_constraints=x509.BasicConstraints(True, 1))
    lower = ca.subordinate(issuer=upper)
    assert accepted(ca.issue(WORKLOAD, authority=lower), bundles(ca))

    too_low = ca.subordinate(issuer=lower)
    refused(ca.issue(WORKLOAD, authority=too_low), bundles(ca), Reason.UNTRUSTED_AUTHORITY)


def test_expired_intermediate_is_said_to_be_expired(ca: CertificateAuthority) -> None:
    middle = ca.subordinate(not_before=NOON - 2 * HOUR, not_after=NOON + HOUR)
    svid = ca.issue(WORKLOAD, authority=middle, not_after=NOON + 2 * HOUR)
    assert accepted(svid, bundles(ca))

    refused(svid, bundles(ca), Reason.EXPIRED, NOON + HOUR + SECOND)


def test_intermediate_in_its_last_second_vouches_and_is_not_said_to_be_expired(
    ca: CertificateAuthority, friend: CertificateAuthority
) -> None:
    middle = ca.subordinate(not_before=NOON - HOUR, not_after=NOON)
    svid = ca.issue(WORKLOAD, authority=middle, not_after=NOON + HOUR)
    assert accepted(svid, bundles(ca)).valid_until == NOON

    refused(svid, bundle(friend.active.certificate), Reason.UNTRUSTED_AUTHORITY)


def test_chain_of_more_than_16_certificates(ca: CertificateAuthority) -> None:
    svid, root = ca.issue(WORKLOAD), ca.active.certificate

    assert accepted(dataclasses.replace(svid, chain=(svid.leaf, *[root] * 15)), bundles(ca))
    too_long = dataclasses.replace(svid, chain=(svid.leaf, *[root] * 16))
    assert "16" in refused(too_long, bundles(ca), Reason.CHAIN_TOO_LONG).detail


# -- Time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortest", ["leaf", "intermediate", "anchor"])
def test_valid_until_is_the_earliest_end_on_the_path(shortest: str) -> None:
    ends = {"leaf": 3 * HOUR, "intermediate": 3 * HOUR, "anchor": 3 * HOUR} | {shortest: HOUR}
    ca = CertificateAuthority("zt.example", ttl=ends["anchor"], clock=Clock())
    middle = ca.subordinate(not_after=NOON + ends["intermediate"])
    svid = ca.issue(WORKLOAD, authority=middle, not_after=NOON + ends["leaf"])

    peer = accepted(svid, bundles(ca))

    assert peer.valid_until == NOON + HOUR
    assert peer.not_after == NOON + ends["leaf"]
    with pytest.raises(PeerRefused):
        verify_peer(svid.chain, bundles(ca), peer.valid_until + SECOND)


def test_certificates_off_the_path_do_not_shorten_it(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD, ttl=2 * HOUR)
    stray = ca.subordinate(not_after=NOON + HOUR).certificate

    peer = accepted(X509Svid(svid.id, (svid.leaf, stray), svid.key), bundles(ca))

    assert peer.valid_until == NOON + 2 * HOUR


@pytest.mark.parametrize("offset", [-11, -1, 0, 2, 13])
def test_time_zone_of_now_does_not_matter(ca: CertificateAuthority, offset: int) -> None:
    zone = timezone(timedelta(hours=offset))
    middle = ca.subordinate(not_before=NOON, not_after=NOON + HOUR)
    svid = ca.issue(WORKLOAD, authority=middle, not_before=NOON, not_after=NOON + 2 * HOUR)

    assert accepted(svid, bundles(ca), (NOON + SECOND).astimezone(zone))
    refused(svid, bundles(ca), Reason.EXPIRED, (NOON + HOUR + SECOND).astimezone(zone))
    refused(svid, bundles(ca), Reason.NOT_YET_VALID, (NOON - SECOND).astimezone(zone))


def test_time_without_a_zone_is_an_error(ca: CertificateAuthority) -> None:
    with pytest.raises(TypeError):
        verify_peer(ca.issue(WORKLOAD).chain, bundles(ca), NOON.replace(tzinfo=None))


# -- What a refusal says --------------------------------------------------------------------------------


def test_refusals_name_the_peer_and_the_moment(ca: CertificateAuthority) -> None:
    expired = ca.issue(WORKLOAD, not_before=NOON - 2 * HOUR, not_after=NOON - HOUR)
    early = ca.issue(WORKLOAD, not_before=NOON + HOUR)

    assert refused(expired, bundles(ca), Reason.EXPIRED).detail == (
        f"the SVID of {WORKLOAD} expired at 2026-05-01T11:00:00Z"
    )
    assert "2026-05-01T13:00:00Z" in refused(early, bundles(ca), Reason.NOT_YET_VALID).detail
    error = refused(ca.issue(WORKLOAD, is_ca=True), bundles(ca), Reason.LEAF_IS_CA)
    assert WORKLOAD in error.detail
    assert str(error) == f"leaf_is_ca: {error.detail}"
    stranger = CertificateAuthority("zt.example", clock=ca.clock).issue(WORKLOAD)
    assert WORKLOAD in refused(stranger, bundles(ca), Reason.UNTRUSTED_AUTHORITY).detail


def test_verifying_again_gives_the_same_answer(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD)
    first = accepted(svid, bundles(ca))
    chain: Sequence[x509.Certificate] = first.chain

    assert verify_peer(chain, bundles(ca), NOON) == first


def test_svid_ends_with_the_second_that_it_names(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD, not_after=NOON)
    accepted(svid, bundles(ca), NOON - SECOND)

    refused(svid, bundles(ca), Reason.EXPIRED, NOON)


# -- What nobody can read -------------------------------------------------------------------------------


def test_leaf_whose_public_key_cannot_be_read_is_refused(ca: CertificateAuthority) -> None:
    good = ca.issue(WORKLOAD)
    accepted(good, bundles(ca))
    numbers = good.key.public_key().public_numbers()
    assert isinstance(numbers, ec.EllipticCurvePublicNumbers)
    point = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    leaf = x509.load_der_x509_certificate(resigned(ca, good.leaf, point, bytes(63) + b"\1"))

    refused(dataclasses.replace(good, chain=(leaf,)), bundles(ca), Reason.MALFORMED_CERTIFICATE)
