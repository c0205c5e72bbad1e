"""The identity source against an agent that does everything an agent may do."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from tests.mtls.conftest import DOMAIN, SERVER, STRANGER, until
from ztmtls.ids import TrustDomain
from ztmtls.probes import identity_fault
from ztmtls.reasons import Reason
from ztmtls.source import NoIdentity, SourceState, X509Source
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi, WorkloadIdentity
from ztmtls.testing.ca import with_other_key
from ztmtls.tls import GenerationContext
from ztmtls.workload_endpoint import InvalidEndpoint, parse_endpoint


@asynccontextmanager
async def agent(
    ca: CertificateAuthority, *identities: str | WorkloadIdentity, **more: Any
) -> AsyncIterator[Workload]:
    async with WorkloadApi() as api:
        workload = await api.add_workload("server", *(identities or (SERVER,)), ca=ca, **more)
        workload.allow(pid=os.getpid())
        yield workload


@pytest.fixture
async def workload(ca: CertificateAuthority) -> AsyncIterator[Workload]:
    async with agent(ca) as workload:
        yield workload


@pytest.fixture
async def source(workload: Workload) -> AsyncIterator[X509Source]:
    async with X509Source(workload.endpoint) as source:
        await source.ready(5)
        yield source


def serial(source: X509Source) -> str:
    return source.context.svid.serial


async def rotated(source: X509Source, workload: Workload, timeout: float = 15) -> None:
    """The source follows a rotation: the proof that it is alive."""
    await workload.wait_for_streams(1, timeout)
    new = workload.rotate()
    await until(lambda: source.state is SourceState.SERVING and serial(source) == new.serial, timeout)
    assert source.status().reason == ""


async def test_first_svid_and_every_rotation_arrive(source: X509Source, workload: Workload) -> None:
    assert source.context.svid.id == workload.spiffe_id
    generations = [source.context.generation]
    for _ in range(3):
        await rotated(source, workload)
        generations.append(source.context.generation)
    assert generations == sorted(set(generations))


async def test_redelivery_of_the_same_material_changes_nothing(
    source: X509Source, workload: Workload
) -> None:
    before = source.context
    workload.push()
    workload.push()
    await workload.wait_for_delivery()
    await rotated(source, workload)  # a barrier: later than the redelivery
    assert source.context.generation == before.generation + 1


async def test_bundle_only_update_adds_and_drops_authorities(
    source: X509Source, workload: Workload, ca: CertificateAuthority
) -> None:
    domain = TrustDomain(DOMAIN)
    old = ca.active
    ca.prepare()
    await until(lambda: len(source.context.bundles[domain].authorities) == 2)
    ca.activate()
    await rotated(source, workload)
    ca.retire(old)
    await until(lambda: len(source.context.bundles[domain].authorities) == 1)
    assert source.context.bundles[domain] == ca.bundle


@pytest.mark.parametrize("field", ["svids", "spiffe_id", "x509_svid", "x509_svid_key", "bundle"])
async def test_update_with_an_empty_mandatory_field_is_discarded(
    source: X509Source, workload: Workload, field: str
) -> None:
    before = source.context
    response = workload.build_response(workload.ca.issue(SERVER))
    if field == "svids":
        response.ClearField("svids")
    else:
        response.svids[0].ClearField(field)
    workload.push_raw(response)
    await until(lambda: source.state is SourceState.DEGRADED)
    assert "update discarded" in source.status().reason
    assert source.context == before
    await rotated(source, workload)


@pytest.mark.parametrize(
    "broken",
    [
        lambda w: w.build_response(with_other_key(w.svid)),
        lambda w: w.build_response(CertificateAuthority(DOMAIN).issue(SERVER)),
        lambda w: w.build_response(w.ca.issue(SERVER, is_ca=True)),
        lambda w: w.build_response(w.ca.issue(SERVER, uris=[STRANGER])),
        lambda w: w.build_response(w.svid, bundle=b"\x30\x82 not a certificate"),
        lambda w: w.build_response(w.svid, bundle=w.ca.bundle.der() + b"\x00"),
    ],
    ids=[
        "other key",
        "foreign authority",
        "CA leaf",
        "ID differs from SAN",
        "broken bundle",
        "trailing byte",
    ],
)
async def test_update_that_does_not_verify_is_discarded(
    source: X509Source, workload: Workload, broken: Callable[[Workload], Any]
) -> None:
    before = source.context
    workload.push_raw(broken(workload))
    await until(lambda: source.state is SourceState.DEGRADED)
    assert source.context == before
    await rotated(source, workload)


async def test_broken_federated_bundle_costs_only_that_domain(source: X509Source, workload: Workload) -> None:
    friend = CertificateAuthority("friend.example")
    workload.push(
        workload.ca.issue(SERVER),
        federated={
            "spiffe://friend.example": friend.bundle.der(),
            "spiffe://broken.example": b"nonsense",
            "spiffe://empty.example": b"",
        },
    )
    await until(lambda: "broken.example" in source.status().reason)
    assert {str(d): len(b.authorities) for d, b in source.context.bundles.items()} == {
        DOMAIN: 1,
        "friend.example": 1,
        "empty.example": 0,
    }
    workload.push(workload.ca.issue(SERVER), federated={})
    await until(lambda: list(source.context.bundles) == [TrustDomain(DOMAIN)])


def unloadable(ca: CertificateAuthority) -> bytes:
    """A bundle that `cryptography` reads and OpenSSL does not: a name that is no UTF-8."""
    name = next(iter(ca.bundle.authorities[0].subject)).value.encode()
    return ca.bundle.der().replace(name, b"\xff\xfe" + name[2:])


async def test_foreign_authority_that_openssl_cannot_load_costs_only_its_domain(
    source: X509Source, workload: Workload
) -> None:
    friend = CertificateAuthority("friend.example")
    broken = CertificateAuthority("broken.example")
    new = workload.ca.issue(SERVER)
    workload.push(
        new,
        federated={
            "spiffe://friend.example": friend.bundle.der(),
            "spiffe://broken.example": unloadable(broken),
        },
    )
    await until(lambda: "OpenSSL can't load the bundle of broken.example" in source.status().reason)
    assert serial(source) == new.serial
    assert {str(domain) for domain in source.context.bundles} == {DOMAIN, "friend.example"}
    GenerationContext.build("callee", source.context, None)


async def test_own_authority_that_openssl_cannot_load_discards_the_update(
    source: X509Source, workload: Workload
) -> None:
    before = source.context
    both = workload.ca.bundle.der() + unloadable(CertificateAuthority(DOMAIN))
    workload.push_raw(workload.build_response(workload.ca.issue(SERVER), bundle=both))
    await until(lambda: "OpenSSL can't load the bundle" in source.status().reason)
    assert source.context == before
    await rotated(source, workload)


async def test_picker_that_fails_discards_the_update(workload: Workload) -> None:
    picks: list[Callable[[tuple[X509Svid, ...]], Any]] = [lambda svids: svids[0]]
    async with X509Source(workload.endpoint, picker=lambda svids: picks[-1](svids)) as source:
        before = await source.ready(5)
        for pick, said in (
            (lambda svids: svids[7], "the picker failed with IndexError"),
            (lambda svids: None, "the picker chose none"),
        ):
            picks.append(pick)
            workload.rotate()
            await until(lambda said=said: said in source.status().reason)  # type: ignore[misc]
            assert source.context == before
            assert workload.streams == 1, "the stream lives on"
        picks.append(lambda svids: svids[0])
        await rotated(source, workload)


async def test_subscriber_cannot_end_the_source(source: X509Source, workload: Workload) -> None:
    def troublesome() -> None:
        raise asyncio.CancelledError

    source.subscribe(troublesome)
    await rotated(source, workload)
    await rotated(source, workload)


async def test_agent_that_answers_late_gives_a_lost_identity_back(
    ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slower than the first patience: waiting longer each time, we hear it in the end."""
    monkeypatch.setattr("ztmtls.source._URGENT_ANSWER", 0.2)
    async with agent(ca, svid_ttl=2) as workload, X509Source(workload.endpoint) as source:
        await source.ready(5)
        workload.hang()
        await until(lambda: source.state is SourceState.EXPIRED, 10)
        silences = source.status().failures
        await until(lambda: source.status().failures >= silences + 3, 20)
        patience = [source._patience(answered=False)]
        workload.resume()
        await rotated(source, workload)
    assert patience[0] >= 0.8


