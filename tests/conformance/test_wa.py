"""WA: what a client makes of the stream."""

from __future__ import annotations

import grpc
import pytest

from tests.mtls.conftest import until
from ztmtls.source import SourceState
from ztmtls.svid import serial_text
from ztmtls.testing.workload_api import FETCH_X509_SVID

from .conftest import OURS, PEER, OurSide, conformance


@conformance("WA-1")
async def test_stream_that_the_agent_ended_is_opened_anew(ours: OurSide) -> None:
    first = await ours.rotated()
    calls = ours.workload.calls[FETCH_X509_SVID]

    ours.workload.end(grpc.StatusCode.UNAVAILABLE)
    await ours.workload.wait_for_calls(calls + 1, 15)
    await ours.workload.wait_for_streams(1, 15)
    second = ours.workload.rotate().serial

    assert set(await ours.served_until(second, 15)) <= {first, second}


@conformance("WA-2")
@pytest.mark.parametrize("field", ["svids", "spiffe_id", "x509_svid", "x509_svid_key", "bundle"])
async def test_update_without_a_mandatory_field_is_discarded(ours: OurSide, field: str) -> None:
    a = await ours.rotated()
    ours.in_force.clear()
    c, b = ours.ca.issue(OURS), ours.ca.issue(OURS)
    lacking = ours.workload.build_response(c)
    if field == "svids":
        lacking.ClearField(field)
    else:
        lacking.svids[0].ClearField(field)

    ours.workload.push_raw(lacking)
    assert await ours.served() == a
    ours.workload.push(b)
    seen = await ours.served_until(b.serial)

    assert set(seen) <= {a, b.serial}, "served all the while, and never the update that lacks something"
    assert ours.in_force == [b.serial]
    assert ours.workload.calls[FETCH_X509_SVID] == 1, "and on the same stream"


@conformance("WA-2")
async def test_one_lacking_svid_among_several_spoils_the_update(ours: OurSide) -> None:
    a = await ours.rotated()
    ours.in_force.clear()
    c, b = ours.ca.issue(OURS), ours.ca.issue(OURS)
    lacking = ours.workload.build_response(c, ours.ca.issue("spiffe://zt.example/second"))
    lacking.svids[1].ClearField("bundle")

    ours.workload.push_raw(lacking)
    ours.workload.push(b)

    assert set(await ours.served_until(b.serial)) <= {a, b.serial}
    assert ours.in_force == [b.serial]


@conformance("WA-3")
async def test_first_svid_is_the_default(ours: OurSide) -> None:
    a, b = ours.ca.issue(OURS), ours.ca.issue("spiffe://zt.example/second")

    ours.workload.push(a, b)
    await ours.served_until(a.serial)
    ours.workload.push(b, a)
    await ours.served_until(b.serial)

    assert ours.in_force[-2:] == [a.serial, b.serial]


@conformance("WA-4")
async def test_withdrawn_identity_is_not_presented_and_comes_back(ours: OurSide) -> None:
    a = await ours.rotated()
    assert (await ours.ask()).line == PEER

    ours.workload.redact()
    await ours.served_until(None, 5)
    answer = await ours.ask()

    assert (answer.line, answer.leaf) == ("", None)
    assert ours.source.state is SourceState.DENIED
    ours.workload.restore()
    await until(lambda: ours.source.state is SourceState.SERVING, 15)
    leaf = (await ours.ask()).leaf
    assert leaf is not None
    assert serial_text(leaf) == a
