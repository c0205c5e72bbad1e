"""SVIDs, bundles and contexts: DER is split exactly, keys have to fit, snapshots do not change."""

from __future__ import annotations

import dataclasses
import ssl
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from ztmtls.ids import InvalidSpiffeId, TrustDomain
from ztmtls.reasons import Reason
from ztmtls.svid import (
    MAX_BUNDLE,
    MAX_CHAIN,
    InvalidSvid,
    X509Bundle,
    X509Context,
    X509Svid,
    certificates_from_der,
    fingerprint,
    rfc3339,
    serial_text,
    spiffe_id_of,
)
from ztmtls.testing import CertificateAuthority, new_key

WORKLOAD = "spiffe://zt.example/ns/zt-demo/sa/orders"
DOMAIN = TrustDomain("zt.example")
SAN = x509.SubjectAlternativeName.oid


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example")


@pytest.fixture(scope="module")
def svid(ca: CertificateAuthority) -> X509Svid:
    return ca.issue(WORKLOAD)


@pytest.fixture(scope="module")
def leaf_der(svid: X509Svid) -> bytes:
    return svid.chain_der()


def refused(action: Callable[[], object], reason: Reason) -> InvalidSvid:
    with pytest.raises(InvalidSvid) as caught:
        action()
    assert caught.value.reason is reason, caught.value
    assert isinstance(caught.value, ValueError)
    return caught.value


def replaced(der: bytes, old: str, new: str) -> bytes:
    """`der` with one byte string in it replaced by another of the same length."""
    before, after = bytes.fromhex(old), bytes.fromhex(new)
    assert len(before) == len(after)
    assert der.count(before) == 1
    return der.replace(before, after)


def pkcs8(key: ed25519.Ed25519PrivateKey | dsa.DSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


# -- Splitting DER --------------------------------------------------------------------------------------


def test_concatenated_certificates_come_apart_in_order(ca: CertificateAuthority) -> None:
    chain = ca.issue(WORKLOAD, authority=ca.subordinate()).chain
    der = b"".join(c.public_bytes(Encoding.DER) for c in chain)

    assert certificates_from_der(der, limit=2) == chain


@pytest.mark.parametrize(
    "tail",
    [b"\0", b"\n", b"\x30", b"\x30\x00", b"\x30\x80\x00\x00", b"\x30\x82\x01",
     b"\x30\x84\x00\x00\x00\x01\x00",
     b"\x30\xff", b"\x04\x02ab", b"-----BEGIN CERTIFICATE-----"],
)  # fmt: skip
def test_trailing_bytes_are_refused(leaf_der: bytes, tail: bytes) -> None:
    refused(lambda: certificates_from_der(leaf_der + tail, limit=16), Reason.MALFORMED_CERTIFICATE)


def test_certificate_cut_at_any_byte_is_refused(leaf_der: bytes) -> None:
    for end in range(len(leaf_der)):
        refused(lambda end=end: certificates_from_der(leaf_der[:end], limit=16), Reason.MALFORMED_CERTIFICATE)
    for end in range(1, len(leaf_der)):
        refused(
            lambda end=end: certificates_from_der(leaf_der + leaf_der[:end], limit=16),
            Reason.MALFORMED_CERTIFICATE,
        )


def test_certificate_without_its_first_bytes_is_refused(leaf_der: bytes) -> None:
    for start in (1, 2, 4, 8):
        refused(lambda s=start: certificates_from_der(leaf_der[s:], limit=16), Reason.MALFORMED_CERTIFICATE)


@pytest.mark.parametrize(
    "length",
    ["80", "81ff", "82ffff", "83ffffff", "8400000001", "88ffffffffffffffff", "ff", "7f", "00", "01"],
)
def test_length_that_is_not_the_certificates_is_refused(leaf_der: bytes, length: str) -> None:
    der = b"\x30" + bytes.fromhex(length) + leaf_der[4:]

    refused(lambda: certificates_from_der(der, limit=16), Reason.MALFORMED_CERTIFICATE)


def test_length_one_off_is_refused(leaf_der: bytes) -> None:
    size = int.from_bytes(leaf_der[2:4], "big")
    for wrong in (size - 1, size + 1):
        der = leaf_der[:2] + wrong.to_bytes(2, "big") + leaf_der[4:]
        refused(lambda der=der: certificates_from_der(der, limit=16), Reason.MALFORMED_CERTIFICATE)


def test_pem_is_not_der(svid: X509Svid) -> None:
    pem = svid.leaf.public_bytes(Encoding.PEM)

    refused(lambda: certificates_from_der(pem, limit=16), Reason.MALFORMED_CERTIFICATE)


def test_refusal_says_which_certificate_is_broken(leaf_der: bytes) -> None:
    broken = b"\x30\x03\x02\x01\x05"

    error = refused(
        lambda: certificates_from_der(leaf_der + broken + leaf_der, limit=16), Reason.MALFORMED_CERTIFICATE
    )

    assert "certificate 2" in error.detail


@pytest.mark.parametrize("version", ["01", "03", "05", "7f"])
def test_unknown_certificate_version_is_malformed(leaf_der: bytes, version: str) -> None:
    der = replaced(leaf_der, "a003020102", "a0030201" + version)

    refused(lambda: certificates_from_der(der, limit=16), Reason.MALFORMED_CERTIFICATE)
    refused(lambda: X509Bundle.from_der(DOMAIN, der), Reason.MALFORMED_CERTIFICATE)


def test_chain_may_have_16_certificates_and_no_more(svid: X509Svid, leaf_der: bytes) -> None:
    key = svid.key_der()

    assert len(X509Svid.from_der(leaf_der * MAX_CHAIN, key).chain) == MAX_CHAIN == 16
    error = refused(lambda: X509Svid.from_der(leaf_der * 17, key), Reason.CHAIN_TOO_LONG)
    assert "16" in error.detail


def test_bundle_may_have_1024_authorities_and_no_more(ca: CertificateAuthority) -> None:
    der = ca.bundle.der()

    assert len(X509Bundle.from_der(DOMAIN, der * MAX_BUNDLE).authorities) == MAX_BUNDLE == 1024
    refused(lambda: X509Bundle.from_der(DOMAIN, der * 1025), Reason.CHAIN_TOO_LONG)


# -- SVIDs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(new_key, id="P-256"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP384R1()), id="P-384"),
        pytest.param(lambda: rsa.generate_private_key(65537, 2048), id="RSA"),
    ],
)
def test_svid_survives_the_way_through_the_workload_api(
    ca: CertificateAuthority, key: Callable[[], ec.EllipticCurvePrivateKey]
) -> None:
    given = ca.issue(WORKLOAD, key=key(), authority=ca.subordinate(), hint="internal")

    read = X509Svid.from_der(given.chain_der(), given.key_der(), given.hint)

    assert read == given
    assert str(read.id) == WORKLOAD
    assert read.leaf == given.chain[0]
    assert len(read.chain) == 2
    assert read.hint == "internal"
    assert read.key.private_numbers() == given.key.private_numbers()
    assert read.serial == serial_text(given.leaf)
    assert read.not_after == given.leaf.not_valid_after_utc
    assert read.summary.as_dict() == {
        "id": WORKLOAD, "serial": read.serial, "not_after": rfc3339(read.not_after),
    }  # fmt: skip


