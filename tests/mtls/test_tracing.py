"""OpenTelemetry spans: both sides of a hop in one trace, with who was verified and what was refused."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.mtls.conftest import CALLER, SERVER, STRANGER, serving
from ztmtls import tracing
from ztmtls.client import AsyncClient, Client, ServerRefused
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority
from ztmtls.tracing import exported


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


class Collector:
    """Takes spans by OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                collector.paths.append(self.path)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_spans_are_sent_to_the_collector_before_the_end() -> None:
    with Collector() as collector:
        with exported("orders", f"{collector.url}/") as tracer:
            assert tracer is not None
            with tracer.start_as_current_span("a"):
                pass
        assert collector.paths == ["/v1/traces"]
        (resource,) = collector.requests[0].resource_spans
        assert {each.key: each.value.string_value for each in resource.resource.attributes}[
            "service.name"
        ] == "orders"
        assert [span.name for span in resource.scope_spans[0].spans] == ["a"]


def test_without_a_collector_there_is_no_tracer() -> None:
    with exported("orders", None) as tracer:
        assert tracer is None


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # connects, and never answers
        began = time.monotonic()
        with exported("orders", f"http://127.0.0.1:{deaf.getsockname()[1]}") as tracer:
            assert tracer is not None
            with tracer.start_as_current_span("a"):
                pass
            assert time.monotonic() - began < 5
            stopping = time.monotonic()
        assert time.monotonic() - stopping < tracing._FLUSH + 2


async def test_a_request_of_people_begins_a_trace_and_believes_nobody(
    tracer: Any, exporter: InMemorySpanExporter
) -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    forged = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    transport = httpx.ASGITransport(app=tracing.Traced(page, tracer))
    async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
        assert (await client.get("/thing", headers=forged)).status_code == 200
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" not in forged["traceparent"]
    attributes = dict(span.attributes or {})
    assert (attributes["url.path"], attributes["url.scheme"]) == ("/thing", "http")
    assert "ztmtls.peer.id" not in attributes
