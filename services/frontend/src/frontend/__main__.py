"""Run the frontend: ``python -m frontend``. Its settings are environment variables; see ``--help``."""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext

import httpx
from opentelemetry.trace import Tracer
from pydantic_core import PydanticUndefined

from ztmtls import logs
from ztmtls.audit import AuditLog
from ztmtls.client import AsyncClient, hop
from ztmtls.probes import Probes
from ztmtls.server import run, serve_public
from ztmtls.settings import load
from ztmtls.source import X509Source
from ztmtls.tracing import exported

from .app import create_app
from .lab import Lab
from .orders import SERVICE, Orders
from .settings import Settings
from .streams import Streams

CONNECT_TIMEOUT = 3.0

logger = logging.getLogger(__name__)


def main() -> None:
    """Read the settings and serve until SIGTERM or SIGINT."""
    argparse.ArgumentParser(
        prog="python -m frontend",
        description="The frontend: pages for people, orders over mutual TLS.",
        epilog="Settings, as environment variables:\n" + describe(Settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    settings = load(Settings)
    logs.setup(SERVICE, settings.log_level)
    with exported(SERVICE, settings.otel_exporter_otlp_endpoint) as tracer:
        run(lambda: serve(settings, tracer), loop=settings.loop)


async def serve(settings: Settings, tracer: Tracer | None) -> None:
    """Wait for an identity, then serve the pages; probes answer from the first moment."""
    audit = AuditLog(SERVICE)
    source = X509Source(settings.spiffe_endpoint_socket, expected_id=settings.spiffe_id)
    client = AsyncClient(
        source,
        peer=settings.orders_spiffe_id,
        base_url=settings.orders_url,
        timeout=httpx.Timeout(settings.orders_timeout_seconds, connect=CONNECT_TIMEOUT),
        audit=audit,
        tracer=tracer,
    )
    orders = Orders(client, hop)
    lab = Lab(settings.lab_socket) if settings.lab_socket else None
    streams = Streams(audit)
    app = create_app(
        settings,
        orders=orders,
        identity=lambda: source.status().as_dict(),
        audit=audit,
        streams=streams,
        lab=lab,
    )
    checks = {"orders": orders.answered_recently}
    async with (
        Probes(settings.probe_host, settings.probe_port, checks, source=source, audit=audit) as probes,
        source,
        client,
        lab or nullcontext(),
    ):
        await source.ready(settings.startup_timeout_seconds or None)
        logger.info("pages on %s port %d, orders at %s", settings.host, settings.port, settings.orders_url)
        await serve_public(
            app,
            host=settings.host,
            port=settings.port,
            source=source if settings.https else None,
            probes=probes,
            http=settings.http,
            drain=settings.drain_seconds,
            grace=settings.grace_seconds,
            tracer=tracer,
            on_stopping=streams.close,
        )


def describe(settings: type[Settings]) -> str:
    """One line per setting: its variable, its default, what it is."""
    lines = []
    for name, field in settings.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"default: {field.default}"
        lines.append(f"  {name.upper():25} {field.description} ({default})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
