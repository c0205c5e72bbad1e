"""The certificate authority of `ztmtls.testing`: what it signs, how it rotates, what it can spoil."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ztmtls.ids import InvalidSpiffeId
from ztmtls.svid import X509Svid
from ztmtls.testing import (
    AuthorityError,
    AuthorityState,
    CertificateAuthority,
    RotationEvent,
    RotationStep,
    new_key,
    with_broken_signature,
    with_other_key,
)
from ztmtls.testing.rotation import Rotation
from ztmtls.verify import PeerRefused, verify_peer

WORKLOAD = "spiffe://zt.example/ns/zt-demo/sa/orders"
NOON = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)


@dataclass
class Clock:
    now: datetime = NOON

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=[False, True], ids=["self-signed", "upstream"])
def ca(request: pytest.FixtureRequest, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority("zt.example", upstream=request.param, clock=clock)


def verdict(ca: CertificateAuthority, svid: X509Svid, now: datetime = NOON) -> str:
    """``accepted``, or the reason why the library itself would refuse this as a peer."""
    try:
        verify_peer(svid.chain, {ca.trust_domain: ca.bundle}, now)
    except PeerRefused as refused:
        return str(refused.reason)
    return "accepted"


def extension(certificate: x509.Certificate, kind: Any) -> Any:
    return certificate.extensions.get_extension_for_class(kind)


# -- What it signs ----------------------------------------------------------------------------------


def test_leaf_is_what_the_standard_asks_for(ca: CertificateAuthority) -> None:
    svid = ca.issue(WORKLOAD, ttl=60, hint="internal")

    names = extension(svid.leaf, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [WORKLOAD]
    assert len(names) == 1
    usage = extension(svid.leaf, x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    assert not usage.value.crl_sign
    assert extension(svid.leaf, x509.BasicConstraints).value.ca is False
    assert [oid._name for oid in extension(svid.leaf, x509.ExtendedKeyUsage).value] == [
        "serverAuth",
        "clientAuth",
    ]
    assert isinstance(svid.key, ec.EllipticCurvePrivateKey)
    assert svid.key.curve.name == "secp256r1"
    assert svid.leaf.not_valid_before_utc == NOON - timedelta(seconds=10)
    assert svid.not_after == NOON + timedelta(seconds=60)
    assert svid.hint == "internal"
    assert X509Svid.from_der(svid.chain_der(), svid.key_der(), "internal") == svid


def test_signing_certificates_name_the_trust_domain_and_sign_only(ca: CertificateAuthority) -> None:
    active = ca.active
    for certificate in {active.certificate, active.anchor}:
        names = extension(certificate, x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://zt.example"]
        assert extension(certificate, x509.BasicConstraints).critical
        assert extension(certificate, x509.BasicConstraints).value.ca is True
        usage = extension(certificate, x509.KeyUsage)
        assert usage.critical
        assert usage.value.key_cert_sign
        assert not usage.value.digital_signature
        assert extension(certificate, x509.SubjectKeyIdentifier).value.digest


def test_chain_is_accepted_by_openssl_in_strict_mode(ca: CertificateAuthority, tmp_path: Path) -> None:
    svid = ca.issue(WORKLOAD)
    pem = {
        "leaf": svid.chain[:1],
        "rest": svid.chain[1:] or svid.chain[:1],
        "root": ca.bundle.authorities,
    }
    for name, certificates in pem.items():
        (tmp_path / name).write_bytes(b"".join(c.public_bytes(Encoding.PEM) for c in certificates))

    command = ["openssl", "verify", "-x509_strict", "-CAfile", "root", "-untrusted", "rest"]
    command += ["-attime", str(int(NOON.timestamp())), "leaf"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert result.stdout == "leaf: OK\n", result.stderr
    assert len(svid.chain) == (2 if ca.upstream else 1)


def test_validity_is_cut_to_the_authoritys_own(clock: Clock) -> None:
    ca = CertificateAuthority("zt.example", ttl=600, svid_ttl=60, clock=clock)
    clock.forward(580)

    assert ca.issue(WORKLOAD).not_after == ca.active.not_after
    assert ca.issue(WORKLOAD, not_after=NOON + timedelta(days=9)).not_after == NOON + timedelta(days=9)

    clock.forward(30)
    with pytest.raises(AuthorityError, match=r"expired at 2026-05-01T12:10:00Z"):
        ca.issue(WORKLOAD)


def test_short_life_is_not_rounded_to_none(clock: Clock) -> None:
    clock.now = NOON + timedelta(microseconds=999_999)
    ca = CertificateAuthority("zt.example", clock=clock)

    assert ca.issue(WORKLOAD, ttl=0.5).not_after >= clock.now + timedelta(seconds=0.5)


def test_issue_refuses_what_is_no_spiffe_id(ca: CertificateAuthority) -> None:
    with pytest.raises(InvalidSpiffeId):
        ca.issue("https://zt.example/orders")


def test_keys_do_not_show(ca: CertificateAuthority) -> None:
    for text in (repr(ca), repr(ca.active), repr(ca.issue(WORKLOAD))):
        assert "Key" not in text.replace("KeyUsage", "")


# -- What it can spoil ------------------------------------------------------------------------------

Issue = Callable[[CertificateAuthority], X509Svid]

HOUR = timedelta(hours=1)
OTHER_NAME = ["spiffe://zt.example/ns/zt-demo/sa/orders", "spiffe://zt.example/other"]
UNKNOWN_CRITICAL: x509.Extension[x509.ExtensionType] = x509.Extension(
    x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"),
    True,
    x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"),
)
NAME_CONSTRAINTS: x509.Extension[x509.ExtensionType] = x509.Extension(
    x509.NameConstraints.oid,
    True,
    x509.NameConstraints([x509.UniformResourceIdentifier("elsewhere.example")], None),
)

ACCEPTED: dict[str, Issue] = {
    "as it is": lambda ca: ca.issue(WORKLOAD),
    "with DNS names": lambda ca: ca.issue(WORKLOAD, dns_names=["a.example", "b.example"]),
    "empty subject": lambda ca: ca.issue(WORKLOAD, subject=x509.Name([])),
    "no basic constraints": lambda ca: ca.issue(WORKLOAD, basic_constraints=None),
    "no extended key usage": lambda ca: ca.issue(WORKLOAD, extended_key_usage=None),
    "more key usages": lambda ca: ca.issue(
        WORKLOAD, key_usage={"digital_signature", "key_encipherment", "key_agreement"}
    ),
    "intermediate": lambda ca: ca.issue(WORKLOAD, authority=ca.subordinate()),
}

REFUSED: dict[str, tuple[str, Issue]] = {
    "two URI SANs": ("multiple_uri_sans", lambda ca: ca.issue(WORKLOAD, uris=OTHER_NAME)),
    "no SAN": ("no_uri_san", lambda ca: ca.issue(WORKLOAD, uris=[])),
    "DNS SAN only": ("no_uri_san", lambda ca: ca.issue(WORKLOAD, uris=[], dns_names=["zt.example"])),
    "https URI": ("invalid_spiffe_id", lambda ca: ca.issue(WORKLOAD, uris=["https://zt.example/orders"])),
    "newline": ("invalid_spiffe_id", lambda ca: ca.issue(WORKLOAD, uris=[WORKLOAD + "\n"])),
    "NUL": ("invalid_spiffe_id", lambda ca: ca.issue(WORKLOAD, uris=[WORKLOAD + "\0.evil"])),
    "percent-encoded": ("invalid_spiffe_id", lambda ca: ca.issue(WORKLOAD, uris=["spiffe://zt.example/%61"])),
    "upper case": ("invalid_spiffe_id", lambda ca: ca.issue(WORKLOAD, uris=["spiffe://ZT.example/orders"])),
    "upper-case scheme": ("invalid_spiffe_id", lambda ca: ca.issue(WORKLOAD, uris=["SPIFFE://zt.example/a"])),
    "UTF-8": ("invalid_spiffe_id", lambda ca: ca.issue(WORKLOAD, uris=["spiffe://zt.example/é".encode()])),
    "not UTF-8": ("malformed_certificate", lambda ca: ca.issue(WORKLOAD, uris=[b"spiffe://zt.example/\xff"])),
    "root path": ("root_path_id", lambda ca: ca.issue("spiffe://zt.example")),
    "other domain": ("unknown_trust_domain", lambda ca: ca.issue("spiffe://other.example/orders")),
    "CA leaf": ("leaf_is_ca", lambda ca: ca.issue(WORKLOAD, is_ca=True)),
    "keyCertSign": (
        "leaf_can_sign_certificates",
        lambda ca: ca.issue(WORKLOAD, key_usage={"digital_signature", "key_cert_sign"}),
    ),
    "cRLSign": (
        "leaf_can_sign_crls",
        lambda ca: ca.issue(WORKLOAD, key_usage={"digital_signature", "crl_sign"}),
    ),
    "no digitalSignature": (
        "leaf_without_digital_signature",
        lambda ca: ca.issue(WORKLOAD, key_usage={"key_agreement"}),
    ),
    "no key usage": ("leaf_without_digital_signature", lambda ca: ca.issue(WORKLOAD, key_usage=None)),
    "expired": (
        "expired",
        lambda ca: ca.issue(WORKLOAD, not_before=NOON - 2 * HOUR, not_after=NOON - HOUR),
    ),
    "not yet valid": (
        "not_yet_valid",
        lambda ca: ca.issue(WORKLOAD, not_before=NOON + HOUR, not_after=NOON + 2 * HOUR),
    ),
    "unknown critical extension": (
        "untrusted_authority",
        lambda ca: ca.issue(WORKLOAD, extra_extensions=[UNKNOWN_CRITICAL]),
    ),
    "broken signature": ("untrusted_authority", lambda ca: with_broken_signature(ca.issue(WORKLOAD))),
    "other authority": (
        "untrusted_authority",
        lambda ca: CertificateAuthority("zt.example", clock=ca.clock).issue(WORKLOAD),
    ),
    "intermediate that is no CA": (
        "untrusted_authority",
        lambda ca: ca.issue(
            WORKLOAD, authority=ca.subordinate(basic_constraints=x509.BasicConstraints(False, None))
        ),
    ),
    "intermediate that can't sign": (
        "untrusted_authority",
        lambda ca: ca.issue(WORKLOAD, authority=ca.subordinate(key_usage={"digital_signature"})),
    ),
    "intermediate expired": (
        "expired",
        lambda ca: ca.issue(
            WORKLOAD,
            not_after=NOON + HOUR,
            authority=ca.subordinate(not_before=NOON - 2 * HOUR, not_after=NOON - HOUR),
        ),
    ),
    "path too long": (
        "untrusted_authority",
        lambda ca: ca.issue(WORKLOAD, authority=ca.subordinate(issuer=ca.subordinate())),
    ),
    "name constraints": (
        "untrusted_authority",
        lambda ca: ca.issue(WORKLOAD, authority=ca.subordinate(extra_extensions=[NAME_CONSTRAINTS])),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_acceptable_variants_are_accepted(ca: CertificateAuthority, name: str) -> None:
    assert verdict(ca, ACCEPTED[name](ca)) == "accepted"


@pytest.mark.parametrize("name", REFUSED)
def test_spoilt_svid_is_spoilt_in_just_that_way(ca: CertificateAuthority, name: str) -> None:
    assert verdict(ca, ca.issue(WORKLOAD)) == "accepted"
    reason, issue = REFUSED[name]

    assert verdict(ca, issue(ca)) == reason


def test_key_that_does_not_belong_to_the_leaf(ca: CertificateAuthority) -> None:
    svid = with_other_key(ca.issue(WORKLOAD))

    with pytest.raises(ValueError, match="does not belong"):
        X509Svid.from_der(svid.chain_der(), svid.key_der())


def test_own_key_and_serial_number_can_be_given(ca: CertificateAuthority) -> None:
    key = new_key()
    svid = ca.issue(WORKLOAD, key=key, serial_number=0xABC)

    assert svid.key is key
    assert svid.serial == "0abc"


def test_unknown_key_usage_is_an_error(ca: CertificateAuthority) -> None:
    with pytest.raises(ValueError, match="unknown key usage: signing"):
        ca.issue(WORKLOAD, key_usage={"signing"})


# -- Rotation of authorities ------------------------------------------------------------------------


def test_prepare_activate_retire_overlap(ca: CertificateAuthority) -> None:
    first = ca.active
    before = ca.issue(WORKLOAD)

    second = ca.prepare()
    assert ca.prepared is second
    assert len(ca.bundle.authorities) == 2
    assert verdict(ca, ca.issue(WORKLOAD, authority=first)) == "accepted"
    assert ca.active is first

    assert ca.activate() is second
    after = ca.issue(WORKLOAD)
    assert [verdict(ca, svid) for svid in (before, after)] == ["accepted", "accepted"]
    assert first.state is AuthorityState.OLD

    assert ca.retire() is first
    assert ca.authorities == (second,)
    assert [verdict(ca, svid) for svid in (before, after)] == ["untrusted_authority", "accepted"]


def test_new_intermediate_below_the_same_root_leaves_the_bundle_as_it_is(clock: Clock) -> None:
    ca = CertificateAuthority("zt.example", upstream=True, clock=clock)
    bundle, before = ca.bundle, ca.issue(WORKLOAD)

    ca.prepare(new_root=False)
    ca.activate()
    after = ca.issue(WORKLOAD)
    ca.retire()

    assert ca.bundle == bundle
    assert before.chain[1] != after.chain[1]
    assert [verdict(ca, svid) for svid in (before, after)] == ["accepted", "accepted"]


def test_steps_out_of_order_are_errors(ca: CertificateAuthority) -> None:
    with pytest.raises(AuthorityError, match="prepare"):
        ca.activate()
    with pytest.raises(AuthorityError, match="no authority to retire"):
        ca.retire()
    with pytest.raises(AuthorityError, match="only an old one"):
        ca.retire(ca.active)
    ca.prepare()
    with pytest.raises(AuthorityError, match="prepared already"):
        ca.prepare()


def test_revoking_the_signing_authority_replaces_it_at_once(ca: CertificateAuthority) -> None:
    first, before = ca.active, ca.issue(WORKLOAD)

    signing = ca.revoke()

    assert signing is ca.active
    assert signing is not first
    assert first.state is AuthorityState.REVOKED
    assert [verdict(ca, svid) for svid in (before, ca.issue(WORKLOAD))] == ["untrusted_authority", "accepted"]
    with pytest.raises(AuthorityError, match="revoked already"):
        ca.revoke(first)


def test_revoking_an_old_authority_leaves_the_signing_one(ca: CertificateAuthority) -> None:
    first = ca.active
    second = ca.prepare()
    ca.activate()

    assert ca.revoke(first) is second
    assert ca.authorities == (second,)


def test_prepared_authority_takes_over_when_the_signing_one_is_revoked(ca: CertificateAuthority) -> None:
    prepared = ca.prepare()

    assert ca.revoke() is prepared
    assert ca.prepared is None


def test_listeners_hear_each_change_until_they_leave(ca: CertificateAuthority) -> None:
    heard: list[int] = []
    leave = ca.subscribe(lambda: heard.append(len(ca.bundle.authorities)))

    ca.prepare()
    ca.activate()
    ca.retire()
    leave()
    leave()
    ca.revoke()

    assert heard == [2, 2, 1]


def test_may_be_used_from_many_threads(ca: CertificateAuthority) -> None:
    serials: list[str] = []

    def issue() -> None:
        serials.extend(ca.issue(WORKLOAD).serial for _ in range(20))

    threads = [threading.Thread(target=issue) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        ca.prepare()
        ca.activate()
        ca.retire()
    for thread in threads:
        thread.join()

    assert len(set(serials)) == 80


def test_jwt_svid_verifies_against_the_published_keys(clock: Clock) -> None:
    clock.now = datetime.now(UTC)
    ca = CertificateAuthority("zt.example", clock=clock)
    ca.prepare()
    token = ca.issue_jwt(WORKLOAD, ["payments"], ttl=60)

    keys = {key["kid"]: jwt.PyJWK(key) for key in json.loads(ca.jwt_bundle())["keys"]}
    assert len(keys) == 2
    kid = jwt.get_unverified_header(token)["kid"]
    claims = jwt.decode(token, keys[kid], algorithms=["ES256"], audience="payments")

    assert claims["sub"] == WORKLOAD
    assert claims["exp"] <= ca.active.not_after.timestamp()


# -- Keeping everything fresh -----------------------------------------------------------------------


@dataclass
class FakeWorkload:
    ca: CertificateAuthority
    name: str = "orders"
    redacted: bool = False
    pinned: bool = False
    broken: bool = False
    issued: list[X509Svid] = field(default_factory=list)
    issued_at: datetime = NOON

    def __post_init__(self) -> None:
        self.rotate(ttl=60)

    @property
    def svid(self) -> X509Svid:
        return self.issued[-1]

    def rotate(self, *, ttl: Any = None) -> X509Svid:
        if self.broken:
            raise RuntimeError("no luck")
        self.issued_at = self.ca.clock()
        self.issued.append(self.ca.issue(WORKLOAD, ttl=ttl))
        return self.svid


@dataclass
class Stage:
    clock: Clock
    ca: CertificateAuthority
    workloads: list[FakeWorkload]
    rotation: Rotation
    events: list[RotationEvent]

    def play(self, seconds: float) -> None:
        """Let time pass as the task would see it, and check at each step that nothing is ever distrusted."""
        end = self.clock.now + timedelta(seconds=seconds)
        while self.clock.now < end:
            pause = self.rotation.step()
            for workload in self.workloads:
                assert verdict(self.ca, workload.svid, self.clock.now) == "accepted"
            self.clock.forward(min(max(pause, 0.05), 1.0))

    def steps(self, *wanted: RotationStep) -> list[RotationStep]:
        return [event.step for event in self.events if event.step in wanted]


@pytest.fixture
def stage(clock: Clock) -> Stage:
    ca = CertificateAuthority("zt.example", ttl=600, svid_ttl=60, clock=clock)
    workloads = [FakeWorkload(ca, "orders"), FakeWorkload(ca, "payments")]
    events: list[RotationEvent] = []
    rotation = Rotation(ca, lambda: workloads, svid_ttl=60, ca_ttl=600, on_event=events.append)
    return Stage(clock, ca, workloads, rotation, events)


def test_svids_are_renewed_around_half_life_each_at_its_own_moment(stage: Stage) -> None:
    stage.play(200)

    for workload in stage.workloads:
        starts = [svid.leaf.not_valid_before_utc for svid in workload.issued]
        gaps = [(b - a).total_seconds() for a, b in pairwise(starts)]
        assert len(gaps) >= 5
        assert all(23 <= gap <= 38 for gap in gaps)
        assert len(set(gaps)) > 1


def test_random_numbers_of_the_tests_beside_it_are_left_alone(stage: Stage) -> None:
    """Seeded tests would differ from run to run, and Hypothesis warns of whatever changes their state."""
    before = random.getstate()

    stage.play(200)

    assert stage.steps(RotationStep.SVID_RENEWED)
    assert random.getstate() == before


def test_authority_is_prepared_activated_and_retired_with_overlap(stage: Stage) -> None:
    first = stage.ca.active

    stage.play(299)
    assert stage.ca.authorities == (first,)
    stage.play(3)
    assert stage.ca.prepared is not None
    stage.play(110)
    assert stage.ca.active is not first
    assert first in stage.ca.authorities
    last = first.latest_expiry
    assert last is not None
    stage.play((last - stage.clock.now).total_seconds())
    assert first in stage.ca.authorities
    stage.play(10)
    assert first not in stage.ca.authorities

    stage.play(3000)
    assert len(stage.ca.authorities) <= 2
    assert stage.rotation.authorities_activated >= 7
    assert stage.rotation.last_error is None


@pytest.mark.parametrize("jump", [45, 700, 86_400, -30, -3_600, -86_400])
def test_jump_of_the_clock_is_made_good_in_one_step(stage: Stage, jump: float) -> None:
    stage.play(320)
    stage.clock.forward(jump)

    stage.rotation.step()

    for workload in stage.workloads:
        assert verdict(stage.ca, workload.svid, stage.clock.now) == "accepted"
    stage.play(1500)
    assert stage.rotation.last_error is None


def test_redacted_and_pinned_workloads_are_left_alone(stage: Stage) -> None:
    redacted, pinned = stage.workloads
    redacted.redacted, pinned.pinned = True, True
    stage.clock.forward(50)

    stage.rotation.step()
    assert stage.events == []

    redacted.redacted, pinned.pinned = False, False
    stage.rotation.step()
    assert [event.workload for event in stage.events] == ["orders", "payments"]


def test_one_workloads_trouble_is_not_the_others(stage: Stage) -> None:
    broken, healthy = stage.workloads
    broken.broken = True
    stage.clock.forward(50)

    stage.rotation.step()

    assert len(healthy.issued) == 2
    assert stage.rotation.last_error == "RuntimeError: no luck"
    broken.broken = False
    stage.rotation.step()
    assert len(broken.issued) == 2
    assert stage.rotation.last_error is None


def test_short_lives_count_from_signing_and_not_from_the_backdated_start(clock: Clock) -> None:
    ca = CertificateAuthority("zt.example", ttl=12, svid_ttl=2, clock=clock)
    events: list[RotationEvent] = []
    workloads = [FakeWorkload(ca)]
    rotation = Rotation(ca, lambda: workloads, svid_ttl=2, ca_ttl=12, on_event=events.append)

    Stage(clock, ca, workloads, rotation, events).play(24)

    assert 3 <= rotation.authorities_activated <= 4
    assert 20 <= rotation.svids_renewed <= 32


async def test_stopping_is_never_missed(stage: Stage) -> None:
    for turn in range(300):
        rotation = Rotation(stage.ca, list)
        rotation.start()
        for _ in range(turn % 4):
            await asyncio.sleep(0)
        rotation.wake()
        for _ in range(turn // 4 % 3):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await rotation.stop()


async def test_task_survives_errors_and_follows_the_clock_when_woken(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asyncio.Event()
    renewed: list[RotationEvent] = []

    def report(event: RotationEvent) -> None:
        renewed.append(event)
        done.set()
        raise RuntimeError("a callback that fails")

    broken = iter([True])
    rotation = Rotation(
        stage.ca,
        lambda: [] if next(broken, False) and 1 / 0 else stage.workloads,
        on_event=report,
    )
    rotation.start()
    try:
        while rotation.last_error is None:
            await asyncio.sleep(0)
        stage.clock.forward(50)
        rotation.wake()
        async with asyncio.timeout(5):
            await done.wait()
        assert rotation.running
        assert renewed[0].step is RotationStep.SVID_RENEWED
        assert renewed[0].at == stage.clock.now
    finally:
        await rotation.stop()
    assert not rotation.running


def test_lives_that_cannot_overlap_are_refused(stage: Stage) -> None:
    with pytest.raises(ValueError, match="six times"):
        Rotation(stage.ca, list, svid_ttl=60, ca_ttl=300)
