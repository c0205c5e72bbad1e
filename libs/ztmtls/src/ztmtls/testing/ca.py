"""A real X.509 certificate authority for one trust domain, for tests and for one-machine demos.

What it signs is what a SPIFFE deployment would sign (X509-SVID sections 2 to 4): ECDSA P-256, one URI
SAN per leaf, signing certificates that name the trust domain and nothing else. `CertificateAuthority`
rotates its authorities the way SPIRE does: *prepare* publishes a new one beside the old, *activate*
signs with it, *retire* takes the old one out of the bundle.

`CertificateAuthority.issue` also makes certificates that a verifier has to refuse: every part of a leaf
can be overridden. Keys live in memory only. Never use any of this to protect something of value: there
is no protected key store, no revocation service and no audit of what was signed.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from ztmtls.ids import SpiffeId, TrustDomain
from ztmtls.svid import PrivateKey, X509Bundle, X509Context, X509Svid

Duration = timedelta | float
"""A length of time: a `timedelta`, or seconds."""

Clock = Callable[[], datetime]
"""Returns the present moment as an aware `datetime`."""

BACKDATE = timedelta(seconds=10)
"""How far before now a certificate begins to be valid, so that slightly slow clocks accept it."""

LEAF_BASIC_CONSTRAINTS = x509.BasicConstraints(ca=False, path_length=None)
SUBORDINATE_BASIC_CONSTRAINTS = x509.BasicConstraints(ca=True, path_length=0)
LEAF_KEY_USAGE = frozenset({"digital_signature"})
LEAF_EXTENDED_KEY_USAGE = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
SIGNING_KEY_USAGE = frozenset({"key_cert_sign", "crl_sign"})

_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class AuthorityError(RuntimeError):
    """The rotation step can't be taken now, or the signing authority has expired."""


class AuthorityState(StrEnum):
    """Where an authority is in its life. Every state but the last two is in the bundle."""

    PREPARED = "prepared"
    ACTIVE = "active"
    OLD = "old"
    RETIRED = "retired"
    REVOKED = "revoked"


_PUBLISHED = (AuthorityState.PREPARED, AuthorityState.ACTIVE, AuthorityState.OLD)


@dataclass(eq=False)
class Authority:
    """One signing authority: its certificate and key, and what relying parties need to trust it.

    `anchor` is the certificate that stands in the bundle: this one when it is self-signed, else the root
    above it. `created_at` is when it was made, by the authority's clock; its validity begins a little
    earlier. `intermediates` are sent after each leaf. `latest_expiry` is the end of the longest-lived
    certificate it has signed so far; before that moment it must stay in the bundle.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    anchor: x509.Certificate
    created_at: datetime
    intermediates: tuple[x509.Certificate, ...] = ()
    jwt_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: new_key(), repr=False)
    former_jwt_keys: list[ec.EllipticCurvePrivateKey] = field(default_factory=list, repr=False)
    state: AuthorityState = AuthorityState.PREPARED
    latest_expiry: datetime | None = None

    @property
    def id(self) -> str:
        """The subject key identifier of the signing certificate, lower-case hexadecimal."""
        return _key_identifier(self.key.public_key()).digest.hex()

    @property
    def jwt_key_id(self) -> str:
        """The ``kid`` of this authority's JWT-SVIDs."""
        return _jwt_key_id(self.jwt_key)

    @property
    def not_before(self) -> datetime:
        """Start of the signing certificate's validity, UTC."""
        return self.certificate.not_valid_before_utc

    @property
    def not_after(self) -> datetime:
        """End of the signing certificate's validity, UTC."""
        return self.certificate.not_valid_after_utc

    @property
    def published(self) -> bool:
        """True while its anchor is in the bundle."""
        return self.state in _PUBLISHED


@dataclass(frozen=True)
class _Root:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)


