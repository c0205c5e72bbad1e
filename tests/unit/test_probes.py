"""Probes over real HTTP: alive whatever happens elsewhere, ready only with an identity and dependencies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from ztmtls import probes as probes_module
from ztmtls.audit import AuditLog
from ztmtls.listen import PortInUse, bind
from ztmtls.probes import Check, Probes, identity_fault
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority

WORKLOAD = "spiffe://zt.example/ns/zt-demo/sa/orders"
CANARY = "Zz-CANARY-%40/:#"


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example")


@pytest.fixture
def source(ca: CertificateAuthority) -> StaticSource:
    return StaticSource(ca.context(ca.issue(WORKLOAD)))


def free_port() -> int:
    with bind("127.0.0.1", 0, "PORT") as sock:
        return int(sock.getsockname()[1])


@contextlib.asynccontextmanager
async def probing(
    checks: Mapping[str, Check] | None = None, *, serving: bool = True, **more: Any
) -> AsyncIterator[tuple[Probes, httpx.AsyncClient]]:
    """Probes on a free port, and a client for them."""
    probes = Probes("127.0.0.1", free_port(), checks, **more)
    probes.serving = serving
    async with (
        probes,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{probes.port}", trust_env=False) as client,
    ):
        yield probes, client


async def fine() -> str | None:
    return None


def saying(text: str) -> Check:
    async def check() -> str | None:
        return text

    return check


def raising(error: BaseException) -> Check:
    async def check() -> str | None:
        raise error

    return check


async def never() -> str | None:
    await asyncio.Event().wait()
    return None


# -- Paths ----------------------------------------------------------------------------------------------


async def test_alive_before_anything_else_is_there() -> None:
    async with probing({"database": raising(OSError())}, serving=False) as (probes, client):
        assert (await client.get("/livez")).status_code == 200
        probes.draining = True

        response = await client.get("/livez")

    assert response.status_code == 200
    assert response.json() == {"alive": True}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert "server" not in response.headers


async def test_alive_without_an_identity(source: StaticSource) -> None:
    async with probing(source=source) as (_, client):
        source.deny()

        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503


async def test_nothing_else_is_served() -> None:
    async with probing() as (_, client):
        for path in (
            "/",
            "/livez/",
            "/LIVEZ",
            "/livez/x",
            "//livez",
            "/docs",
            "/openapi.json",
            "/debug",
            "/%2e",
        ):
            response = await client.get(path)
            assert response.status_code == 404, path
            assert response.json() == {"error": "not found"}


async def test_probes_are_only_read() -> None:
    async with probing() as (_, client):
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            assert (await client.request(method, "/readyz")).status_code == 404, method


async def test_head_answers_without_a_body() -> None:
    async with probing() as (_, client):
        for path in ("/livez", "/readyz", "/metrics", "/none"):
            get, head = await client.get(path), await client.head(path)
            assert (head.status_code, head.content) == (get.status_code, b"")
            assert head.headers["content-type"] == get.headers["content-type"]


async def test_query_does_not_matter() -> None:
    async with probing() as (_, client):
        assert (await client.get("/livez?verbose=1")).status_code == 200


async def test_port_in_use_names_the_setting() -> None:
    async with probing() as (probes, _):
        with pytest.raises(PortInUse, match=rf"PROBE_PORT: 127\.0\.0\.1:{probes.port} is in use"):
            await Probes("127.0.0.1", probes.port).start()


async def test_port_is_free_again_after_stop() -> None:
    async with probing() as (probes, _):
        port = probes.port

    async with Probes("127.0.0.1", port):
        pass
    await probes.stop()  # twice is no harm


# -- Readiness ------------------------------------------------------------------------------------------


async def test_ready_when_everything_is_well(source: StaticSource) -> None:
    async with probing({"database": fine, "payments": saying("")}, source=source) as (_, client):
        response = await client.get("/readyz")

    assert response.status_code == 200
    report = response.json()
    assert report["ready"] is True
    assert report["checks"] == {"service": "ok", "identity": "ok", "database": "ok", "payments": "ok"}
    assert report["identity"]["id"] == WORKLOAD
    assert report["identity"]["state"] == "serving"


async def test_not_ready_before_serving_and_while_draining() -> None:
    async with probing(serving=False) as (probes, client):
        starting = await client.get("/readyz")
        probes.serving = True
        ready = await client.get("/readyz")
        probes.draining = True
        draining = await client.get("/readyz")

    assert (starting.status_code, starting.json()["checks"]) == (503, {"service": "starting"})
    assert (ready.status_code, ready.json()["checks"]) == (200, {"service": "ok"})
    assert (draining.status_code, draining.json()["checks"]) == (503, {"service": "draining"})


async def test_one_failing_check_is_named_and_the_others_too() -> None:
    checks = {"database": fine, "secret": saying("no secret yet"), "payments": fine}
    async with probing(checks) as (_, client):
        response = await client.get("/readyz")

    assert response.status_code == 503
    assert response.json() == {
        "ready": False,
        "checks": {"service": "ok", "database": "ok", "secret": "no secret yet", "payments": "ok"},
    }


async def test_check_that_fails_shows_its_kind_and_not_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async with probing({"database": raising(ConnectionError(CANARY))}) as (_, client):
        response = await client.get("/readyz")

    assert response.status_code == 503
    assert response.json()["checks"]["database"] == "ConnectionError"
    assert "CANARY" not in response.text
    assert "CANARY" not in caplog.text
    assert "database" in caplog.text


async def test_hanging_check_is_cut_off_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_module, "_CHECK_TIMEOUT", 0.05)
    async with probing({"one": never, "two": never, "three": fine}) as (_, client):
        response = await client.get("/readyz")
        assert (await client.get("/livez")).status_code == 200

    assert response.status_code == 503
    assert response.json()["checks"] == {
        "service": "ok", "one": "no answer in 0.05 s", "two": "no answer in 0.05 s", "three": "ok",
    }  # fmt: skip


async def test_checks_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given two checks that can only finish together.
    monkeypatch.setattr(probes_module, "_CHECK_TIMEOUT", 5.0)
    meeting = asyncio.Barrier(2)

    async def meet() -> str | None:
        await meeting.wait()
        return None

    async with probing({"one": meet, "two": meet}) as (_, client):
        assert (await client.get("/readyz")).status_code == 200


async def test_alive_while_a_check_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_module, "_CHECK_TIMEOUT", 30.0)
    release, entered = asyncio.Event(), asyncio.Event()

    async def slow() -> str | None:
        entered.set()
        await release.wait()
        return None

    async with probing({"slow": slow}) as (_, client), asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = group.create_task(client.get("/readyz"))
        await entered.wait()
        assert (await client.get("/livez")).status_code == 200
        assert not waiting.done()
        release.set()
        assert (await waiting).status_code == 200


async def test_cancelled_check_is_a_failed_one() -> None:
    async with probing({"database": raising(asyncio.CancelledError())}) as (_, client):
        response = await client.get("/readyz")

    assert response.status_code == 503
    assert response.json()["checks"]["database"] != "ok"


async def test_no_check_hides_a_missing_identity(source: StaticSource) -> None:
    # A check may happen to be named like one of ours: refusing the name, or keeping both, is fine.
    source.deny()
    try:
        probes = Probes("127.0.0.1", 1, {"identity": fine, "service": fine}, source=source)
    except ValueError:
        return
    found = await probes.readiness()

    assert found["identity"] != "ok"
    assert found["service"] != "ok"


# -- The identity ---------------------------------------------------------------------------------------


async def test_redacted_identity_is_not_ready(source: StaticSource) -> None:
    async with probing(source=source) as (_, client):
        assert (await client.get("/readyz")).status_code == 200
        source.deny()
        response = await client.get("/readyz")

    assert response.status_code == 503
    assert response.json()["checks"]["identity"] == "denied: no identity issued"
    assert response.json()["identity"]["id"] is None


async def test_identity_that_comes_back_is_ready_again(
    ca: CertificateAuthority, source: StaticSource
) -> None:
    async with probing(source=source) as (_, client):
        source.deny()
        assert (await client.get("/readyz")).status_code == 503
        source.set(ca.context(ca.issue(WORKLOAD)))

        assert (await client.get("/readyz")).status_code == 200


def svid(ca: CertificateAuthority, age: float, left: float) -> X509Svid:
    now = datetime.now(UTC)
    return ca.issue(
        WORKLOAD, not_before=now - timedelta(seconds=age), not_after=now + timedelta(seconds=left)
    )


@pytest.mark.parametrize(
    ("age", "left", "expected"),
    [
        (3600, 3600, None),
        (3580, 40, None),  # half a minute is enough of a long life
        (3580, 20, "runs out in"),
        (50, 10, None),  # a tenth is enough of a short one
        (57, 3, "runs out in"),
        (60, -2, "expired"),
    ],
)
def test_svid_that_is_about_to_run_out_is_not_ready(
    ca: CertificateAuthority, age: float, left: float, expected: str | None
) -> None:
    fault = identity_fault(StaticSource(ca.context(svid(ca, age, left))))

    if expected is None:
        assert fault is None
    else:
        assert fault is not None
        assert expected in fault


async def test_expired_identity_still_answers(ca: CertificateAuthority) -> None:
    source = StaticSource(ca.context(svid(ca, 60, -2)))
    async with probing(source=source) as (_, client):
        ready, metrics = await client.get("/readyz"), await client.get("/metrics")

    assert ready.status_code == 503
    assert ready.json()["identity"]["state"] == "expired"
    assert metrics.status_code == 200
    assert 'ztmtls_source_state{state="expired"} 1.0' in metrics.text


# -- Metrics --------------------------------------------------------------------------------------------


def samples(text: str) -> dict[str, float]:
    """Prometheus text to {name{labels}: value}; every line has to be well-formed."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z_]+(?:\{.*\})?) (\S+)", line)
            assert match, line
            found[match[1]] = float(match[2])
    return found


