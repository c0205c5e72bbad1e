"""SPIFFE IDs and trust domains (SPIFFE-ID, sections 2 to 2.5).

Parsing is strict and never repairs: what arrives in a certificate either is a SPIFFE ID, character
for character, or is refused. Upper case in the scheme or the trust domain is refused too, so that two
equal IDs are always equal strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .reasons import Reason, Refusal, printable

SCHEME = "spiffe://"
MAX_ID_BYTES = 2048
MAX_TRUST_DOMAIN_BYTES = 255

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")


class InvalidSpiffeId(Refusal, ValueError):
    """The text is not a SPIFFE ID, or not a trust domain name. Reason: `invalid_spiffe_id`."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.INVALID_SPIFFE_ID, detail)


@dataclass(frozen=True, slots=True, order=True)
class TrustDomain:
    """A trust domain by its name, for example ``zt.example`` (SPIFFE-ID section 2.1)."""

    name: str

    def __post_init__(self) -> None:
        if len(self.name) > MAX_TRUST_DOMAIN_BYTES:
            raise InvalidSpiffeId(f"trust domain is longer than {MAX_TRUST_DOMAIN_BYTES} bytes")
        if not _TRUST_DOMAIN.fullmatch(self.name):
            raise InvalidSpiffeId(
                f"trust domain '{printable(self.name)}' may hold only a-z, 0-9, '.', '-' and '_', "
                "and must not be empty"
            )

    @classmethod
    def parse(cls, text: str) -> TrustDomain:
        """Read a name (``zt.example``) or the ID of the domain itself (``spiffe://zt.example``)."""
        if not text.startswith(SCHEME):
            return cls(text)
        identity = SpiffeId.parse(text)
        if not identity.is_root:
            raise InvalidSpiffeId(f"'{identity}' names a workload, not a trust domain")
        return identity.trust_domain

    @property
    def id(self) -> SpiffeId:
        """The ID of the trust domain itself: no path. It never names a workload."""
        return SpiffeId(self, "")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """One SPIFFE ID. `path` is ``""`` for the trust domain itself, else ``/segment[/segment…]``."""

    trust_domain: TrustDomain
    path: str

    def __post_init__(self) -> None:
        if self.path:
            if self.path[0] != "/":
                raise InvalidSpiffeId(f"path '{printable(self.path)}' must begin with '/'")
            for segment in self.path[1:].split("/"):
                _check_segment(segment)
        if len(SCHEME) + len(self.trust_domain.name) + len(self.path) > MAX_ID_BYTES:
            raise InvalidSpiffeId(f"SPIFFE ID is longer than {MAX_ID_BYTES} bytes")

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Parse `text`, or raise `InvalidSpiffeId` saying which rule it breaks."""
        if not text.startswith(SCHEME):
            raise InvalidSpiffeId(f"'{printable(text)}' does not begin with '{SCHEME}'")
        if len(text) > MAX_ID_BYTES:
            raise InvalidSpiffeId(f"SPIFFE ID is longer than {MAX_ID_BYTES} bytes")
        domain, slash, path = text[len(SCHEME) :].partition("/")
        return cls(TrustDomain(domain), slash + path)

    @property
    def is_root(self) -> bool:
        """True for the ID of a trust domain, which no workload may present (X509-SVID 3.1)."""
        return not self.path

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain.name}{self.path}"


def _check_segment(segment: str) -> None:
    if not segment:
        raise InvalidSpiffeId("path holds an empty segment or ends in '/'")
    if segment in (".", ".."):
        raise InvalidSpiffeId(f"path segment '{segment}' is not allowed")
    if not _SEGMENT.fullmatch(segment):
        raise InvalidSpiffeId(
            f"path segment '{printable(segment)}' may hold only letters, digits, '.', '-' and '_'"
        )
