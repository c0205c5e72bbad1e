"""Certificates that no builder makes: changed by hand, then signed again by their authority."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from ztmtls.testing import CertificateAuthority

_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")


def resigned(ca: CertificateAuthority, leaf: x509.Certificate, old: bytes, new: bytes) -> bytes:
    """The DER of `leaf` with its first `old` replaced by `new`, of the same length, and a good signature."""
    assert len(old) == len(new)
    assert old in leaf.tbs_certificate_bytes
    body = leaf.tbs_certificate_bytes.replace(old, new, 1)
    key = ca.active.key
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signature = key.sign(body, ec.ECDSA(hashes.SHA256()))
    return _der(0x30, body + _ECDSA_WITH_SHA256 + _der(0x03, b"\0" + signature))


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    octets = b"" if size < 0x80 else size.to_bytes(2, "big")
    return bytes([tag, 0x80 | len(octets) if octets else size]) + octets + content