def test_svid_without_certificates_is_refused(svid: X509Svid) -> None:
    refused(lambda: X509Svid.from_der(b"", svid.key_der()), Reason.MALFORMED_CERTIFICATE)


def test_key_of_another_certificate_is_refused(ca: CertificateAuthority, svid: X509Svid) -> None:
    rsa_key = ca.issue(WORKLOAD, key=rsa.generate_private_key(65537, 2048)).key_der()
    for other in (ca.issue(WORKLOAD).key_der(), rsa_key):
        error = refused(lambda other=other: X509Svid.from_der(svid.chain_der(), other), Reason.INVALID_UPDATE)
        assert "does not belong" in error.detail


def test_key_has_to_fit_the_first_certificate_not_a_later_one(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD, authority=ca.subordinate())
    swapped = b"".join(c.public_bytes(Encoding.DER) for c in reversed(svid.chain))

    refused(lambda: X509Svid.from_der(swapped, svid.key_der()), Reason.INVALID_UPDATE)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda svid: b"", id="empty"),
        pytest.param(lambda svid: b"not a key", id="text"),
        pytest.param(lambda svid: svid.key_der()[:-1], id="truncated"),
        pytest.param(lambda svid: svid.key_der() + b"\0", id="trailing byte"),
        pytest.param(lambda svid: svid.key_der() * 2, id="twice"),
        pytest.param(lambda svid: svid.pem(), id="PEM"),
        pytest.param(lambda svid: svid.chain_der(), id="a certificate"),
        pytest.param(
            lambda svid: svid.key.private_bytes(
                Encoding.DER, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
            ),
            id="encrypted",
        ),
        pytest.param(lambda svid: pkcs8(ed25519.Ed25519PrivateKey.generate()), id="Ed25519"),
        pytest.param(lambda svid: pkcs8(dsa.generate_private_key(1024)), id="DSA"),
        pytest.param(
            lambda svid: replaced(svid.key_der(), "2a8648ce3d030107", "2a8648ce3d03017f"), id="unknown curve"
        ),
        pytest.param(
            lambda svid: replaced(svid.key_der(), "06072a8648ce3d0201", "06072a8648ce3d027f"),
            id="unknown kind of key",
        ),
    ],
)
def test_key_that_can_not_be_used_is_refused(svid: X509Svid, spoil: Callable[[X509Svid], bytes]) -> None:
    key = spoil(svid)

    refused(lambda: X509Svid.from_der(svid.chain_der(), key), Reason.INVALID_UPDATE)