class CertificateAuthority:
    """The certificate authority of one trust domain.

    `ttl` is the life of a signing certificate and `svid_ttl` the usual life of an SVID (seconds or
    `timedelta`). With `upstream`, each authority is an intermediate below a root of its own, so that
    workloads send chains of two certificates. `clock` says what time it is; tests pass their own.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        trust_domain: TrustDomain | str,
        *,
        ttl: Duration = timedelta(days=1),
        svid_ttl: Duration = timedelta(hours=1),
        upstream: bool = False,
        clock: Clock = lambda: datetime.now(UTC),
    ) -> None:
        self.trust_domain = TrustDomain.parse(trust_domain) if isinstance(trust_domain, str) else trust_domain
        self.ttl = _timedelta(ttl)
        self.svid_ttl = _timedelta(svid_ttl)
        self.upstream = upstream
        self.clock = clock
        self._lock = threading.RLock()
        self._listeners: list[Callable[[], None]] = []
        self._root: _Root | None = None
        self._authorities: list[Authority] = []
        first = self._new_authority(self.ttl, new_root=True)
        first.state = AuthorityState.ACTIVE
        self._authorities.append(first)

    def __repr__(self) -> str:
        return f"<CertificateAuthority {self.trust_domain} authorities={len(self.authorities)}>"

    # -- What relying parties see -------------------------------------------------------------------

    @property
    def authorities(self) -> tuple[Authority, ...]:
        """The published authorities, oldest first."""
        with self._lock:
            return tuple(a for a in self._authorities if a.published)

    @property
    def active(self) -> Authority:
        """The authority that signs."""
        with self._lock:
            return next(a for a in self._authorities if a.state is AuthorityState.ACTIVE)

    @property
    def prepared(self) -> Authority | None:
        """The authority that `activate` would make the signing one."""
        with self._lock:
            return next((a for a in self._authorities if a.state is AuthorityState.PREPARED), None)

    @property
    def bundle(self) -> X509Bundle:
        """The X.509 authorities published now, each once (Trust Domain and Bundle, section 3)."""
        anchors: list[x509.Certificate] = []
        for authority in self.authorities:
            if authority.anchor not in anchors:
                anchors.append(authority.anchor)
        return X509Bundle(self.trust_domain, tuple(anchors))

    def jwt_bundle(self) -> bytes:
        """The JWT authorities published now, as a JWKS document (RFC 7517), in SPIRE's form: no ``use``."""
        from .jose import jwks, public_jwk

        keys = [key for a in self.authorities for key in (*a.former_jwt_keys, a.jwt_key)]
        return jwks(*(public_jwk(key, _jwt_key_id(key)) for key in keys))

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback()` after each change of the bundle, in the thread that made it.

        Returns a function that ends the subscription.
        """
        with self._lock:
            self._listeners.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._listeners:
                    self._listeners.remove(callback)

        return unsubscribe

    # -- Rotation -----------------------------------------------------------------------------------

    def prepare(self, *, ttl: Duration | None = None, new_root: bool = True) -> Authority:
        """Publish a new authority beside the present ones; it does not sign yet.

        With `upstream`, ``new_root=False`` makes only a new intermediate below the same root: the bundle
        stays as it is. Raises `AuthorityError` when one is prepared already.
        """
        with self._lock:
            if self.prepared is not None:
                raise AuthorityError("an authority is prepared already: activate or revoke it first")
            authority = self._new_authority(self.ttl if ttl is None else _timedelta(ttl), new_root=new_root)
            self._authorities.append(authority)
        self._notify()
        return authority

    def activate(self) -> Authority:
        """Sign with the prepared authority from now on; the one before stays in the bundle.

        Raises `AuthorityError` when none is prepared.
        """
        with self._lock:
            prepared = self.prepared
            if prepared is None:
                raise AuthorityError("no authority is prepared: call prepare() first")
            self.active.state = AuthorityState.OLD
            prepared.state = AuthorityState.ACTIVE
        self._notify()
        return prepared

    def retire(self, authority: Authority | None = None) -> Authority:
        """Take `authority`, or else the oldest one that no longer signs, out of the bundle.

        What it signed is not trusted any more, so wait until `Authority.latest_expiry` has passed, unless
        that is what you want to test. Raises `AuthorityError` when there is no such authority.
        """
        with self._lock:
            old = [a for a in self._authorities if a.state is AuthorityState.OLD]
            if authority is None:
                if not old:
                    raise AuthorityError("no authority to retire: activate() another one first")
                authority = old[0]
            elif authority not in old:
                raise AuthorityError(f"authority is {authority.state}, only an old one can be retired")
            authority.state = AuthorityState.RETIRED
            self._authorities.remove(authority)
        self._notify()
        return authority

    def revoke(self, authority: Authority | None = None) -> Authority:
        """Distrust `authority` (default: the signing one) at once; returns the authority that signs now.

        Its anchor leaves the bundle, with every authority below the same anchor. If that includes the
        signing one, the prepared authority signs from now on, or a new one if none was prepared.
        """
        with self._lock:
            target = self.active if authority is None else authority
            if target not in self._authorities:
                raise AuthorityError(f"authority is {target.state} already")
            for each in [a for a in self._authorities if a.anchor == target.anchor]:
                each.state = AuthorityState.REVOKED
                self._authorities.remove(each)
            if self._root is not None and self._root.certificate == target.anchor:
                self._root = None
            if not any(a.state is AuthorityState.ACTIVE for a in self._authorities):
                successor = self.prepared
                if successor is None:
                    successor = self._new_authority(self.ttl, new_root=True)
                    self._authorities.append(successor)
                successor.state = AuthorityState.ACTIVE
            signing = self.active
        self._notify()
        return signing

    def rotate_jwt_key(self) -> str:
        """Sign JWT-SVIDs with a new key from now on; returns its ``kid``. X.509 stays as it is.

        The key before it stays in the JWT bundle until `retire_jwt_keys`.
        """
        with self._lock:
            authority = self.active
            authority.former_jwt_keys.append(authority.jwt_key)
            authority.jwt_key = new_key()
        self._notify()
        return authority.jwt_key_id

    def retire_jwt_keys(self) -> None:
        """Take the keys that `rotate_jwt_key` replaced out of the JWT bundle: what they signed is refused."""
        with self._lock:
            for authority in self._authorities:
                authority.former_jwt_keys.clear()
        self._notify()

    def subordinate(
        self,
        *,
        issuer: Authority | None = None,
        ttl: Duration | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        uris: Sequence[str | bytes] | None = None,
        basic_constraints: x509.BasicConstraints | None = SUBORDINATE_BASIC_CONSTRAINTS,
        key_usage: x509.KeyUsage | Iterable[str] | None = SIGNING_KEY_USAGE,
        extra_extensions: Iterable[x509.Extension[x509.ExtensionType]] = (),
    ) -> Authority:
        """Sign an intermediate below `issuer` (default: the signing authority), for ``issue(authority=…)``.

        It is not part of the rotation and appears in no bundle. Overrides make intermediates that path
        validation must refuse: not a CA, no keyCertSign, a path that is too long, an expired one.
        """
        with self._lock:
            issuer = issuer or self.active
            key = new_key()
            start, end = self._validity(self.ttl if ttl is None else _timedelta(ttl), not_before, not_after)
            if not_after is None:
                end = min(end, issuer.not_after)
            certificate = _sign(
                subject=_authority_name(self.trust_domain, key),
                public_key=key.public_key(),
                issuer=issuer.certificate,
                issuer_key=issuer.key,
                validity=(start, end),
                uris=[str(self.trust_domain.id)] if uris is None else uris,
                basic_constraints=basic_constraints,
                key_usage=key_usage,
                extra_extensions=extra_extensions,
            )
            _extend_expiry(issuer, end)
        return Authority(certificate, key, issuer.anchor, self.clock(), (certificate, *issuer.intermediates))

    # -- Issuing ------------------------------------------------------------------------------------

    def issue(
        self,
        spiffe_id: SpiffeId | str,
        *,
        ttl: Duration | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        hint: str = "",
        key: PrivateKey | None = None,
        dns_names: Sequence[str] = (),
        subject: x509.Name | None = None,
        authority: Authority | None = None,
        uris: Sequence[str | bytes] | None = None,
        is_ca: bool = False,
        basic_constraints: x509.BasicConstraints | None = LEAF_BASIC_CONSTRAINTS,
        key_usage: x509.KeyUsage | Iterable[str] | None = LEAF_KEY_USAGE,
        extended_key_usage: Sequence[x509.ObjectIdentifier] | None = LEAF_EXTENDED_KEY_USAGE,
        extra_extensions: Iterable[x509.Extension[x509.ExtensionType]] = (),
        serial_number: int | None = None,
    ) -> X509Svid:
        """Sign an SVID for `spiffe_id` with a new ECDSA P-256 key, valid from ten seconds ago for `ttl`.

        The end of its validity is cut to the authority's own, unless `not_after` is given. Any SPIFFE ID
        may be asked for, also one of another trust domain or one without a path: refusing those is what
        the verifier under test is for.

        The other arguments shape the certificate, also into one that must be refused:

        - `uris`: the URI SANs as they stand, in place of `spiffe_id`; none, several, another scheme, any
          ASCII text. `bytes` are put in unchecked, for text that no encoder would let through.
        - `is_ca`, `basic_constraints` (None leaves the extension out).
        - `key_usage`: names as in `x509.KeyUsage`, e.g. ``{"digital_signature", "key_cert_sign"}``; None
          leaves it out. `extended_key_usage`: likewise.
        - `subject`: an empty `x509.Name` makes the SAN critical, as RFC 5280 section 4.2.1.6 says.
        - `key`: use this private key. `authority`: sign with this one, e.g. a retired one or one made by
          `subordinate`.

        The result's `id` is `spiffe_id`, whatever the certificate says. Raises `AuthorityError` when the
        signing authority has expired, and `ids.InvalidSpiffeId` for a `spiffe_id` that is none.
        """
        wanted = SpiffeId.parse(spiffe_id) if isinstance(spiffe_id, str) else spiffe_id
        private_key = new_key() if key is None else key
        with self._lock:
            signer = authority or self.active
            start, end = self._validity(
                self.svid_ttl if ttl is None else _timedelta(ttl), not_before, not_after
            )
            if not_after is None:
                end = min(end, signer.not_after)
                if not_before is None and signer.not_after <= self.clock():
                    raise AuthorityError(
                        f"the signing authority expired at {signer.not_after:%Y-%m-%dT%H:%M:%SZ}: "
                        "prepare() and activate() a new one"
                    )
            leaf = _sign(
                subject=_leaf_name(wanted) if subject is None else subject,
                public_key=private_key.public_key(),
                issuer=signer.certificate,
                issuer_key=signer.key,
                validity=(start, end),
                uris=[str(wanted)] if uris is None else uris,
                dns_names=dns_names,
                basic_constraints=x509.BasicConstraints(ca=True, path_length=None)
                if is_ca
                else basic_constraints,
                key_usage=key_usage,
                extended_key_usage=extended_key_usage,
                extra_extensions=extra_extensions,
                serial_number=serial_number,
            )
            _extend_expiry(signer, end)
        return X509Svid(wanted, (leaf, *signer.intermediates), private_key, hint)

    def issue_jwt(
        self,
        spiffe_id: SpiffeId | str,
        audience: Iterable[str],
        *,
        ttl: Duration = 300.0,
        header: Mapping[str, Any] | None = None,
        claims: Mapping[str, Any] | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> str:
        """Sign a JWT-SVID (JWT-SVID section 3): ES256, with ``sub``, ``aud``, ``exp`` and ``iat``.

        It expires no later than the signing authority. `header` and `claims` are added, and shape the token
        into one that must be refused too: None leaves a member out. `key` signs in place of the authority's.
        Other algorithms: `ztmtls.testing.jose.sign_jwt`.
        """
        from .jose import sign_jwt

        now = self.clock()
        with self._lock:
            authority = self.active
            end = min(now + _timedelta(ttl), authority.not_after)
            _extend_expiry(authority, end)
        return sign_jwt(
            _without_none({"alg": "ES256", "kid": authority.jwt_key_id, "typ": "JWT", **(header or {})}),
            _without_none(
                {
                    "sub": str(spiffe_id),
                    "aud": list(audience),
                    "iat": int(now.timestamp()),
                    "exp": math.ceil(end.timestamp()),
                    **(claims or {}),
                }
            ),
            key or authority.jwt_key,
            algorithm="ES256",
        )

    def context(
        self,
        *svids: X509Svid,
        federates_with: Iterable[CertificateAuthority | X509Bundle] = (),
        generation: int = 1,
    ) -> X509Context:
        """The `X509Context` of a workload that holds `svids` and this trust domain's bundle.

        `federates_with` adds the bundles of other trust domains.
        """
        bundles: dict[TrustDomain, X509Bundle] = {self.trust_domain: self.bundle}
        for other in federates_with:
            bundle = other.bundle if isinstance(other, CertificateAuthority) else other
            bundles[bundle.trust_domain] = bundle
        return X509Context(generation, svids, bundles, self.clock())

    # -- Inside -------------------------------------------------------------------------------------

    def _validity(
        self, ttl: timedelta, not_before: datetime | None, not_after: datetime | None
    ) -> tuple[datetime, datetime]:
        """Whole seconds, the unit of X.509; the end is rounded up so that a short life isn't cut to none."""
        now = self.clock()
        start = now - BACKDATE if not_before is None else not_before
        end = now + ttl if not_after is None else not_after
        if not_after is None and end.microsecond:
            end += timedelta(seconds=1)
        return start.replace(microsecond=0), end.replace(microsecond=0)

    def _new_authority(self, ttl: timedelta, *, new_root: bool) -> Authority:
        uris = [str(self.trust_domain.id)]
        validity = self._validity(ttl, None, None)
        key = new_key()
        if not self.upstream:
            certificate = _sign(
                subject=_authority_name(self.trust_domain, key),
                public_key=key.public_key(),
                issuer=None,
                issuer_key=key,
                validity=validity,
                uris=uris,
                basic_constraints=x509.BasicConstraints(ca=True, path_length=None),
                key_usage=SIGNING_KEY_USAGE,
            )
            return Authority(certificate, key, certificate, self.clock())
        if self._root is None or new_root:
            root_key = new_key()
            root = _sign(
                subject=_authority_name(self.trust_domain, root_key),
                public_key=root_key.public_key(),
                issuer=None,
                issuer_key=root_key,
                # Outlives the intermediates that may still be made below it.
                validity=(validity[0], validity[1] + 10 * ttl),
                uris=uris,
                basic_constraints=x509.BasicConstraints(ca=True, path_length=None),
                key_usage=SIGNING_KEY_USAGE,
            )
            self._root = _Root(root, root_key)
        certificate = _sign(
            subject=_authority_name(self.trust_domain, key),
            public_key=key.public_key(),
            issuer=self._root.certificate,
            issuer_key=self._root.key,
            validity=(validity[0], min(validity[1], self._root.certificate.not_valid_after_utc)),
            uris=uris,
            basic_constraints=x509.BasicConstraints(ca=True, path_length=None),
            key_usage=SIGNING_KEY_USAGE,
        )
        return Authority(certificate, key, self._root.certificate, self.clock(), (certificate,))

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new ECDSA P-256 private key."""
    return ec.generate_private_key(ec.SECP256R1())


def with_other_key(svid: X509Svid) -> X509Svid:
    """The same chain with a private key that doesn't belong to it."""
    return replace(svid, key=new_key())


def with_broken_signature(svid: X509Svid) -> X509Svid:
    """The same SVID with the last bit of its leaf flipped: the signature no longer fits."""
    der = bytearray(svid.leaf.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return replace(svid, chain=(x509.load_der_x509_certificate(bytes(der)), *svid.chain[1:]))


def _sign(
    *,
    subject: x509.Name,
    public_key: Any,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    validity: tuple[datetime, datetime],
    uris: Sequence[str | bytes],
    dns_names: Sequence[str] = (),
    basic_constraints: x509.BasicConstraints | None,
    key_usage: x509.KeyUsage | Iterable[str] | None,
    extended_key_usage: Sequence[x509.ObjectIdentifier] | None = None,
    extra_extensions: Iterable[x509.Extension[x509.ExtensionType]] = (),
    serial_number: int | None = None,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number() if serial_number is None else serial_number)
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
    )
    if key_usage is not None:
        builder = builder.add_extension(_key_usage(key_usage), critical=True)
    if extended_key_usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended_key_usage), critical=False)
    if basic_constraints is not None:
        builder = builder.add_extension(basic_constraints, critical=True)
    builder = builder.add_extension(_key_identifier(public_key), critical=False)
    if issuer is not None:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    names = _subject_alternative_name(uris, dns_names)
    if names is not None:
        builder = builder.add_extension(names, critical=not subject.rdns)
    for extension in extra_extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(issuer_key, hashes.SHA256())


def _subject_alternative_name(
    uris: Sequence[str | bytes], dns_names: Sequence[str]
) -> x509.ExtensionType | None:
    if not uris and not dns_names:
        return None
    if all(isinstance(uri, str) for uri in uris):
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns_names]
        names += [x509.UniformResourceIdentifier(uri) for uri in uris if isinstance(uri, str)]
        return x509.SubjectAlternativeName(names)
    # GeneralNames by hand (RFC 5280 section 4.2.1.6): [2] dNSName, [6] uniformResourceIdentifier.
    body = b"".join(_tlv(0x82, name.encode()) for name in dns_names)
    body += b"".join(_tlv(0x86, uri.encode() if isinstance(uri, str) else uri) for uri in uris)
    return x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, _tlv(0x30, body))


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + value


def _key_usage(usage: x509.KeyUsage | Iterable[str]) -> x509.KeyUsage:
    if isinstance(usage, x509.KeyUsage):
        return usage
    wanted = set(usage)
    unknown = wanted.difference(_KEY_USAGES)
    if unknown:
        raise ValueError(f"unknown key usage: {', '.join(sorted(unknown))}")
    bits: Mapping[str, bool] = {name: name in wanted for name in _KEY_USAGES}
    return x509.KeyUsage(**bits)


def _key_identifier(public_key: Any) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(public_key)


def _authority_name(trust_domain: TrustDomain, key: ec.EllipticCurvePrivateKey) -> x509.Name:
    """A name of its own per key, so that a path has one possible issuer."""
    return x509.Name(
        [
            # X.520 limits an organization name to 64 characters; a trust domain may have 255.
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain.name[:64]),
            x509.NameAttribute(
                NameOID.COMMON_NAME, f"authority {_key_identifier(key.public_key()).digest.hex()[:16]}"
            ),
        ]
    )


def _leaf_name(spiffe_id: SpiffeId) -> x509.Name:
    # The SPIFFE ID stands in the SAN only: nothing may read an identity from the subject.
    unique = hashlib.sha256(str(spiffe_id).encode()).hexdigest()[:32]
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ztmtls.testing"),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, unique),
        ]
    )


def _jwt_key_id(key: ec.EllipticCurvePrivateKey) -> str:
    return _key_identifier(key.public_key()).digest.hex()[:32]


def _without_none(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _extend_expiry(authority: Authority, moment: datetime) -> None:
    if authority.latest_expiry is None or moment > authority.latest_expiry:
        authority.latest_expiry = moment


def _timedelta(duration: Duration) -> timedelta:
    return duration if isinstance(duration, timedelta) else timedelta(seconds=duration)