async def test_metrics_tell_of_identity_and_decisions(ca: CertificateAuthority, source: StaticSource) -> None:
    friend = CertificateAuthority("friend.example")
    source.set(ca.context(ca.issue(WORKLOAD), federates_with=[friend]))
    audit = AuditLog("orders", open("/dev/null", "w"))  # noqa: SIM115
    audit.record("request", "allow")
    audit.record("request", "deny", reason=Reason.ROUTE_NOT_ALLOWED)
    audit.record("request", "deny", reason=Reason.ROUTE_NOT_ALLOWED)
    async with probing(source=source, audit=audit) as (_, client):
        response = await client.get("/metrics")

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.text)
    assert found['ztmtls_source_state{state="serving"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("ztmtls_source_state")) == 1
    assert found["ztmtls_svid_expiry_timestamp_seconds"] == source.context.svid.not_after.timestamp()
    assert found["ztmtls_source_generation"] == 2
    assert found["ztmtls_source_failures_total"] == 0
    assert found['ztmtls_bundle_authorities{trust_domain="zt.example"}'] == 1
    assert found['ztmtls_bundle_authorities{trust_domain="friend.example"}'] == 1
    assert found['ztmtls_decisions_total{decision="allow",event="request",reason=""}'] == 1
    assert found['ztmtls_decisions_total{decision="deny",event="request",reason="route_not_allowed"}'] == 2


async def test_metrics_follow_the_state(source: StaticSource) -> None:
    async with probing(source=source) as (_, client):
        source.deny()
        found = samples((await client.get("/metrics")).text)

    assert found['ztmtls_source_state{state="denied"}'] == 1
    assert found['ztmtls_source_state{state="serving"}'] == 0
    assert "ztmtls_svid_expiry_timestamp_seconds" not in found


async def test_metrics_without_identity_and_audit_are_well_formed() -> None:
    async with probing() as (_, client):
        response = await client.get("/metrics")

    assert response.status_code == 200
    assert not any(name.startswith("ztmtls_source") for name in samples(response.text))


async def test_two_probes_in_one_process_do_not_mix(source: StaticSource) -> None:
    async with probing() as (_, plain), probing(source=source) as (_, full):
        assert "ztmtls_source_state" not in (await plain.get("/metrics")).text
        assert "ztmtls_source_state" in (await full.get("/metrics")).text


async def test_no_answer_holds_key_material(ca: CertificateAuthority, source: StaticSource) -> None:
    secret = source.context.svid.key.private_numbers().private_value  # type: ignore[union-attr]
    async with probing(source=source) as (_, client):
        texts = [(await client.get(path)).text for path in ("/livez", "/readyz", "/metrics")]

    for text in texts:
        assert "PRIVATE" not in text
        assert str(secret) not in text
        assert f"{secret:x}" not in text
    json.loads(texts[1])
