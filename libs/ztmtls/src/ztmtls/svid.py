"""X.509-SVIDs, bundles, and the snapshot that holds both (X509-SVID, SPIFFE Workload API section 5).

Everything here is immutable. An `X509Context` is one coherent state of the Workload API: whoever holds
it sees an SVID and the bundles that arrived together, never a mixture of two updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from .ids import SpiffeId, TrustDomain
from .reasons import Reason, Refusal

PrivateKey = EllipticCurvePrivateKey | RSAPrivateKey

# What `cryptography` raises for a certificate or an extension that it can't decode. The x509 exceptions
# are no ValueErrors.
UNDECODABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

MAX_CHAIN = 16
MAX_BUNDLE = 1024


class InvalidSvid(Refusal, ValueError):
    """Key material or a bundle can't be used as it is. The reason tells which check failed."""


def serial_text(certificate: x509.Certificate) -> str:
    """The serial number as lower-case hexadecimal, as `openssl x509 -serial` would (but for case)."""
    text = f"{certificate.serial_number:x}"
    return text if len(text) % 2 == 0 else "0" + text


def rfc3339(moment: datetime) -> str:
    """`moment` in UTC to the second, for example ``2026-05-01T12:00:00Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class IdentitySummary:
    """What may be shown of a certificate: no key material. Times are RFC 3339 in UTC."""

    id: str
    serial: str
    not_after: str

    def as_dict(self) -> dict[str, str]:
        """The same as a JSON-able mapping."""
        return {"id": self.id, "serial": self.serial, "not_after": self.not_after}


@dataclass(frozen=True)
class X509Svid:
    """One X.509-SVID: the certificate chain, leaf first, and its private key (X509-SVID section 2)."""

    id: SpiffeId
    chain: tuple[x509.Certificate, ...]
    key: PrivateKey = field(repr=False, compare=False)
    hint: str = ""

    @classmethod
    def from_der(cls, chain_der: bytes, key_der: bytes, hint: str = "") -> X509Svid:
        """Read what the Workload API delivers: concatenated DER certificates, PKCS#8 DER key.

        Raises `InvalidSvid` when the bytes can't be read, hold no leaf ID, or key and leaf don't fit.
        Whether the chain is *valid* is `verify.verify_peer`'s to say.
        """
        chain = certificates_from_der(chain_der, limit=MAX_CHAIN)
        try:
            key = serialization.load_der_private_key(key_der, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidSvid(
                Reason.INVALID_UPDATE, "private key is not an unencrypted PKCS#8 DER key"
            ) from error
        if not isinstance(key, (EllipticCurvePrivateKey, RSAPrivateKey)):
            raise InvalidSvid(Reason.INVALID_UPDATE, "private key is neither an EC nor an RSA key")
        if key.public_key() != public_key_of(chain[0]):
            raise InvalidSvid(Reason.INVALID_UPDATE, "private key does not belong to the leaf certificate")
        return cls(spiffe_id_of(chain[0]), chain, key, hint)

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate that names this workload."""
        return self.chain[0]

    @property
    def not_after(self) -> datetime:
        """End of the leaf's validity, aware, UTC."""
        return self.leaf.not_valid_after_utc

    @cached_property
    def expires(self) -> float:
        """`not_after` in seconds since the epoch, as `time.time` counts."""
        return self.not_after.timestamp()

    @cached_property
    def serial(self) -> str:
        """The leaf's serial number, lower-case hexadecimal."""
        return serial_text(self.leaf)

    @cached_property
    def summary(self) -> IdentitySummary:
        """What may be shown of this SVID."""
        return IdentitySummary(str(self.id), self.serial, rfc3339(self.not_after))

    def chain_der(self) -> bytes:
        """The chain as concatenated DER, leaf first: the Workload API's form."""
        return b"".join(c.public_bytes(serialization.Encoding.DER) for c in self.chain)

    def key_der(self) -> bytes:
        """The private key as unencrypted PKCS#8 DER. Keep it in memory."""
        return self.key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def pem(self) -> bytes:
        """Key and chain as one PEM, the form `ssl.SSLContext.load_cert_chain` wants. Keep it in memory."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return key + b"".join(c.public_bytes(serialization.Encoding.PEM) for c in self.chain)


@dataclass(frozen=True)
class X509Bundle:
    """The X.509 authorities of one trust domain. An empty bundle trusts nothing of that domain."""

    trust_domain: TrustDomain
    authorities: tuple[x509.Certificate, ...]

    @classmethod
    def from_der(cls, trust_domain: TrustDomain, der: bytes) -> X509Bundle:
        """Read concatenated DER certificates; no bytes at all make an empty bundle."""
        authorities = certificates_from_der(der, limit=MAX_BUNDLE) if der else ()
        return cls(trust_domain, authorities)

    def der(self) -> bytes:
        """The authorities as concatenated DER: the Workload API's form."""
        return b"".join(c.public_bytes(serialization.Encoding.DER) for c in self.authorities)


