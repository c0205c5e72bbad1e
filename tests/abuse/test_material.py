"""Giant and malicious inputs that are no requests: chains, bundles, updates, policies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.mtls.conftest import until
from ztmtls.authz import MAX_POLICY_BYTES, MAX_POLICY_ENTRIES, Policy, PolicyError, PolicyFile, load_policy
from ztmtls.reasons import Reason
from ztmtls.source import SourceState, X509Source
from ztmtls.svid import MAX_BUNDLE, InvalidSvid, X509Bundle
from ztmtls.testing import CertificateAuthority, WorkloadApi, new_key
from ztmtls.verify import PeerRefused, verify_peer

OURS = "spiffe://zt.example/ours"
DEADLINE = 30.0
# Of this thread's own time, whatever else the machine does. Most take milliseconds, a policy a second or two,
# all more under a coverage tracer. What is not bounded takes for ever.
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


# --- policies -----------------------------------------------------------------------------------------

RULE = "  - {{name: r{0}, callers: ['spiffe://zt.example/c{0}'], methods: [GET], paths: [/p{0}]}}\n"
GOOD = "version: 1\nrules:\n" + RULE.format(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.yaml"


def test_largest_policy_file_is_read_and_a_larger_one_is_not(path: Path) -> None:
    text = "version: 1\nrules:\n"
    count = 0
    while len(text) + 100 < MAX_POLICY_BYTES:
        text += RULE.format(count)
        count += 1
    path.write_text(text.ljust(MAX_POLICY_BYTES - 1) + "\n")
    quickly(lambda: load_policy(path))
    assert len(load_policy(path).rules) == count

    path.write_text(text.ljust(MAX_POLICY_BYTES) + "\n")
    refused(path, "is longer than")


def refused(path: Path, why: str) -> None:
    def refuse() -> None:
        with pytest.raises(PolicyError, match=why) as caught:
            load_policy(path)
        assert len(caught.value.detail) < 10_000

    quickly(refuse)


def test_policy_without_an_end_is_not_read_to_its_end() -> None:
    refused(Path("/dev/zero"), "is longer than")


def lists(callers: int, methods: int, paths: int) -> str:
    """Three anchors, for rules made of aliases."""
    names = ["GET", "PUT", "POST", "HEAD"][:methods]
    return (
        f"  - {{name: all, callers: &c {[f'spiffe://a/{i}' for i in range(callers)]}, "
        f"methods: &m {names}, paths: &p {[f'/p{i}' for i in range(paths)]}}}\n"
    )


@pytest.mark.parametrize(
    ("more", "callers", "methods", "paths"),
    [(0, 500, 4, 51), (2000, 51, 1, 1), (2000, 1, 1, 51), (0, 317, 1, 317)],
)
def test_aliases_that_multiply_are_refused(
    path: Path, more: int, callers: int, methods: int, paths: int
) -> None:
    assert (more + 1) * callers * methods * paths > MAX_POLICY_ENTRIES
    again = "".join(f"  - {{name: r{i}, callers: *c, methods: *m, paths: *p}}\n" for i in range(more))
    path.write_text("version: 1\nrules:\n" + lists(3, 2, 3) + again[:100].split("\n")[0] + "\n")
    assert load_policy(path).rules
    path.write_text("version: 1\nrules:\n" + lists(callers, methods, paths) + again)
    assert path.stat().st_size < MAX_POLICY_BYTES

    refused(path, "entries")


def test_as_many_entries_as_allowed_are_taken(path: Path) -> None:
    path.write_text("version: 1\nrules:\n" + lists(500, 4, MAX_POLICY_ENTRIES // 2000))
    quickly(lambda: load_policy(path))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{a: " * 30_000, "? " * 100_000, "- " * 100_000, "!!set " * 30_000, "&a [*a, *a]\n"],
    ids=["lists", "mappings", "keys", "items", "tags", "itself"],
)
def test_deep_yaml_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    refused(path, ".")


def test_many_faults_make_a_short_message(path: Path) -> None:
    path.write_text("version: 1\nrules:\n" + "- x\n" * 50_000)
    refused(path, "and 49980 more")
    with pytest.raises(PolicyError) as caught:
        Policy.parse({"version": 1, "rules": ["x"] * 20})
    assert "more" not in caught.value.detail


def test_giant_policy_never_replaces_a_good_one(path: Path) -> None:
    path.write_text(GOOD)
    file = PolicyFile(path)
    good = file.current
    path.write_text(GOOD.ljust(MAX_POLICY_BYTES + 1))
    assert not file.reload_if_changed()
    assert file.current is good
    assert file.last_error is not None
    path.write_text(GOOD + RULE.format(1))
    assert file.reload_if_changed()
    assert len(file.current.rules) == 2
