"""The process: its identity, its credentials, its database, its probes and its server, put together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from ztmtls import logs, server
from ztmtls.audit import AuditLog
from ztmtls.authz import PolicyFile
from ztmtls.database import DatabaseTarget, create_engine, keep_fresh, sync_engine
from ztmtls.fastapi import Problem
from ztmtls.probes import Probes
from ztmtls.reasons import Refusal
from ztmtls.secrets import RotatingSecret, WebIdentity
from ztmtls.source import X509Source

from .app import create_app
from .database import SERVICE, Database
from .health import DatabaseHealth, wait_for
from .ledger import Ledger
from .migrate import upgrade
from .settings import DatabaseSettings, MigrationSettings, Settings


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM. What is late is waited for, with readiness red and saying why."""
    logs.setup(SERVICE, settings.log_level)
    audit = AuditLog(SERVICE)
    policy = PolicyFile(settings.policy_file)
    source = X509Source(settings.spiffe_endpoint_socket, expected_id=settings.spiffe_id)
    secret = _secret(settings, audit)
    engine = create_engine(secret, _target(settings), application_name=SERVICE)
    database = Database(engine)
    health = DatabaseHealth(database)
    ledger = Ledger(database, settings.charge_limit)
    probes = Probes(
        settings.probe_host,
        settings.probe_port,
        {"credentials": secret.check, "database": health.check},
        source=source,
        audit=audit,
    )

    async def status_report() -> dict[str, Any]:
        try:
            use = await ledger.database_use()
        except Problem:
            use = None
        return {"identity": source.status().as_dict(), "credentials": secret.status(), "database": use}

    patience = settings.startup_timeout_seconds or None
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(probes)
        await stack.enter_async_context(source)
        await stack.enter_async_context(secret)
        stack.push_async_callback(engine.dispose)
        await source.ready(patience)
        await wait_for(health.check, patience)
        await stack.enter_async_context(_beside(keep_fresh(engine)))
        await server.serve(
            create_app(ledger, status_report),
            source=source,
            policy=policy,
            host=settings.host,
            port=settings.port,
            probes=probes,
            audit=audit,
            http=settings.http,
            drain=settings.drain_seconds,
            grace=settings.grace_seconds,
        )


async def migrate(settings: MigrationSettings) -> None:
    """Bring the schema up to date, as soon as the database can be used."""
    logs.setup(SERVICE, settings.log_level)
    secret = _secret(settings, AuditLog(SERVICE))
    engine = sync_engine(secret, _target(settings), application_name=f"{SERVICE}-migrate")

    async def attempt() -> str | None:
        try:
            await asyncio.to_thread(upgrade, engine)
        except Refusal as refusal:
            return str(refusal)
        return None

    try:
        await wait_for(attempt, settings.startup_timeout_seconds or None)
    finally:
        secret.close()


def _secret(settings: DatabaseSettings, audit: AuditLog) -> RotatingSecret:
    return RotatingSecret(
        settings.db_secret_id,
        WebIdentity.from_env(os.environ),
        endpoint_url=settings.aws_endpoint_url,
        audit=audit,
    )


def _target(settings: DatabaseSettings) -> DatabaseTarget:
    return DatabaseTarget(settings.db_host, settings.db_port, settings.db_name, settings.db_ca_file)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """Let `work` run as long as the block does."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
