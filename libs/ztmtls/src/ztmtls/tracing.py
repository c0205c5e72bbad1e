"""Optional OpenTelemetry spans that say who was verified on each side of a hop.

Give `server.serve` or a client a `tracer` and it makes one span per request, with the identities as
attributes: ``ztmtls.own.id``, ``ztmtls.peer.id``, ``ztmtls.peer.serial``, ``ztmtls.connection``,
``ztmtls.generation``, ``ztmtls.rule``, and ``ztmtls.reason`` for a refusal. The others follow
OpenTelemetry's conventions for HTTP. Trace context travels in ``traceparent`` (W3C Trace Context); a server
reads that of a verified caller only. Needs the extra `otel`, and an OpenTelemetry SDK of your choice, or the
extra `otlp` and `exported`, which sends spans to a collector.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from opentelemetry import propagate
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from .asgi import ASGIApp, Message, Receive, Scope, Send
from .guard import refusal_of
from .hop import HopView, hop
from .identity import NoPeer, request_identity
from .reasons import Refusal

#: Seconds that the last spans have to reach their collector when a service stops.
_FLUSH = 2.0


@contextmanager
def exported(service: str, endpoint: str | None) -> Iterator[Tracer | None]:
    """A tracer whose spans are sent to a collector, or None when there is no `endpoint`.

    `endpoint` is the base address of OTLP over HTTP: spans go to ``<endpoint>/v1/traces``, in batches from a
    thread of their own. A collector that is away costs spans, never requests; it is told in the log.
    Sampling, headers and certificates are OpenTelemetry's own variables (``OTEL_TRACES_SAMPLER``,
    ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_EXPORTER_OTLP_CERTIFICATE``). Needs the extra `otlp`.
    """
    if endpoint is None:
        yield None
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield provider.get_tracer("ztmtls")
    finally:
        # Its own patience with a collector that is away is longer than a stopping service has.
        flushing = threading.Thread(target=provider.shutdown, name="spans", daemon=True)
        flushing.start()
        flushing.join(_FLUSH)


class Traced:
    """ASGI middleware: a span per request, refused or served.

    Around a `guard.Guard`, with the identities of the hop. Around what `server.serve_public` serves there are
    none, and each request begins a trace of its own.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        method = scope.get("method", "WEBSOCKET")
        try:
            hop = request_identity(scope).connection.view()
        except NoPeer:
            hop = None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._tracer.start_as_current_span(
            method,
            context=propagate.extract(headers) if hop else None,
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "url.path": scope["path"],
                "url.scheme": scope["scheme"],
            },
        ) as span:

            async def noting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            if hop is not None:
                _describe(span, hop)
            await self._app(scope, receive, noting)
            refusal = refusal_of(scope)
            if refusal is not None:
                _refused(span, refusal)
            elif hop is not None:
                span.set_attribute("ztmtls.rule", request_identity(scope).rule or "")


class TracedAsyncTransport(httpx.AsyncBaseTransport):
    """A span around each request of `client.AsyncClient`, until the head of the response is there."""

    def __init__(self, inner: httpx.AsyncBaseTransport, tracer: Tracer) -> None:
        self._inner = inner
        self._tracer = tracer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """As the transport inside."""
        with _client_span(self._tracer, request) as span:
            response = await self._inner.handle_async_request(request)
            _received(span, response)
            return response

    async def aclose(self) -> None:
        """As the transport inside."""
        await self._inner.aclose()


class TracedTransport(httpx.BaseTransport):
    """The same for `client.Client`."""

    def __init__(self, inner: httpx.BaseTransport, tracer: Tracer) -> None:
        self._inner = inner
        self._tracer = tracer

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """As the transport inside."""
        with _client_span(self._tracer, request) as span:
            response = self._inner.handle_request(request)
            _received(span, response)
            return response

    def close(self) -> None:
        """As the transport inside."""
        self._inner.close()


@contextmanager
def _client_span(tracer: Tracer, request: httpx.Request) -> Iterator[Span]:
    url = request.url
    attributes: dict[str, str | int] = {
        "http.request.method": request.method,
        "server.address": url.host,
        "server.port": url.port or 443,
        "url.path": url.path,
    }
    with tracer.start_as_current_span(request.method, kind=SpanKind.CLIENT, attributes=attributes) as span:
        propagate.inject(request.headers)
        try:
            yield span
        except Refusal as refusal:
            _refused(span, refusal)
            raise


def _received(span: Span, response: httpx.Response) -> None:
    span.set_attribute("http.response.status_code", response.status_code)
    _describe(span, hop(response))


def _describe(span: Span, hop: HopView) -> None:
    span.set_attributes(
        {
            "ztmtls.own.id": hop.own.id,
            "ztmtls.peer.id": hop.peer.id,
            "ztmtls.peer.serial": hop.peer.serial,
            "ztmtls.connection": hop.connection,
            "ztmtls.generation": hop.generation,
            "tls.protocol.version": hop.tls_version.removeprefix("TLSv"),
        }
    )


def _refused(span: Span, refusal: Refusal) -> None:
    span.set_attribute("ztmtls.reason", str(refusal.reason))
    span.set_status(Status(StatusCode.ERROR, str(refusal.reason)))


__all__ = ["Traced", "TracedAsyncTransport", "TracedTransport", "exported"]
