"""Who reaches whom: what must connect, and what must not, tried from inside of each container."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from tests.compose.project import TOOLS, Project, docker, gateways

#: Where each container listens; the probes listen on 127.0.0.1 of their own container.
LISTENS = {
    "frontend": 8080,
    "orders": 8443,
    "payments": 8443,
    "cloud": 4566,
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
    ("spire-agent", "spire-server"),
}

#: The other end of a segment can answer on it, too. What it gets there is a handshake that is refused.
SAME_SEGMENT = {(to, who) for who, to in MUST}

TRY = """
import json, socket, sys
found = []
for name, host, port in json.loads(sys.argv[1]):
    try:
        socket.create_connection((host, port), timeout=1.5).close()
        found.append(name)
    except OSError:
        pass
print(json.dumps(found))
"""


def reached_from(project: Project, service: str, targets: list[tuple[str, str, int]]) -> set[str]:
    """Which of `targets` (name, host, port) accept a connection from the network of `service`."""
    container = project.container(service)["Id"]
    output = docker(
        *("run", "--rm", "--network", f"container:{container}", "--entrypoint", "/srv/zt/.venv/bin/python"),
        *(TOOLS, "-c", TRY, json.dumps(targets)),
    )
    return set(json.loads(output))


@pytest.fixture(scope="module")
def addresses(project: Project) -> dict[str, list[str]]:
    """Every address of each container that listens."""
    return {
        service: [
            network["IPAddress"]
            for network in project.container(service)["NetworkSettings"]["Networks"].values()
            if network["IPAddress"]
        ]
        for service in LISTENS
    }


@pytest.mark.parametrize("service", ALL)
def test_each_container_reaches_those_it_has_business_with_and_nobody_else(
    project: Project, addresses: dict[str, list[str]], service: str
) -> None:
    targets = [
        (name, address, LISTENS[name])
        for name, known in addresses.items()
        if name != service
        for address in known
    ]
    by_name = [(name, name, LISTENS[name]) for name in LISTENS if name != service]
    reached = reached_from(project, service, [*targets, *by_name])
    must = {to for who, to in MUST if who == service}
    may = must | {to for who, to in SAME_SEGMENT if who == service}
    assert must <= reached
    assert reached <= may


@pytest.fixture
def ours(project: Project) -> Iterator[list[tuple[str, str, int]]]:
    """Somebody listens at each address that this machine has towards containers."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server((address, 0))) for address in gateways(project.name)
        ]
        yield [(server.getsockname()[0], *server.getsockname()) for server in servers]


@pytest.mark.parametrize("service", [service for service in ALL if service != "frontend"])
def test_nothing_inside_reaches_this_machine(
    project: Project, ours: list[tuple[str, str, int]], service: str
) -> None:
    """The page's own network is published, and so has the machine at its other end."""
    for _, address, port in ours:
        socket.create_connection((address, port), timeout=2).close()
    assert reached_from(project, service, ours) == set()


def test_the_page_reaches_the_machine_at_the_other_end_of_its_network(
    project: Project, ours: list[tuple[str, str, int]]
) -> None:
    """It is said so in docs/compose.md, and it shows that what the others do not reach is there."""
    assert reached_from(project, "frontend", ours)
