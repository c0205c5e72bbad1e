"""EP: the Workload Endpoint."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.mtls.conftest import until
from ztmtls.source import X509Source
from ztmtls.testing import CertificateAuthority, Workload
from ztmtls.testing.workload_api import FETCH_X509_SVID
from ztmtls.workload_endpoint import InvalidEndpoint

from .conftest import OURS, agent, conformance
from .peers import tcp_front


async def ready(endpoint: str | None, timeout: float = 10.0) -> str:
    """Who a new source becomes at this endpoint."""
    async with X509Source(endpoint) as source:
        return str((await source.ready(timeout)).svid.id)


@conformance("EP-1")
async def test_the_environment_names_the_endpoint(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", workload.endpoint)

    assert await ready(None) == OURS


@conformance("EP-1")
async def test_explicit_configuration_goes_before_the_environment(
    workload: Workload, ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent(ca, "spiffe://zt.example/another") as another:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", another.endpoint)
        assert await ready(None) == "spiffe://zt.example/another"

        assert await ready(workload.endpoint) == OURS


@conformance("EP-2")
async def test_every_call_carries_the_security_header(workload: Workload) -> None:
    async with X509Source(workload.endpoint) as source:
        await source.ready(15)
        workload.end(grpc.StatusCode.UNAVAILABLE)
        workload.fail_next(grpc.StatusCode.UNAVAILABLE)
        await workload.wait_for_calls(3)
        await workload.wait_for_streams(1)

    assert workload.calls.keys() == {FETCH_X509_SVID}
    assert workload.calls_without_header == 0


@conformance("EP-3")
async def test_endpoint_on_tcp(workload: Workload) -> None:
    async with tcp_front(str(workload.path)) as port:
        assert await ready(f"tcp://127.0.0.1:{port}") == OURS


@conformance("EP-4")
@pytest.mark.parametrize("scheme", ["unix", "tcp"])
async def test_address_with_a_part_too_many_is_refused_without_a_call(
    workload: Workload, scheme: str
) -> None:
    async with tcp_front(str(workload.path)) as port:
        good, bad = {
            "unix": (f"unix://{workload.path}", f"unix://localhost{workload.path}"),
            "tcp": (f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port}/path"),
        }[scheme]
        assert await ready(good) == OURS

        with pytest.raises(InvalidEndpoint):
            X509Source(bad)

        assert await ready(good) == OURS
        assert workload.calls[FETCH_X509_SVID] == 2


@conformance("EP-4")
@pytest.mark.parametrize(
    "address",
    [
        "tcp://1.2.3.4:5#x", "tcp://john:doe@1.2.3.4:5/path", "tcp://1.2.3.4:5/", "tcp://foo", "tcp://:5",
        "tcp://1.2.3.4:", "tcp://[::1]", "tcp://[::1]x:5", "unix://foo", "unix://foo?x", "unix://foo#x",
        "unix://john:doe@foo/path", "unix://tmp/x", "unix:/a?", "unix:/a#", "unix:relative/path", "tcp:/a",
    ],
)  # fmt: skip
def test_address_that_no_endpoint_can_have(address: str) -> None:
    with pytest.raises(InvalidEndpoint):
        X509Source(address)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(grpc.StatusCode.UNAVAILABLE, marks=conformance("EP-5"), id="EP-5"),
        pytest.param(grpc.StatusCode.PERMISSION_DENIED, marks=conformance("EP-6"), id="EP-6"),
    ],
)
async def test_refused_call_is_made_again_after_a_pause(workload: Workload, code: grpc.StatusCode) -> None:
    workload.fail_next(code, 3)
    moments: list[float] = []
    async with X509Source(workload.endpoint) as source:
        for count in range(1, 5):
            await workload.wait_for_calls(count)
            moments.append(asyncio.get_running_loop().time())

        assert str((await source.ready(10)).svid.id) == OURS

    assert (moments[-1] - moments[0]) / 3 >= 0.05, "seconds between calls"
    assert workload.calls[FETCH_X509_SVID] == 4


@conformance("EP-7")
async def test_invalid_argument_is_not_asked_again_and_again(ca: CertificateAuthority) -> None:
    loop = asyncio.get_running_loop()
    async with agent(ca) as workload, agent(ca) as control:
        workload.fail_next(grpc.StatusCode.INVALID_ARGUMENT, None)
        control.fail_next(grpc.StatusCode.UNAVAILABLE, None)
        begun = loop.time()
        async with X509Source(workload.endpoint) as source, X509Source(control.endpoint):
            await until(lambda: control.calls[FETCH_X509_SVID] >= 6 and loop.time() - begun >= 5, 15)

            assert 1 <= workload.calls[FETCH_X509_SVID] <= 2
            assert "INVALID_ARGUMENT" in source.status().reason

        workload.stop_failing()
        assert await ready(workload.endpoint) == OURS


@conformance("EP-8")
async def test_endpoint_that_is_not_there_yet(workload: Workload) -> None:
    await workload.stop()
    async with X509Source(workload.endpoint) as source:
        await until(lambda: source.status().failures >= 4, 10)
        assert not workload.path.exists()
        await workload.start()

        assert str((await source.ready(30)).svid.id) == OURS
