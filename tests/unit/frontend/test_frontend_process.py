"""The frontend as a program behind a load balancer (`MODE=eks`): TLS with its SVID, and none is asked for."""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from pathlib import Path

import httpx
from cryptography import x509

from tests.processes import environment
from ztdev.ports import choose_free_ports
from ztmtls.testing import CertificateAuthority, WorkloadApi

FRONTEND = "spiffe://zt.example/ns/zt-demo/sa/frontend"


async def answer(url: str, context: ssl.SSLContext) -> httpx.Response:
    async with asyncio.timeout(20), httpx.AsyncClient(verify=context) as client:
        while True:
            try:
                return await client.get(url, headers={"Host": "page.example"})
            except httpx.ConnectError:
                await asyncio.sleep(0.05)


async def test_a_load_balancer_is_served_over_tls(tmp_path: Path) -> None:
    ca = CertificateAuthority("zt.example")
    port, probe_port = choose_free_ports(2)
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    async with WorkloadApi() as api:
        workload = await api.add_workload("frontend", FRONTEND, ca=ca)
        workload.allow(uid=os.getuid())
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "frontend"),
            env=environment(
                SPIFFE_ENDPOINT_SOCKET=workload.endpoint,
                SPIFFE_ID=FRONTEND,
                MODE="eks",
                ALLOWED_HOSTS="page.example",
                CSRF_KEY_FILE=str(key),
                PORT=str(port),
                PROBE_PORT=str(probe_port),
                ORDERS_URL="https://127.0.0.1:1",
                ORDERS_SPIFFE_ID="spiffe://zt.example/ns/zt-demo/sa/orders",
                DRAIN_SECONDS="0",
                GRACE_SECONDS="1",
            ),
        )
        try:
            asks_nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            asks_nobody.check_hostname = False
            asks_nobody.verify_mode = ssl.CERT_NONE
            page = await answer(f"https://127.0.0.1:{port}/", asks_nobody)
            assert page.headers["strict-transport-security"]
            pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
            presented = x509.load_pem_x509_certificate(pem.encode())
            names = presented.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.UniformResourceIdentifier) == [FRONTEND]
        finally:
            process.terminate()
            assert await process.wait() == 0
