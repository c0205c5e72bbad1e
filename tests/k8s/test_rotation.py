"""People order while all that runs out is replaced: certificates, the authority, the logins."""

from __future__ import annotations

from tests.replacing import TRUSTED, no_order_fails_while_everything_is_replaced
from ztdev.kubernetes.kubectl import kubectl, python

SERVER = (
    "exec",
    "statefulset/spire-server",
    "--container",
    "spire-server",
    "--",
    "/opt/spire/bin/spire-server",
)
SOCKET = ("-socketPath", "/run/spire/server/api.sock")
CLOUD = ("exec", "statefulset/data", "--container", "cloud", "--")


def spire_server(*command: str) -> str:
    return kubectl("--namespace", "spire-system", *SERVER, *command, *SOCKET)


def authorities_trusted(service: str) -> int:
    return int(python("zt-demo", f"deployment/{service}", TRUSTED))


def replace_logins() -> None:
    """Twice: each service uses the first of its logins again, with another password."""
    for _ in range(2):
        for service in ("orders", "payments"):
            rotate = ("/srv/zt/.venv/bin/python", "-m", "ztdev.containers", "rotate", service)
            kubectl("--namespace", "zt-local", *CLOUD, *rotate)


def test_no_order_fails_while_everything_is_replaced(page: str) -> None:
    orders = no_order_fails_while_everything_is_replaced(
        page, spire_server, authorities_trusted, replace_logins=replace_logins
    )
    assert orders.paid > 50
