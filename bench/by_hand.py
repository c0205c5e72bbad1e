"""What ztmtls is measured against: TLS as people write it by hand, with certificates in files that never
change, and nobody's identity looked at; and uvicorn as it is."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding

from ztmtls.listen import Server
from ztmtls.testing import CertificateAuthority


def write(folder: Path, ca: CertificateAuthority, ids: Mapping[str, str]) -> None:
    """The authorities into ``ca.pem``, a certificate with its key for each SPIFFE ID into ``NAME.pem``."""
    authorities = [each.public_bytes(Encoding.PEM) for each in ca.bundle.authorities]
    (folder / "ca.pem").write_bytes(b"".join(authorities))
    for name, spiffe_id in ids.items():
        file = folder / f"{name}.pem"
        file.touch(0o600)
        file.write_bytes(ca.issue(spiffe_id, ttl=86400).pem())


def context(folder: Path, name: str, purpose: ssl.Purpose) -> ssl.SSLContext:
    """Mutual TLS with the certificate of `name`, to whoever has one of the same authority."""
    made = ssl.create_default_context(purpose, cafile=folder / "ca.pem")
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(folder / f"{name}.pem")
    return made


async def serve(app: Any, port: int, tls: ssl.SSLContext | None = None) -> None:
    """Serve `app` on a port of 127.0.0.1 until this is stopped, in the clear when there is no `tls`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        interface="asgi3",
        lifespan="off",
        http="httptools",
        ssl_context_factory=(lambda config, default: tls) if tls else None,
    )
    await Server(config).serve(sockets=[socket.create_server(("127.0.0.1", port), backlog=2048)])
