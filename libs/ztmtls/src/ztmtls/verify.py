"""Is this certificate chain an acceptable peer? One function answers, everywhere.

`verify_peer` is used for our own SVID before it is published, after each TLS handshake in both roles,
and when a live connection is checked again. It implements X509-SVID section 5 and RFC 5280 path
validation, with the path built to the authorities of **one** trust domain only: the one that the leaf
itself names (SPIFFE Federation sections 4.2 and 7.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509 import verification

from .ids import InvalidSpiffeId, SpiffeId, TrustDomain
from .reasons import Reason, Refusal
from .svid import (
    MAX_CHAIN,
    UNDECODABLE,
    IdentitySummary,
    InvalidSvid,
    X509Bundle,
    fingerprint,
    public_key_of,
    rfc3339,
    serial_text,
    spiffe_id_of,
)

E = TypeVar("E", bound=x509.ExtensionType)


class PeerRefused(Refusal):
    """The certificate chain is not an acceptable peer. `reason` says which check failed."""


@dataclass(frozen=True)
class VerifiedPeer:
    """What `verify_peer` proved. `valid_until` is the earliest end of validity along the path.

    `serial` and `authority` (the serial number of the trust anchor) are lower-case hexadecimal, as is
    `fingerprint` (SHA-256 of the leaf). `chain` is what the peer presented, kept so that the same
    connection can be verified again.
    """

    id: SpiffeId
    serial: str
    fingerprint: str
    not_before: datetime
    not_after: datetime
    valid_until: datetime
    authority: str
    chain: tuple[x509.Certificate, ...] = field(repr=False)

    @cached_property
    def presented(self) -> bytes:
        """A digest of the whole `chain`: equal for peers that presented the same certificates."""
        return b"".join(certificate.fingerprint(hashes.SHA256()) for certificate in self.chain)

    @property
    def summary(self) -> IdentitySummary:
        """What may be shown of the peer's certificate."""
        return IdentitySummary(str(self.id), self.serial, rfc3339(self.not_after))


def verify_peer(
    chain: Sequence[x509.Certificate], bundles: Mapping[TrustDomain, X509Bundle], now: datetime
) -> VerifiedPeer:
    """Verify `chain` (leaf first) against `bundles` at `now` (aware). Raises `PeerRefused`.

    In this order: exactly one URI SAN that is a SPIFFE ID with a path (X509-SVID sections 2 and 3.1); a leaf
    that is no CA and may not sign certificates or CRLs, but may sign handshakes (section 5.2); validity; a
    bundle of the leaf's own trust domain; a valid path to one of its authorities (RFC 5280 section 6).
    Intermediates come from `chain`; whatever else it holds does not matter. Not checked here: that the peer
    has the private key (TLS does), extended key usage (OpenSSL does, for the role), revocation lists.
    """
    if not chain:
        raise PeerRefused(Reason.NO_CERTIFICATE, "the peer presented no certificate")
    if len(chain) > MAX_CHAIN:
        raise PeerRefused(Reason.CHAIN_TOO_LONG, f"the peer's chain holds more than {MAX_CHAIN} certificates")
    leaf = chain[0]
    peer_id = _identity(leaf)
    _check_leaf_profile(leaf, peer_id)
    _check_validity(leaf, now, f"the SVID of {peer_id}")
    bundle = bundles.get(peer_id.trust_domain)
    if bundle is None:
        raise PeerRefused(
            Reason.UNKNOWN_TRUST_DOMAIN, f"no bundle is known for trust domain {peer_id.trust_domain}"
        )
    path = _build_path(leaf, chain[1:], bundle, peer_id, now)
    return VerifiedPeer(
        id=peer_id,
        serial=serial_text(leaf),
        fingerprint=fingerprint(leaf),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        valid_until=min(certificate.not_valid_after_utc for certificate in path),
        authority=serial_text(path[-1]),
        chain=tuple(chain),
    )