async def test_agent_that_sends_an_update_and_hangs_up_is_not_stormed(
    source: X509Source, workload: Workload
) -> None:
    delays: list[float] = []
    opened = asyncio.get_running_loop().time()
    for _ in range(6):
        await workload.wait_for_streams(1, 15)
        delays.append(asyncio.get_running_loop().time() - opened)
        workload.end(grpc.StatusCode.OK)
        await workload.wait_for_streams(0, 5)
        opened = asyncio.get_running_loop().time()
    assert delays[-1] > 1.0, delays


async def test_denials_count_although_other_failures_lie_between(
    source: X509Source, workload: Workload
) -> None:
    workload.redact()
    async with asyncio.timeout(30):
        while source.state is not SourceState.DENIED:
            workload.fail_next(grpc.StatusCode.UNAVAILABLE, 1)
            calls = workload.calls["FetchX509SVID"]
            await workload.wait_for_calls(calls + 2, timeout=15)  # one that fails, one that is denied
    workload.restore()
    await until(lambda: source.state is SourceState.SERVING, 15)


async def test_silent_stream_is_noticed_after_the_wall_clock_jumped(
    source: X509Source, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a machine slept: the monotonic clock stood still, the SVID ran out meanwhile."""
    asleep = 24 * 3600.0
    real = time.time
    workload.hang()
    monkeypatch.setattr("ztmtls.stream.time.time", lambda: real() + asleep)
    await until(lambda: "silent" in source.status().reason, 10)
    assert source.state is SourceState.EXPIRED
    monkeypatch.undo()
    workload.resume()
    await rotated(source, workload)


async def test_redacted_identity_is_dropped_within_5_s_and_returns_by_itself(
    source: X509Source, workload: Workload
) -> None:
    workload.redact()
    await until(lambda: source.state is SourceState.DENIED, 5)
    with pytest.raises(NoIdentity) as refused:
        _ = source.context
    assert refused.value.reason is Reason.IDENTITY_DENIED
    assert "no entry for this workload" in (identity_fault(source) or "")
    assert source.status().serial is None
    workload.restore()
    await until(lambda: source.state is SourceState.SERVING, 15)
    await rotated(source, workload)


async def test_silent_stream_is_opened_anew_before_the_svid_runs_out(ca: CertificateAuthority) -> None:
    async with agent(ca, svid_ttl=4) as workload, X509Source(workload.endpoint) as source:
        first = (await source.ready(5)).svid.serial
        # Nothing is pushed on the open stream, ever; only a new call gets something newer.
        workload.push_raw(workload.build_response(ca.issue(SERVER, ttl=60)))
        assert workload.streams == 1
        await until(lambda: serial(source) != first, 10)


async def test_repeated_failures_are_logged_once(
    source: X509Source, workload: Workload, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ztmtls")
    workload.fail_next(grpc.StatusCode.UNAVAILABLE, 4)
    workload.end(grpc.StatusCode.UNAVAILABLE, "refused by the test")
    await rotated(source, workload)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1, warnings
    assert source.status().failures >= 5
    assert any("answers again" in r.getMessage() for r in caplog.records)


async def test_identity_that_comes_late(ca: CertificateAuthority) -> None:
    async with WorkloadApi() as api:
        workload = await api.add_workload("server", SERVER, ca=ca)
        async with X509Source(workload.endpoint) as source:
            with pytest.raises(NoIdentity, match="no entry for this workload") as refused:
                await source.ready(0.5)
            assert refused.value.reason is Reason.IDENTITY_DENIED
            workload.allow(pid=os.getpid())
            await source.ready(10)


async def test_socket_that_comes_late(ca: CertificateAuthority) -> None:
    async with agent(ca) as workload:
        await workload.stop()
        async with X509Source(workload.endpoint) as source:
            with pytest.raises(NoIdentity, match="there is no socket"):
                await source.ready(1)
            assert source.state is SourceState.STARTING
            await workload.start()
            await source.ready(10)


async def test_agent_that_accepts_and_never_answers(ca: CertificateAuthority) -> None:
    async with agent(ca) as workload:
        workload.hang()
        async with X509Source(workload.endpoint) as source:
            await workload.wait_for_calls(1)
            with pytest.raises(NoIdentity):
                await source.ready(0.3)
            workload.resume()
            await source.ready(5)


async def test_we_never_run_under_another_name(ca: CertificateAuthority) -> None:
    async with (
        agent(ca, STRANGER, SERVER) as workload,
        X509Source(workload.endpoint, expected_id=SERVER) as source,
    ):
        assert str((await source.ready(5)).svid.id) == SERVER
        workload.push(ca.issue(STRANGER))  # ours is gone, another is named: that withdraws it
        await until(lambda: source.state is SourceState.DENIED, 5)
        assert "we expect to be" in source.status().reason
        with pytest.raises(NoIdentity):
            _ = source.context
        workload.push(ca.issue(STRANGER), ca.issue(SERVER))
        await until(lambda: source.state is SourceState.SERVING, 15)
        assert str(source.context.svid.id) == SERVER


async def test_first_of_several_svids_is_the_default_and_hints_count_once(ca: CertificateAuthority) -> None:
    async with (
        agent(
            ca, WorkloadIdentity(SERVER, hint="internal"), WorkloadIdentity(STRANGER, hint="internal")
        ) as workload,
        X509Source(workload.endpoint) as source,
    ):
        context = await source.ready(5)
        assert [str(s.id) for s in context.svids] == [SERVER]


async def test_program_without_an_event_loop(workload: Workload) -> None:
    def blocking() -> str:
        with X509Source(workload.endpoint) as source:
            return str(source.wait(5).svid.id)

    assert await asyncio.to_thread(blocking) == SERVER


async def test_closed_source_offers_nothing(workload: Workload) -> None:
    async with X509Source(workload.endpoint) as source:
        await source.ready(5)
    assert source.state is SourceState.CLOSED
    with pytest.raises(NoIdentity):
        _ = source.context
    await workload.wait_for_streams(0)


async def test_waiting_on_a_closed_source_ends(workload: Workload) -> None:
    async with X509Source(workload.endpoint) as source:
        workload.hang()
    async with asyncio.timeout(5):
        with pytest.raises(NoIdentity, match="closed"):
            await source.ready()
        with pytest.raises(NoIdentity, match="closed"):
            await asyncio.to_thread(source.wait)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("unix:///run/a.sock", "unix:/run/a.sock"),
        ("tcp://127.0.0.1:8081", "ipv4:127.0.0.1:8081"),
        ("tcp://[::1]:8081", "ipv6:[::1]:8081"),
    ],
)
def test_endpoint_forms(address: str, target: str) -> None:
    assert parse_endpoint(address) == target


@pytest.mark.parametrize(
    "address",
    [
        "", "/run/a.sock", "blah", "unix:opaque", "unix:", "unix://", "unix://run/a.sock", "unix:///a?x",
        "unix:///a#x", "unix://u:p@/a", "tcp:opaque", "tcp://", "tcp://localhost:1", "tcp://1.2.3.4",
        "tcp://1.2.3.4:5?x", "tcp://1.2.3.4:5/p", "tcp://u@1.2.3.4:5", "tcp://1.2.3.4:99999", "https://a",
        "unix:/tmp", "unix:/" + "a" * 108, "unix:/a b", "unix:/a\n",
    ],
)  # fmt: skip
def test_endpoint_forms_that_are_refused(address: str) -> None:
    with pytest.raises(InvalidEndpoint):
        parse_endpoint(address)


def test_endpoint_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:/run/a.sock")
    assert parse_endpoint() == "unix:/run/a.sock"
    assert parse_endpoint("unix:/run/b.sock") == "unix:/run/b.sock"
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET")
    with pytest.raises(InvalidEndpoint, match="SPIFFE_ENDPOINT_SOCKET"):
        parse_endpoint()