@dataclass(frozen=True)
class X509Context:
    """One coherent state of the Workload API. `generation` grows by one with every change.

    `svids` is in the order of the Workload API, but for the default one, which comes first.
    """

    generation: int
    svids: tuple[X509Svid, ...]
    bundles: Mapping[TrustDomain, X509Bundle]
    received_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        if not self.svids:
            raise InvalidSvid(Reason.INVALID_UPDATE, "a context needs at least one SVID")
        object.__setattr__(self, "bundles", MappingProxyType(dict(self.bundles)))

    @property
    def svid(self) -> X509Svid:
        """The SVID we present: the first, or the one the picker chose (Workload API section 8)."""
        return self.svids[0]

    def same_material(self, other: X509Context) -> bool:
        """True when both hold the same SVIDs and bundles, whatever their generation."""
        return self.svids == other.svids and dict(self.bundles) == dict(other.bundles)


def spiffe_id_of(leaf: x509.Certificate) -> SpiffeId:
    """The one SPIFFE ID of a certificate (X509-SVID section 2: exactly one URI SAN).

    Raises `InvalidSvid` with `no_uri_san`, `multiple_uri_sans` or `malformed_certificate`, or
    `ids.InvalidSpiffeId`. Other SAN types may be there in any number and don't matter.
    """
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise InvalidSvid(Reason.NO_URI_SAN, "certificate has no subject alternative name") from None
    except UNDECODABLE as error:
        raise InvalidSvid(Reason.MALFORMED_CERTIFICATE, "certificate extensions can't be decoded") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if not uris:
        raise InvalidSvid(Reason.NO_URI_SAN, "certificate has no URI subject alternative name")
    if len(uris) > 1:
        raise InvalidSvid(
            Reason.MULTIPLE_URI_SANS,
            f"certificate has {len(uris)} URI subject alternative names, not exactly one",
        )
    return SpiffeId.parse(uris[0])


def public_key_of(certificate: x509.Certificate) -> object:
    """The public key, or `InvalidSvid` with `malformed_certificate` when it can't be read."""
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidSvid(
            Reason.MALFORMED_CERTIFICATE, "the certificate's public key can't be read"
        ) from error


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER certificate, lower-case hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def certificates_from_der(der: bytes, *, limit: int) -> tuple[x509.Certificate, ...]:
    """Split concatenated DER certificates; nothing may be left over, and not more than `limit`."""
    certificates: list[x509.Certificate] = []
    rest = memoryview(der)
    while rest:
        if len(certificates) == limit:
            raise InvalidSvid(Reason.CHAIN_TOO_LONG, f"more than {limit} certificates")
        size = _der_length(rest)
        try:
            certificates.append(x509.load_der_x509_certificate(bytes(rest[:size])))
        except UNDECODABLE as error:
            raise InvalidSvid(
                Reason.MALFORMED_CERTIFICATE, f"certificate {len(certificates) + 1} can't be decoded"
            ) from error
        rest = rest[size:]
    if not certificates:
        raise InvalidSvid(Reason.MALFORMED_CERTIFICATE, "no certificate")
    return tuple(certificates)


def _der_length(data: memoryview) -> int:
    """Total length in bytes of the DER SEQUENCE that `data` begins with (X.690 section 8.1.3)."""
    broken = InvalidSvid(Reason.MALFORMED_CERTIFICATE, "trailing or truncated bytes after a certificate")
    if len(data) < 2 or data[0] != 0x30:
        raise broken
    first = data[1]
    if first < 0x80:
        total = 2 + first
    else:
        octets = first & 0x7F
        if not 1 <= octets <= 3 or len(data) < 2 + octets:
            raise broken
        total = 2 + octets + int.from_bytes(data[2 : 2 + octets], "big")
    if total > len(data):
        raise broken
    return total
