"""Who reaches whom: what must connect, and what must not, tried from inside of each container."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.compose.project import Project, gateways, probe

#: Where each container listens; the probes listen on 127.0.0.1 of their own container.
LISTENS = {
    "frontend": 8080,
    "orders": 8443,
    "payments": 8443,
    "cloud": 4566,
    "oidc": 8443,
    "postgres": 5432,
    "spire-server": 8081,
}
ALL = (*LISTENS, "spire-agent", "registrar")

#: Who has business with whom.
MUST = {
    ("frontend", "orders"),
    ("orders", "payments"),
    ("orders", "postgres"),
    ("payments", "postgres"),
    ("orders", "cloud"),
    ("payments", "cloud"),
    ("cloud", "postgres"),
    ("cloud", "oidc"),
    ("spire-agent", "spire-server"),
}

#: The other end of a segment can answer on it, too. What it gets there is a handshake that is refused.
SAME_SEGMENT = {(to, who) for who, to in MUST}


@pytest.fixture(scope="module")
def addresses(project: Project) -> dict[str, list[str]]:
    """Every address of each container that listens."""
    return {service: project.addresses(service) for service in LISTENS}


@pytest.mark.parametrize("service", ALL)
def test_each_container_reaches_those_it_has_business_with_and_nobody_else(
    project: Project, addresses: dict[str, list[str]], service: str
) -> None:
    others = [name for name in LISTENS if name != service]
    called = [(name, host) for name in others for host in (*addresses[name], name)]
    outcomes = probe(project.network_of(service), [(host, LISTENS[name]) for name, host in called])
    found = list(zip((name for name, _ in called), outcomes, strict=True))
    connected = {name for name, outcome in found if outcome == "connected"}
    reached = {name for name, outcome in found if outcome != "unreachable"}
    must = {to for who, to in MUST if who == service}
    may = must | {to for who, to in SAME_SEGMENT if who == service}
    assert must <= connected
    assert reached <= may


@pytest.fixture
def ours(project: Project) -> Iterator[list[tuple[str, int]]]:
    """Somebody listens at each address that this machine has towards containers."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server((address, 0))) for address in gateways(project.name)
        ]
        yield [server.getsockname() for server in servers]


@pytest.mark.parametrize("service", [service for service in ALL if service != "frontend"])
def test_nothing_inside_reaches_this_machine(
    project: Project, ours: list[tuple[str, int]], service: str
) -> None:
    """The page's own network is published, and so has the machine at its other end."""
    for address in ours:
        socket.create_connection(address, timeout=2).close()
    assert set(probe(project.network_of(service), ours)) == {"unreachable"}


def test_the_page_reaches_the_machine_at_the_other_end_of_its_network(
    project: Project, ours: list[tuple[str, int]]
) -> None:
    """It is said so in docs/compose.md, and it shows that what the others do not reach is there."""
    assert "connected" in probe(project.network_of("frontend"), ours)
