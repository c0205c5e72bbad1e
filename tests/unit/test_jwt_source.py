"""`JwtSource` on a real Workload API: tokens are kept and renewed, bundles outlive trouble, denials count."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from spiffe._proto import workload_pb2 as pb

from ztmtls import jwt_source
from ztmtls.jwt_source import JwtSource, NoBundles
from ztmtls.jwt_svid import JwtRefused
from ztmtls.reasons import Reason
from ztmtls.source import NoIdentity, SourceState
from ztmtls.stream import DENIAL_GRACE
from ztmtls.testing import BackgroundWorkloadApi, CertificateAuthority, Workload, WorkloadApi
from ztmtls.testing.workload_api import FETCH_JWT_BUNDLES, FETCH_JWT_SVID

DOMAIN = "spiffe://zt.example"
ORDERS = f"{DOMAIN}/orders"
CALLER = f"{DOMAIN}/caller"
OTHER = "spiffe://other.example"


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example")


@pytest.fixture
async def api() -> AsyncIterator[WorkloadApi]:
    async with WorkloadApi() as started:
        yield started


@pytest.fixture
async def workload(api: WorkloadApi, ca: CertificateAuthority) -> Workload:
    workload = await api.add_workload("orders", ORDERS, ca=ca)
    workload.allow(pid=os.getpid())
    return workload


@pytest.fixture
async def source(workload: Workload) -> AsyncIterator[JwtSource]:
    async with JwtSource(workload.endpoint) as source:
        await source.ready(10)
        yield source


async def until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    try:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not come about in {timeout} s") from None


async def fetch_reason(source: JwtSource, audience: str = "reports", **more: bool) -> Reason:
    with pytest.raises(NoIdentity) as caught:
        await source.fetch(audience, **more)
    return caught.value.reason


# -- Bundles ----------------------------------------------------------------------------------------


async def test_token_is_validated_against_the_live_bundles(
    source: JwtSource, ca: CertificateAuthority
) -> None:
    token = ca.issue_jwt(CALLER, ["orders"])

    assert str((await source.validate(token, "orders")).id) == CALLER
    with pytest.raises(JwtRefused) as caught:
        await source.validate(token, "payments")
    assert caught.value.reason is Reason.JWT_AUDIENCE


async def test_rotated_key_is_followed_and_the_old_one_ends_with_its_retirement(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    old = ca.issue_jwt(CALLER, ["orders"])

    ca.rotate_jwt_key()
    await until(lambda: source.status().keys == {"zt.example": 2}, "the second key")
    new = ca.issue_jwt(CALLER, ["orders"])
    assert [str((await source.validate(t, "orders")).id) for t in (old, new)] == [CALLER, CALLER]

    ca.retire_jwt_keys()
    await until(lambda: source.status().keys == {"zt.example": 1}, "the old key's end")
    assert str((await source.validate(new, "orders")).id) == CALLER
    with pytest.raises(JwtRefused) as caught:
        await source.validate(old, "orders")
    assert caught.value.reason is Reason.JWT_UNKNOWN_KEY


async def test_validation_waits_for_the_first_bundles_and_not_for_ever(
    workload: Workload, ca: CertificateAuthority
) -> None:
    token = ca.issue_jwt(CALLER, ["orders"])
    async with JwtSource(workload.endpoint) as source:
        assert str((await source.validate(token, "orders")).id) == CALLER

    workload.hang()
    async with JwtSource(workload.endpoint, timeout=0.2) as source:
        with pytest.raises(NoBundles) as caught:
            await source.validate(token, "orders")
        assert caught.value.reason is Reason.NO_JWT_BUNDLES
        assert source.state is SourceState.STARTING


async def test_bundles_outlive_the_agent(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    token = ca.issue_jwt(CALLER, ["orders"])
    assert source.state is SourceState.SERVING

    await workload.stop()
    await until(lambda: "no socket" in source.status().reason, "the outage's notice")
    assert source.state is SourceState.DEGRADED
    assert str((await source.validate(token, "orders")).id) == CALLER

    await workload.start()
    await until(lambda: source.state is SourceState.SERVING, "healing")


async def test_agent_may_come_after_the_source(workload: Workload) -> None:
    await workload.stop()
    async with JwtSource(workload.endpoint) as source:
        with pytest.raises(NoBundles, match="no socket"):
            await source.ready(0.5)

        await workload.start()

        await source.ready(10)


async def test_broken_message_is_discarded(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    token = ca.issue_jwt(CALLER, ["orders"])

    workload.push_raw(pb.JWTBundlesResponse())
    await until(lambda: "no JWT bundle" in source.status().reason, "the notice")

    assert source.state is SourceState.DEGRADED
    assert str((await source.validate(token, "orders")).id) == CALLER
    workload.unpin()
    await until(lambda: source.state is SourceState.SERVING, "healing")


async def test_broken_document_costs_nobody_but_its_domain(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    other = CertificateAuthority("other.example")
    token, theirs = ca.issue_jwt(CALLER, ["orders"]), other.issue_jwt(f"{OTHER}/x", ["orders"])

    workload.push_raw(
        pb.JWTBundlesResponse(
            bundles={
                DOMAIN: b"broken",
                OTHER: other.jwt_bundle(),
                "spiffe://no such": b"",
                f"{DOMAIN}/x": b"",
            }
        )
    )
    await until(lambda: "other.example" in source.status().keys, "the other domain's bundle")

    assert str((await source.validate(theirs, "orders")).id) == f"{OTHER}/x"
    assert str((await source.validate(token, "orders")).id) == CALLER  # by its last good keys
    assert source.state is SourceState.DEGRADED
    assert "bundle of spiffe://zt.example discarded" in source.status().reason


async def test_first_message_without_a_good_document_is_no_start(
    workload: Workload, ca: CertificateAuthority
) -> None:
    workload.push_raw(pb.JWTBundlesResponse(bundles={DOMAIN: b"broken"}))
    async with JwtSource(workload.endpoint) as source:
        with pytest.raises(NoBundles, match="no JWK Set"):
            await source.ready(0.5)

        workload.unpin()

        assert len(await source.ready(10)) == 1


async def test_withdrawn_bundles_are_not_used_any_more(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    token = ca.issue_jwt(CALLER, ["orders"])
    assert await source.validate(token, "orders")

    workload.redact()
    await until(lambda: source.state is SourceState.DENIED, "the denial", DENIAL_GRACE + 8)
    with pytest.raises(NoBundles, match="PERMISSION_DENIED"):
        await source.validate(token, "orders")
    assert source.status().keys == {}

    waiting = asyncio.create_task(source.ready(15))
    await asyncio.sleep(0)
    workload.restore()
    await waiting
    assert await source.validate(token, "orders")


async def test_short_denial_takes_nothing_away(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    states: list[SourceState] = []
    source.subscribe(lambda: states.append(source.state))

    workload.fail_next(grpc.StatusCode.PERMISSION_DENIED, method=FETCH_JWT_BUNDLES)
    workload.end(method=FETCH_JWT_BUNDLES)
    await until(lambda: "PERMISSION_DENIED" in source.status().reason, "the denial")
    await until(lambda: source.state is SourceState.SERVING, "healing")

    assert SourceState.DENIED not in states
    assert await source.validate(ca.issue_jwt(CALLER, ["orders"]), "orders")


async def test_denial_at_the_start_counts_at_once(workload: Workload) -> None:
    workload.redact()
    failures: list[int] = []
    source = JwtSource(workload.endpoint)
    source.subscribe(lambda: failures.append(source.status().failures))
    async with source:
        await until(lambda: source.state is SourceState.DENIED, "the denial")
        assert failures == [1]


async def test_quiet_stream_is_opened_anew_without_a_fault(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwt_source, "_QUIET", 0.05)
    async with JwtSource(workload.endpoint) as source:
        await source.ready(10)
        states = {source.state}

        while workload.calls[FETCH_JWT_BUNDLES] < 4:
            states.add(source.state)
            await asyncio.sleep(0.01)

        assert states == {SourceState.SERVING}
        assert source.status().failures == 0


async def test_stream_that_never_answers_is_a_fault(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwt_source, "_FIRST_ANSWER", 0.05)
    workload.hang()
    async with JwtSource(workload.endpoint) as source:
        await until(lambda: "silent" in source.status().reason, "the notice")
        assert source.state is SourceState.STARTING

        monkeypatch.setattr(jwt_source, "_FIRST_ANSWER", 30)
        workload.resume()
        await source.ready(10)


# -- Tokens -----------------------------------------------------------------------------------------


async def test_token_is_kept_and_asked_for_once(source: JwtSource, workload: Workload) -> None:
    workload.hang()
    waiting = [asyncio.create_task(source.fetch("reports")) for _ in range(10)]
    await workload.wait_until(lambda: workload.calls[FETCH_JWT_SVID] == 1, what="the call")
    waiting[0].cancel()
    workload.resume()
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(results[0], asyncio.CancelledError)
    tokens = {svid.token for svid in results[1:] if not isinstance(svid, BaseException)}
    assert len(tokens) == 1
    assert (await source.fetch("reports")).token in tokens
    assert workload.calls[FETCH_JWT_SVID] == 1


async def test_tokens_of_other_audiences_and_identities_are_other_tokens(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    workload = await api.add_workload("two", ORDERS, f"{DOMAIN}/second", ca=ca)
    workload.allow(pid=os.getpid())
    async with JwtSource(workload.endpoint) as source:
        svids = [
            await source.fetch("a"),
            await source.fetch("b"),
            await source.fetch("a", "b"),
            await source.fetch("a", spiffe_id=f"{DOMAIN}/second"),
        ]

    assert len({svid.token for svid in svids}) == 4
    assert [svid.audience for svid in svids] == [("a",), ("b",), ("a", "b"), ("a",)]
    assert [str(svid.id) for svid in svids] == [ORDERS, ORDERS, ORDERS, f"{DOMAIN}/second"]


async def test_token_is_renewed_at_half_of_its_life(source: JwtSource, workload: Workload) -> None:
    workload.jwt_ttl = 4
    first = await source.fetch("reports")
    began = time.time()
    half = began + (first.expiry.timestamp() - began) / 2

    while (second := await source.fetch("reports")).token == first.token:
        assert time.time() < first.expiry.timestamp() - 0.5
        await asyncio.sleep(0.02)

    assert time.time() >= half - 0.5
    assert second.expiry > first.expiry


async def test_fresh_token_is_asked_for_whatever_is_kept(source: JwtSource, workload: Workload) -> None:
    await source.fetch("reports")

    fresh = await source.fetch("reports", fresh=True)

    assert workload.calls[FETCH_JWT_SVID] == 2
    assert (await source.fetch("reports")).token == fresh.token


async def test_kept_token_outlives_the_agent_until_it_expires(source: JwtSource, workload: Workload) -> None:
    workload.jwt_ttl = 3
    kept = await source.fetch("reports")
    end = kept.expiry.timestamp()
    half = time.time() + (end - time.time()) / 2
    await workload.stop()

    await until(lambda: time.time() > half, "half of the life")
    assert (await source.fetch("reports")).token == kept.token
    assert (await source.fetch("reports")).token == kept.token

    await until(lambda: time.time() >= end, "the expiry")
    source._timeout = 0.2
    assert await fetch_reason(source) is Reason.NO_IDENTITY


async def test_broken_answer_does_not_replace_a_kept_token(source: JwtSource, workload: Workload) -> None:
    workload.jwt_ttl = 4
    kept = await source.fetch("reports")
    half = time.time() + (kept.expiry.timestamp() - time.time()) / 2
    workload.push_raw(pb.JWTSVIDResponse())

    await until(lambda: time.time() > half, "half of the life")

    assert (await source.fetch("reports")).token == kept.token
    assert await fetch_reason(source, fresh=True) is Reason.INVALID_UPDATE


async def test_fetch_waits_for_an_agent_that_is_being_replaced(source: JwtSource, workload: Workload) -> None:
    await workload.stop()
    fetching = asyncio.create_task(source.fetch("reports"))
    await until(lambda: "no socket" in source.status().reason, "the outage's notice")
    assert not fetching.done()

    await workload.start()

    assert str((await fetching).id) == ORDERS


async def test_fetch_has_a_deadline(workload: Workload) -> None:
    workload.hang()
    async with JwtSource(workload.endpoint, timeout=0.2) as source, asyncio.timeout(10):
        assert await fetch_reason(source) is Reason.NO_IDENTITY


async def test_denied_fetch_drops_the_kept_token(source: JwtSource, workload: Workload) -> None:
    await source.fetch("reports")
    workload.fail_next(grpc.StatusCode.PERMISSION_DENIED, times=2, method=FETCH_JWT_SVID)

    assert await fetch_reason(source, fresh=True) is Reason.IDENTITY_DENIED
    assert await fetch_reason(source) is Reason.IDENTITY_DENIED
    assert str((await source.fetch("reports")).id) == ORDERS


async def test_denied_stream_drops_kept_tokens(source: JwtSource, workload: Workload) -> None:
    await source.fetch("reports")

    workload.redact()
    await until(lambda: "PERMISSION_DENIED" in source.status().reason, "the denial")

    assert await fetch_reason(source) is Reason.IDENTITY_DENIED


async def test_token_that_a_denial_dropped_is_not_offered_by_a_fetch_that_was_under_way(
    source: JwtSource, workload: Workload
) -> None:
    workload.jwt_ttl = 6
    kept = await source.fetch("reports")
    half = time.time() + (kept.expiry.timestamp() - time.time()) / 2
    await until(lambda: time.time() > half, "half of the life")
    workload.hang()
    fetching = asyncio.create_task(source.fetch("reports"))
    await workload.wait_for_calls(2, method=FETCH_JWT_SVID)

    workload.end(grpc.StatusCode.PERMISSION_DENIED, method=FETCH_JWT_BUNDLES)
    await until(lambda: "PERMISSION_DENIED" in source.status().reason, "the denial")
    await workload.stop()

    with pytest.raises(NoIdentity) as caught:
        await fetching
    assert caught.value.reason is Reason.NO_IDENTITY


async def test_new_keys_drop_kept_tokens(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    before = await source.fetch("reports")

    assert (await source.validate(before.token, "reports")).id == before.id
    updated = asyncio.Event()
    ca.rotate_jwt_key()
    await until(lambda: source.status().keys == {"zt.example": 2}, "the second key")
    source.subscribe(updated.set)
    ca.retire_jwt_keys()
    await updated.wait()
    with pytest.raises(JwtRefused):
        await source.validate(before.token, "reports")

    after = await source.fetch("reports")
    assert (await source.validate(after.token, "reports")).id == before.id


async def test_token_is_not_kept_when_keys_changed_while_it_came(
    source: JwtSource, workload: Workload, ca: CertificateAuthority
) -> None:
    workload.hang()
    fetching = asyncio.create_task(source.fetch("reports"))
    await workload.wait_for_calls(1, method=FETCH_JWT_SVID)
    ca.rotate_jwt_key()
    await until(lambda: source.status().keys == {"zt.example": 2}, "the second key")
    workload.resume()
    await fetching

    await source.fetch("reports")
    await source.fetch("reports")

    assert workload.calls[FETCH_JWT_SVID] == 2


async def test_refused_request_is_not_repeated(source: JwtSource, workload: Workload) -> None:
    workload.fail_next(grpc.StatusCode.INVALID_ARGUMENT, method=FETCH_JWT_SVID)

    assert await fetch_reason(source) is Reason.NO_IDENTITY
    assert workload.calls[FETCH_JWT_SVID] == 1


@pytest.mark.parametrize(
    ("spiffe_id", "named", "audience", "ttl", "reason"),
    [
        (f"{DOMAIN}/else", f"{DOMAIN}/else", ["reports"], 300, Reason.INVALID_UPDATE),
        (ORDERS, f"{DOMAIN}/else", ["reports"], 300, Reason.JWT_SUBJECT),
        (ORDERS, ORDERS, ["else"], 300, Reason.JWT_AUDIENCE),
        (ORDERS, ORDERS, ["reports"], -10, Reason.JWT_EXPIRED),
    ],
    ids=["other identity", "other subject", "other audience", "expired"],
)
async def test_token_that_is_not_what_was_asked_for_is_discarded(
    source: JwtSource,
    workload: Workload,
    ca: CertificateAuthority,
    spiffe_id: str,
    named: str,
    audience: list[str],
    ttl: float,
    reason: Reason,
) -> None:
    assert await source.fetch("reports", spiffe_id=ORDERS, fresh=True)
    token = ca.issue_jwt(named, audience, ttl=ttl)
    workload.push_raw(pb.JWTSVIDResponse(svids=[pb.JWTSVID(spiffe_id=spiffe_id, svid=token)]))

    with pytest.raises(NoIdentity) as caught:
        await source.fetch("reports", spiffe_id=ORDERS, fresh=True)

    assert caught.value.reason is reason
    assert token not in str(caught.value)


async def test_empty_audience_is_an_error_of_the_caller(source: JwtSource) -> None:
    for audience in ([""], ["a", ""]):
        with pytest.raises(ValueError, match="audience"):
            await source.fetch(*audience)


async def test_every_call_carries_the_security_header(source: JwtSource, workload: Workload) -> None:
    await source.fetch("reports")

    assert workload.calls.keys() == {FETCH_JWT_BUNDLES, FETCH_JWT_SVID}
    assert workload.calls_without_header == 0


async def test_token_appears_in_no_log(
    source: JwtSource, workload: Workload, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ztmtls")
    svid = await source.fetch("reports")
    await workload.stop()
    await until(lambda: source.state is SourceState.DEGRADED, "the outage's notice")

    assert caplog.text
    assert not any(part in caplog.text + repr(source.status()) for part in svid.token.split("."))


# -- Life -------------------------------------------------------------------------------------------


async def test_closed_source_offers_nothing(workload: Workload, ca: CertificateAuthority) -> None:
    async with JwtSource(workload.endpoint) as source:
        await source.ready(10)
        await source.fetch("reports")
        workload.hang()
        waiting = asyncio.create_task(source.fetch("other"))
        await workload.wait_for_calls(2, method=FETCH_JWT_SVID)

    with pytest.raises(NoIdentity, match="closed"):
        await waiting
    workload.resume()
    assert source.state is SourceState.CLOSED
    assert await fetch_reason(source) is Reason.NO_IDENTITY
    with pytest.raises(NoBundles, match="closed"):
        await source.validate(ca.issue_jwt(CALLER, ["orders"]), "orders")
    assert not [t for t in asyncio.all_tasks() if "jwt" in t.get_name()]


async def test_status_is_for_people_and_probes(source: JwtSource) -> None:
    status = source.status().as_dict()

    assert (status["state"], status["reason"], status["keys"]) == ("serving", "", {"zt.example": 1})


def test_program_without_an_event_loop_can_use_it(ca: CertificateAuthority) -> None:
    with BackgroundWorkloadApi() as background:
        workload = background.run(lambda: background.api.add_workload("orders", ORDERS, ca=ca))
        background.run(lambda: workload.allow(pid=os.getpid()))

        with JwtSource(workload.endpoint) as source:
            source.run(source.ready(10))
            svid = source.run(source.fetch("reports"))
            assert source.run(source.validate(svid.token, "reports")).id == svid.id
            with pytest.raises(NoIdentity, match="event loop"):
                asyncio.run(source.fetch("reports"))

        assert source.state is SourceState.CLOSED
        with pytest.raises(RuntimeError, match="plain 'with'"):
            source.run(source.fetch("reports"))


async def test_run_is_for_programs_without_an_event_loop(source: JwtSource) -> None:
    with pytest.raises(RuntimeError, match="plain 'with'"):
        source.run(source.ready(1))
