"""What the standards say, written down a second time and in another way than the library does it.

Nothing of the library's own logic is used here: a mistake would have to be made twice to go unseen.
"""

from __future__ import annotations

import os
import ssl
import string
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import crypto

from ztmtls.authz import Rule

_DOMAIN_CHARACTERS = frozenset(string.ascii_lowercase + string.digits + ".-_")
_PATH_CHARACTERS = frozenset(string.ascii_letters + string.digits + ".-_")


def is_trust_domain(name: str) -> bool:
    """SPIFFE-ID 2.1: not empty, at most 255 bytes, lower-case letters, digits, dots, dashes, underscores."""
    return 1 <= len(name.encode("utf-8", "surrogatepass")) <= 255 and set(name) <= _DOMAIN_CHARACTERS


def is_spiffe_id(text: str) -> bool:
    """SPIFFE-ID 2 to 2.3: scheme, trust domain, path without empty or relative segments, 2048 bytes."""
    pieces = text.split("/")
    if len(text.encode("utf-8", "surrogatepass")) > 2048 or pieces[:2] != ["spiffe:", ""] or len(pieces) < 3:
        return False
    domain, *segments = pieces[2:]
    return is_trust_domain(domain) and all(
        segment not in ("", ".", "..") and set(segment) <= _PATH_CHARACTERS for segment in segments
    )


def policy_allows(rules: Iterable[Rule], caller: str, method: str, path: str) -> bool:
    """Every rule and every template, one after the other."""
    return any(
        _fits(template, path)
        for rule in rules
        if caller in [str(each) for each in rule.callers] and method in rule.methods
        for template in rule.paths
    )


def _fits(template: str, path: str) -> bool:
    wanted, got = template.split("/"), path.split("/")
    if len(wanted) != len(got):
        return False
    for want, have in zip(wanted, got, strict=True):
        if want.startswith("{"):
            if not have:
                return False
        elif want != have:
            return False
    return True


def readings(raw: bytes) -> set[tuple[str, ...]]:
    """The segments of a request path as different programs read it: all of them do it in the wild."""
    text = raw.decode("latin-1")
    once = unquote(text, "latin-1")
    twice = unquote(once, "latin-1")
    split_first = tuple(unquote(segment, "latin-1") for segment in text.split("/"))
    return {
        tuple(once.split("/")),
        tuple(twice.split("/")),
        split_first,
        tuple(once.replace("\\", "/").split("/")),
        tuple(text.split("#")[0].split("/")) if "#" in text else split_first,
        tuple(segment.split(";")[0] for segment in split_first) if ";" in text else split_first,
        tuple(once.split("\0")[0].split("/")),
        tuple(_resolved(once.split("/"))),
        tuple(_resolved(twice.split("/"))),
    }


def _resolved(segments: Sequence[str]) -> list[str]:
    """RFC 3986 section 5.2.4, and empty segments merged; a slash at the end stays."""
    found: list[str] = [segments[0]]
    for number, segment in enumerate(segments[1:], 1):
        last = number == len(segments) - 1
        if segment == "..":
            found = found[:1] + found[1:-1]
        elif segment != "." and (segment or last):
            found.append(segment)
    return found


def openssl_accepts(
    chain: Sequence[x509.Certificate], authorities: Iterable[x509.Certificate], now: datetime
) -> bool:
    """Whether OpenSSL finds a valid path to one of `authorities`, each of which is a trust anchor."""
    store = crypto.X509Store()
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    store.set_time(now.replace(tzinfo=None))
    for authority in authorities:
        store.add_cert(crypto.X509.from_cryptography(authority))
    leaf, *others = (crypto.X509.from_cryptography(certificate) for certificate in chain)
    try:
        crypto.X509StoreContext(store, leaf, others).verify_certificate()
    except crypto.X509StoreContextError:
        return False
    return True


def readable_by_openssl(certificate: x509.Certificate) -> bool:
    """Whether OpenSSL can decode it: what it can't decode ends a handshake at once."""
    try:
        crypto.X509.from_cryptography(certificate)
    except crypto.Error:
        return False
    return True


def uris_by_openssl(certificate: x509.Certificate) -> list[str]:
    """The URI SANs as OpenSSL reads them."""
    fd = os.memfd_create("certificate")
    with os.fdopen(fd, "wb") as file:
        file.write(ssl.DER_cert_to_PEM_cert(certificate.public_bytes(Encoding.DER)).encode())
        file.flush()
        decoded: dict[str, Any] = ssl._ssl._test_decode_cert(f"/proc/self/fd/{fd}")  # type: ignore[attr-defined]
    return [value for kind, value in decoded.get("subjectAltName", ()) if kind == "URI"]
