"""The process: its identity, its database, its probes and its server, put together."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ztmtls import logs
from ztmtls.audit import AuditLog
from ztmtls.authz import PolicyFile
from ztmtls.database import DatabaseTarget, create_engine, sync_engine
from ztmtls.fastapi import Problem
from ztmtls.probes import Probes
from ztmtls.secrets import RotatingSecret, WebIdentity
from ztmtls.server import serve as serve_mtls
from ztmtls.source import X509Source

from .app import create_app
from .database import Database
from .health import DatabaseHealth
from .ledger import Ledger
from .migrate import upgrade
from .settings import DatabaseSettings, MigrationSettings, Settings

SERVICE = "payments"


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM. What is late is waited for, with readiness red and saying why."""
    logs.setup(SERVICE, settings.log_level)
    audit = AuditLog(SERVICE)
    policy = PolicyFile(settings.policy_file)
    source = X509Source(settings.spiffe_endpoint_socket, expected_id=settings.spiffe_id)
    secret = _secret(settings)
    engine = create_engine(secret, _target(settings))
    database = Database(engine)
    health = DatabaseHealth(database)
    ledger = Ledger(database, settings.charge_limit)
    patience = settings.startup_timeout_seconds or None

    async def status_report() -> dict[str, Any]:
        try:
            use = await ledger.database_use()
        except Problem:
            use = None
        return {
            "identity": source.status().as_dict(),
            "credentials": secret.status(),
            "database": use,
        }

    checks = {"database": health.check}
    async with Probes(settings.probe_host, settings.probe_port, checks, source=source, audit=audit) as probes:
        async with source:
            await source.ready(patience)
            await health.wait(patience)
            try:
                await serve_mtls(
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
            finally:
                await engine.dispose()
