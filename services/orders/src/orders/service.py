"""The process: its identity, its credentials, its database, its probes and its server, put together."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from opentelemetry.trace import Tracer

from ztmtls import logs, server
from ztmtls.audit import AuditLog
from ztmtls.authz import PolicyFile
from ztmtls.client import AsyncClient
from ztmtls.database import NoDatabase, create_engine, keep_fresh, sync_engine
from ztmtls.lifecycle import beside, wait_for
from ztmtls.migrations import DatabaseHealth
from ztmtls.probes import Probes
from ztmtls.settings import MigrationSettings
from ztmtls.source import X509Source
from ztmtls.transactions import Database

from . import SERVICE
from .app import Parts, create_app
from .checkout import Checkout, reconcile
from .migrations import MIGRATIONS
from .payments import Payments
from .settings import Settings
from .store import Orders


async def serve(settings: Settings, tracer: Tracer | None) -> None:
    """Serve until SIGTERM. What is late is waited for, with readiness red and saying why."""
    logs.setup(SERVICE, settings.log_level)
    audit = AuditLog(SERVICE)
    policy = PolicyFile(settings.policy_file, audit)
    source = X509Source(settings.spiffe_endpoint_socket, expected_id=settings.spiffe_id)
    secret = settings.database_secret(audit)
    engine = create_engine(secret, settings.database_target(), application_name=SERVICE, audit=audit)
    database = Database(engine)
    health = DatabaseHealth(database, MIGRATIONS)
    orders = Orders(database)
    client = AsyncClient(
        source, peer=settings.payments_spiffe_id, base_url=settings.payments_url, audit=audit, tracer=tracer
    )
    payments = Payments(client)
    checkout = Checkout(orders, payments)
    probes = Probes(
        settings.probe_host,
        settings.probe_port,
        {"credentials": secret.check, "database": health.check},
        source=source,
        audit=audit,
        secret=secret,
    )

    async def status_report() -> dict[str, Any]:
        try:
            use = await orders.database_use()
        except NoDatabase:
            use = None
        return {
            "identity": source.status().as_dict(),
            "credentials": secret.status(),
            "database": use,
            "decisions": audit.report(),
        }

    patience = settings.startup_timeout_seconds or None
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(probes)
        await stack.enter_async_context(source)
        await stack.enter_async_context(secret)
        stack.push_async_callback(engine.dispose)
        await stack.enter_async_context(client)
        await source.ready(patience)
        await wait_for(health.check, patience)
        await stack.enter_async_context(beside(keep_fresh(engine)))
        await stack.enter_async_context(beside(reconcile(checkout)))
        await server.serve(
            create_app(Parts(orders, checkout, payments, status_report)),
            source=source,
            policy=policy,
            host=settings.host,
            port=settings.port,
            probes=probes,
            audit=audit,
            http=settings.http,
            drain=settings.drain_seconds,
            grace=settings.grace_seconds,
            live_limits=settings.live_limits(),
            tracer=tracer,
        )


async def migrate(settings: MigrationSettings) -> None:
    """Bring the schema up to date, as soon as the database can be used."""
    logs.setup(SERVICE, settings.log_level)
    secret = settings.database_secret(AuditLog(SERVICE))
    engine = sync_engine(secret, settings.database_target(), application_name=f"{SERVICE}-migrate")
    try:
        await MIGRATIONS.upgrade_when_possible(engine, settings.startup_timeout_seconds or None)
    finally:
        secret.close()