def test_leaf_with_a_public_key_of_unknown_kind_is_malformed(svid: X509Svid) -> None:
    der = replaced(svid.chain_der(), "2a8648ce3d030107", "2a8648ce3d03017f")

    refused(lambda: X509Svid.from_der(der, svid.key_der()), Reason.MALFORMED_CERTIFICATE)


def test_key_material_shows_nowhere(ca: CertificateAuthority, svid: X509Svid) -> None:
    secret = svid.key.private_numbers().private_value  # type: ignore[union-attr]
    traces = [repr(svid), str(svid), repr(ca.context(svid)), repr(svid.summary)]
    for key in (svid.key_der()[:-1], ca.issue(WORKLOAD).key_der(), b"\x30" + svid.key_der()):
        with pytest.raises(InvalidSvid) as caught:
            X509Svid.from_der(svid.chain_der(), key)
        traces.append("".join(traceback.format_exception(caught.value)))
        traces.append(repr(caught.value))

    for text in traces:
        assert "BEGIN" not in text
        assert str(secret) not in text
        assert f"{secret:x}" not in text.lower()
        assert repr(svid.key_der())[2:40] not in text


def test_pem_is_what_openssl_loads(svid: X509Svid, tmp_path: Path) -> None:
    path = tmp_path / "svid.pem"
    path.write_bytes(svid.pem())

    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(path)

    assert x509.load_pem_x509_certificates(svid.pem()) == list(svid.chain)


# -- The one ID of a certificate ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "shape"),
    [
        (Reason.NO_URI_SAN, {"uris": []}),
        (Reason.NO_URI_SAN, {"uris": [], "dns_names": ["orders.zt.example"]}),
        (Reason.MULTIPLE_URI_SANS, {"uris": [WORKLOAD, WORKLOAD]}),
        (Reason.MULTIPLE_URI_SANS, {"uris": [WORKLOAD, "https://zt.example/"]}),
        (Reason.MULTIPLE_URI_SANS, {"uris": [WORKLOAD, "spiffe://zt.example/" + "a" * 3000]}),
        (Reason.MULTIPLE_URI_SANS, {"uris": ["spiffe://zt.example/a"] * 100}),
        (Reason.MALFORMED_CERTIFICATE, {"uris": [b"spiffe://zt.example/\xff"]}),
    ],
)
def test_certificate_without_exactly_one_uri(
    ca: CertificateAuthority, reason: Reason, shape: dict[str, list[str]]
) -> None:
    refused(lambda: spiffe_id_of(ca.issue(WORKLOAD, **shape).leaf), reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "uri", ["", "spiffe://zt.example/" + "a" * 3000, "https://zt.example/a", WORKLOAD + "/"]
)
def test_uri_that_is_no_spiffe_id(ca: CertificateAuthority, uri: str) -> None:
    with pytest.raises(InvalidSpiffeId):
        spiffe_id_of(ca.issue(WORKLOAD, uris=[uri]).leaf)


def names(*general_names: tuple[int, bytes]) -> x509.Extension[x509.ExtensionType]:
    """A subject alternative name of raw GeneralNames, beside a valid SPIFFE ID."""
    entries = [*general_names, (0x86, WORKLOAD.encode())]
    body = b"".join(bytes((tag, len(value))) + value for tag, value in entries)
    return x509.Extension(SAN, False, x509.UnrecognizedExtension(SAN, bytes((0x30, len(body))) + body))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((0x82, b"orders.zt.example"), id="DNS"),
        pytest.param((0x81, b"a@zt.example"), id="mail"),
        pytest.param((0x87, b"\x7f\x00\x00\x01"), id="IP"),
        pytest.param((0x88, b"\x2a\x03"), id="registered ID"),
        pytest.param((0xA0, b"\x06\x02\x2a\x03\xa0\x02\x05\x00"), id="other name"),
    ],
)
def test_names_of_other_kinds_do_not_matter(ca: CertificateAuthority, other: tuple[int, bytes]) -> None:
    leaf = ca.issue(WORKLOAD, uris=[], extra_extensions=[names(other)]).leaf

    assert str(spiffe_id_of(leaf)) == WORKLOAD


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((0x87, b"\x01\x02\x03"), id="IP of three bytes"),
        pytest.param((0x82, b"\xff"), id="DNS not ASCII"),
        pytest.param((0x89, b"x"), id="unknown tag"),
        pytest.param((0xA3, b""), id="X.400 address"),
        pytest.param((0xA5, b"\xa1\x03\x0c\x01x"), id="EDI party"),
    ],
)
def test_names_that_can_not_be_decoded_are_malformed(
    ca: CertificateAuthority, other: tuple[int, bytes]
) -> None:
    leaf = ca.issue(WORKLOAD, uris=[], extra_extensions=[names(other)]).leaf

    refused(lambda: spiffe_id_of(leaf), Reason.MALFORMED_CERTIFICATE)


