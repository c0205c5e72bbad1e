"""Giant and malicious inputs that are no requests: chains, bundles, updates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.mtls.conftest import until
from ztmtls.reasons import Reason
from ztmtls.source import SourceState, X509Source
from ztmtls.svid import MAX_BUNDLE, InvalidSvid, X509Bundle
from ztmtls.testing import CertificateAuthority, WorkloadApi, new_key
from ztmtls.verify import PeerRefused, verify_peer

OURS = "spiffe://zt.example/ours"
DEADLINE = 30.0
# Of this thread's own time, whatever else the machine does. Most take milliseconds, more under a coverage
# tracer. What is not bounded takes for ever.
SECONDS = 20.0


def quickly(action: Callable[[], object]) -> None:
    began = time.thread_time()
    action()
    assert time.thread_time() - began < SECONDS


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, *, ca: bool
) -> x509.Certificate:
    """One of a family whose members all have the same name."""
    now, subject = datetime.now(UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if not ca:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(OURS)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256())


def test_certificates_that_all_sign_each_other_cost_little() -> None:
    """Any path through them is as good as any other: 15 to the power of 15 of them, and none ends well."""
    ca, key = CertificateAuthority("zt.example"), new_key()
    good = ca.issue(OURS)
    maze = [certificate("maze", key, key, ca=True) for _ in range(15)]
    leaf = certificate("maze", new_key(), key, ca=False)
    bundles, now = {ca.trust_domain: ca.bundle}, datetime.now(UTC)
    assert verify_peer([good.leaf, *maze], bundles, now).id == good.id

    def refused() -> None:
        with pytest.raises(PeerRefused) as caught:
            verify_peer([leaf, *maze], bundles, now)
        assert caught.value.reason is Reason.UNTRUSTED_AUTHORITY

    quickly(refused)


def test_largest_bundle_of_authorities_with_one_name_serves_each_of_them() -> None:
    keys = [new_key() for _ in range(MAX_BUNDLE)]
    authorities = tuple(certificate("same", key, key, ca=True) for key in keys)
    domain = CertificateAuthority("zt.example").trust_domain
    bundle = X509Bundle.from_der(domain, X509Bundle(domain, authorities).der())
    assert len(bundle.authorities) == MAX_BUNDLE
    for key in (keys[0], keys[len(keys) // 2], keys[-1]):
        leaf = certificate("same", new_key(), key, ca=False)
        quickly(lambda leaf=leaf: verify_peer([leaf], {domain: bundle}, datetime.now(UTC)))

    with pytest.raises(InvalidSvid) as caught:
        X509Bundle.from_der(domain, bundle.der() + bundle.authorities[0].public_bytes(Encoding.DER))
    assert caught.value.reason is Reason.CHAIN_TOO_LONG


async def test_giant_updates_are_discarded_and_the_next_good_one_is_taken() -> None:
    ca = CertificateAuthority("zt.example")
    one = ca.bundle.der()
    too_many = one * (MAX_BUNDLE + 1)
    # gRPC itself ends the stream over a message as large as this one.
    too_long = one * ((17 << 20) // len(one))
    async with WorkloadApi() as api:
        workload = await api.add_workload("ours", OURS, ca=ca)
        workload.allow(pid=os.getpid())
        async with X509Source(workload.endpoint) as source:
            await source.ready(DEADLINE)
            for giant in (too_many, too_long):
                before, failures = source.context, source.status().failures
                workload.push(bundle=giant)
                await until(lambda seen=failures: source.status().failures > seen, DEADLINE)
                assert source.context is before
                assert source.state is SourceState.DEGRADED

                good = workload.rotate()

                await until(lambda serial=good.serial: source.context.svid.serial == serial, DEADLINE)
                assert source.state is SourceState.SERVING
