"""A whole service: ``small_service.py SPIFFE_ID PORT PROBE_PORT STARTUP_TIMEOUT``; 0 waits for ever."""

from __future__ import annotations

import logging
import sys

from tests.mtls.conftest import POLICY, make_app
from ztmtls import server
from ztmtls.audit import AuditLog
from ztmtls.probes import Probes
from ztmtls.source import X509Source


async def main() -> None:
    spiffe_id, port, probe_port, patience = sys.argv[1:]
    source = X509Source(expected_id=spiffe_id)
    probes = Probes("127.0.0.1", int(probe_port), source=source)
    async with probes, source:
        await source.ready(float(patience) or None)
        await server.serve(
            make_app([]),
            source=source,
            policy=POLICY,
            host="127.0.0.1",
            port=int(port),
            audit=AuditLog("small"),
            probes=probes,
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    server.run(main)
