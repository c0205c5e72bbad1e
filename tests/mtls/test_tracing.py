"""OpenTelemetry spans: both sides of a hop in one trace, with who was verified and what was refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.mtls.conftest import CALLER, SERVER, STRANGER, serving
from ztmtls.client import AsyncClient, Client, ServerRefused
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Any:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("tests")


def spans(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, ReadableSpan]:
    """The client's and the server's span of one request."""
    found = {span.kind: span for span in exporter.get_finished_spans()}
    return found[SpanKind.CLIENT], found[SpanKind.SERVER]


@pytest.mark.parametrize("blocking", [False, True])
async def test_both_sides_of_a_hop_are_one_trace(
    server_source: StaticSource,
    caller: StaticSource,
    tracer: Any,
    exporter: InMemorySpanExporter,
    blocking: bool,
) -> None:
    async with serving(server_source, tracer=tracer) as served:
        if blocking:
            with Client(caller, peer=SERVER, base_url=served.url, tracer=tracer) as client:
                assert (await asyncio.to_thread(client.get, "/thing")).status_code == 200
        else:
            async with AsyncClient(caller, peer=SERVER, base_url=served.url, tracer=tracer) as async_client:
                assert (await async_client.get("/thing")).status_code == 200
    sent, received = spans(exporter)
    assert sent.context is not None
    assert received.parent is not None
    assert received.parent.span_id == sent.context.span_id
    for span, own, peer in ((sent, CALLER, SERVER), (received, SERVER, CALLER)):
        attributes = dict(span.attributes or {})
        assert (attributes["ztmtls.own.id"], attributes["ztmtls.peer.id"]) == (own, peer)
        assert (attributes["http.response.status_code"], attributes["url.path"]) == (200, "/thing")
    assert dict(received.attributes or {})["ztmtls.rule"] == "caller-reads"


async def test_refusal_by_the_policy_is_told_by_both(
    server_source: StaticSource, ca: CertificateAuthority, tracer: Any, exporter: InMemorySpanExporter
) -> None:
    stranger = StaticSource(ca.context(ca.issue(STRANGER)))
    async with (
        serving(server_source, tracer=tracer) as served,
        AsyncClient(stranger, peer=SERVER, base_url=served.url, tracer=tracer) as client,
    ):
        assert (await client.get("/thing")).status_code == 403
    sent, received = spans(exporter)
    assert dict(sent.attributes or {})["http.response.status_code"] == 403
    assert dict(received.attributes or {})["ztmtls.reason"] == Reason.CALLER_NOT_ALLOWED
    assert received.status.status_code is StatusCode.ERROR


async def test_wrong_server_is_told_by_the_client(
    server_source: StaticSource, caller: StaticSource, tracer: Any, exporter: InMemorySpanExporter
) -> None:
    async with (
        serving(server_source) as served,
        AsyncClient(caller, peer=STRANGER, base_url=served.url, tracer=tracer) as client,
    ):
        with pytest.raises(ServerRefused):
            await client.get("/thing")
    (sent,) = exporter.get_finished_spans()
    assert dict(sent.attributes or {})["ztmtls.reason"] == Reason.WRONG_SERVER_IDENTITY