def _identity(leaf: x509.Certificate) -> SpiffeId:
    # X509-SVID 2: exactly one URI SAN; 3.1: a leaf's ID has a path.
    # A key that nobody can read proves nothing.
    try:
        peer_id = spiffe_id_of(leaf)
        public_key_of(leaf)
    except (InvalidSvid, InvalidSpiffeId) as error:
        raise PeerRefused(error.reason, error.detail) from None
    if peer_id.is_root:
        raise PeerRefused(Reason.ROOT_PATH_ID, f"{peer_id} names a trust domain, not a workload")
    return peer_id


def _check_leaf_profile(leaf: x509.Certificate, peer_id: SpiffeId) -> None:
    # X509-SVID 5.2, with 4.3 and RFC 8446 4.4.2.2 for digitalSignature. An absent BasicConstraints
    # means "not a CA" (RFC 5280 4.2.1.9).
    basic = _extension(leaf, x509.BasicConstraints)
    usage = _extension(leaf, x509.KeyUsage)
    if basic is not None and basic.ca:
        raise PeerRefused(Reason.LEAF_IS_CA, f"{peer_id} presented a CA certificate as its own")
    if usage is not None and usage.key_cert_sign:
        raise PeerRefused(
            Reason.LEAF_CAN_SIGN_CERTIFICATES, f"the certificate of {peer_id} may sign certificates"
        )
    if usage is not None and usage.crl_sign:
        raise PeerRefused(Reason.LEAF_CAN_SIGN_CRLS, f"the certificate of {peer_id} may sign CRLs")
    if usage is None or not usage.digital_signature:
        raise PeerRefused(
            Reason.LEAF_WITHOUT_DIGITAL_SIGNATURE,
            f"the certificate of {peer_id} lacks key usage digitalSignature",
        )


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _check_validity(certificate: x509.Certificate, now: datetime, what: str) -> None:
    if now < certificate.not_valid_before_utc:
        raise PeerRefused(
            Reason.NOT_YET_VALID, f"{what} is valid only from {rfc3339(certificate.not_valid_before_utc)}"
        )
    if now >= certificate.not_valid_after_utc:
        raise PeerRefused(Reason.EXPIRED, f"{what} expired at {rfc3339(certificate.not_valid_after_utc)}")


def _build_path(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    bundle: X509Bundle,
    peer_id: SpiffeId,
    now: datetime,
) -> Sequence[x509.Certificate]:
    if not bundle.authorities:
        raise PeerRefused(
            Reason.UNTRUSTED_AUTHORITY, f"the bundle of {bundle.trust_domain} holds no authority"
        )
    verifier = (
        verification.PolicyBuilder()
        .store(_store(bundle.authorities))
        .time(now)
        .max_chain_depth(MAX_CHAIN)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
        .build_client_verifier()
    )
    try:
        return verifier.verify(leaf, list(intermediates)).chain
    except (verification.VerificationError, *UNDECODABLE) as error:
        # An issuer still vouches in the last second of its validity (RFC 5280 section 4.1.2.5).
        expired = [c for c in intermediates if now > c.not_valid_after_utc]
        raise PeerRefused(
            Reason.EXPIRED if expired else Reason.UNTRUSTED_AUTHORITY,
            f"no valid path from {peer_id} to an authority of {bundle.trust_domain}",
        ) from error


@lru_cache(maxsize=64)
def _store(authorities: tuple[x509.Certificate, ...]) -> verification.Store:
    return verification.Store(list(authorities))


# The leaf's own rules are SPIFFE's, not the web's, and are checked above; the path library must still
# see a SAN, and refuses critical extensions that it does not know.
_CA_POLICY = verification.ExtensionPolicy.webpki_defaults_ca()
_LEAF_POLICY = verification.ExtensionPolicy.permit_all().require_present(
    x509.SubjectAlternativeName, verification.Criticality.AGNOSTIC, None
)
