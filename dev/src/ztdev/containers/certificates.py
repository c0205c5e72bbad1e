"""Made before anything else runs, each into volumes of its own, and kept until they are about to run out.

The key of the authority that signs is forgotten at once, so nothing can sign a second certificate.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from ztdev.files import replace_file
from ztdev.postgres import ServerTls, make_server_tls

#: One that has less left is replaced.
LEAST_LEFT = timedelta(days=60)

DATABASE = Path("/srv/database")
NODE = Path("/srv/node")
ISSUER = Path("/srv/issuer")

#: Who SPIRE's JWT-SVIDs are from, as server.conf and oidc.conf say.
ISSUER_HOST = "oidc.zt.example"

#: The name of the one node, in its certificate.
NODE_NAME = "zt-demo node"


def database() -> None:
    """For PostgreSQL: `tls/server.crt` and its key, `authority/ca.pem` for those who call it, and
    `administrator/password`. Run as the server's user, who must own the key."""
    certificate = DATABASE / "tls" / "server.crt"
    if _lasts(certificate):
        return
    replace_file(DATABASE / "administrator" / "password", secrets.token_urlsafe(32).encode(), 0o444)
    _make(certificate, DATABASE, make_server_tls(("postgres",)))


def node() -> None:
    """For SPIRE: by which certificate the agent is the node (`x509pop`), and its authority for the server.
    Run as the agent's user."""
    certificate = NODE / "agent" / "agent.pem"
    if not _lasts(certificate):
        _make(certificate, NODE, make_server_tls(("node",), name=NODE_NAME))


def issuer() -> None:
    """For SPIRE's OIDC discovery provider: `tls/server.crt` and its key, and `authority/ca.pem` for the local
    AWS, which fetches the issuer's keys. Run as the provider's user."""
    certificate = ISSUER / "tls" / "server.crt"
    if not _lasts(certificate):
        _make(certificate, ISSUER, make_server_tls((ISSUER_HOST,), name="zt-demo issuer"))


def _make(certificate: Path, folder: Path, tls: ServerTls) -> None:
    """Write the key beside the `certificate`, and the authority below `folder`."""
    replace_file(certificate.with_suffix(".key"), tls.key, 0o600)
    replace_file(folder / "authority" / "ca.pem", tls.authorities, 0o644)
    replace_file(certificate, tls.certificate, 0o644)  # last: what is half done is done again


def _lasts(file: Path) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return certificate.not_valid_after_utc - datetime.now(UTC) > LEAST_LEFT