def test_extension_given_twice_is_malformed(leaf_der: bytes) -> None:
    # The subject key identifier (2.5.29.14) made into a second subject alternative name (2.5.29.17).
    leaf = x509.load_der_x509_certificate(replaced(leaf_der, "0603551d0e", "0603551d11"))

    refused(lambda: spiffe_id_of(leaf), Reason.MALFORMED_CERTIFICATE)


# -- Bundles and contexts -------------------------------------------------------------------------------


def test_no_bytes_make_an_empty_bundle() -> None:
    bundle = X509Bundle.from_der(DOMAIN, b"")

    assert bundle.authorities == ()
    assert bundle.der() == b""


def test_bundle_keeps_every_authority_in_order(ca: CertificateAuthority) -> None:
    other = CertificateAuthority("zt.example")
    der = ca.bundle.der() + other.bundle.der()

    bundle = X509Bundle.from_der(DOMAIN, der)

    assert bundle.authorities == (*ca.bundle.authorities, *other.bundle.authorities)
    assert bundle.der() == der


def test_context_needs_an_svid(ca: CertificateAuthority) -> None:
    refused(lambda: ca.context(), Reason.INVALID_UPDATE)


def test_first_svid_is_the_one_presented(ca: CertificateAuthority, svid: X509Svid) -> None:
    context = ca.context(svid, ca.issue("spiffe://zt.example/other"))

    assert context.svid is svid


def test_context_does_not_change_with_what_it_was_made_of(ca: CertificateAuthority, svid: X509Svid) -> None:
    bundles = {DOMAIN: ca.bundle}
    context = X509Context(1, (svid,), bundles)

    bundles.clear()

    assert list(context.bundles) == [DOMAIN]
    with pytest.raises(TypeError):
        context.bundles[TrustDomain("evil")] = ca.bundle  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.generation = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        svid.chain = ()  # type: ignore[misc]


def test_same_material_is_told_from_new_material(ca: CertificateAuthority, svid: X509Svid) -> None:
    context = ca.context(svid)
    friend = CertificateAuthority("friend.example")
    reread = X509Svid.from_der(svid.chain_der(), svid.key_der())

    assert context.same_material(ca.context(reread, generation=9))
    assert not context.same_material(ca.context(ca.issue(WORKLOAD)))
    assert not context.same_material(ca.context(svid, ca.issue(WORKLOAD)))
    assert not context.same_material(ca.context(dataclasses.replace(svid, hint="x")))
    assert not context.same_material(ca.context(svid, federates_with=[friend]))
    assert not context.same_material(CertificateAuthority("zt.example").context(svid))


# -- Texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"), [(1, "01"), (0xF, "0f"), (0xABC, "0abc"), (0xDEADBEEF, "deadbeef")]
)
def test_serial_numbers_have_whole_bytes_in_lower_case(
    ca: CertificateAuthority, number: int, text: str
) -> None:
    assert ca.issue(WORKLOAD, serial_number=number).serial == text


def test_times_are_utc_to_the_second() -> None:
    moment = datetime(2026, 5, 1, 14, 0, 0, 999_999, tzinfo=timezone(timedelta(hours=2)))

    assert rfc3339(moment) == "2026-05-01T12:00:00Z"
    assert rfc3339(datetime(2026, 5, 1, 12, tzinfo=UTC)) == "2026-05-01T12:00:00Z"


def test_fingerprint_is_of_the_whole_certificate(ca: CertificateAuthority, svid: X509Svid) -> None:
    assert len(fingerprint(svid.leaf)) == 64
    assert fingerprint(svid.leaf) != fingerprint(ca.issue(WORKLOAD).leaf)
