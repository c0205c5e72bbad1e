"""People order while all that runs out is replaced: certificates, the authority, the logins."""

from __future__ import annotations

import re
from functools import partial

from tests.compose.project import Project
from tests.replacing import TRUSTED, chain, no_order_fails_while_everything_is_replaced
from tests.waiting import until

SERVER = ("exec", "-T", "spire-server", "/opt/spire/bin/spire-server")
SOCKET = ("-socketPath", "/srv/spire/socket/api.sock")


def spire_server(project: Project, *command: str) -> str:
    return project.compose(*SERVER, *command, *SOCKET)


def authorities_trusted(project: Project, service: str) -> int:
    return int(project.python(service, TRUSTED))


def test_a_login_is_replaced_when_somebody_asks(project: Project) -> None:
    def login() -> str:
        told = next(each for each in chain(project.url) if each["service"] == "orders")
        return str(told["credentials"]["version"])

    before = login()
    python = project.container("cloud")["Config"]["Entrypoint"][0]
    said = project.compose("exec", "-T", "cloud", python, "-m", "ztdev.containers", "rotate", "orders")
    assert re.search(r"orders: orders_app(_clone)? → orders_app(_clone)?  version", said)
    until(lambda: login() != before, 30, "orders uses another login")


def test_no_order_fails_while_everything_is_replaced(project: Project) -> None:
    """Logins and certificates are replaced by themselves."""
    orders = no_order_fails_while_everything_is_replaced(
        project.url, partial(spire_server, project), partial(authorities_trusted, project), certificates=3
    )
    assert orders.paid > 100
