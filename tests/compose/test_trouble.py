"""Each container dies; the server loses all it knew: what goes on, and what returns."""

from __future__ import annotations

import pytest

from tests.compose.project import Project, docker, run_python
from tests.orders_meanwhile import OrdersMeanwhile, an_order_is_paid
from tests.replacing import chain
from tests.waiting import until


def all_is_healthy(project: Project, *services: str) -> bool:
    return all(project.container(service)["State"]["Health"]["Status"] == "healthy" for service in services)


def serials(project: Project) -> set[str]:
    """Those of the certificates that the services have now."""
    return {str(service["identity"]["serial"]) for service in chain(project.url) if service.get("identity")}


@pytest.mark.parametrize("service", ["spire-agent", "spire-server", "registrar", "oidc", "cloud"])
def test_orders_go_on_while_what_gives_identities_and_secrets_is_away(project: Project, service: str) -> None:
    """What was given lives on for a while, and is renewed in time by what comes back."""
    orders = OrdersMeanwhile(project.url)
    with orders.going_on():
        until(lambda: orders.paid > 5, 30, "orders before")
        docker("kill", "--signal", "KILL", project.container(service)["Id"])
        served = orders.paid
        until(lambda: orders.paid > served + 10, 30, f"orders without {service}")
        docker("start", project.container(service)["Id"])
        until(lambda: all_is_healthy(project, service), 60, f"{service} is back")
        served = orders.paid
        until(lambda: orders.paid > served + 10, 30, f"orders with {service} again")
    assert orders.failed == {}


@pytest.mark.parametrize("service", ["postgres", "payments", "orders", "frontend"])
def test_a_part_of_the_chain_dies_and_comes_back(project: Project, service: str) -> None:
    assert an_order_is_paid(project.url)
    docker("kill", "--signal", "KILL", project.container(service)["Id"])
    assert not an_order_is_paid(project.url)
    docker("start", project.container(service)["Id"])
    until(lambda: an_order_is_paid(project.url), 60, f"an order after {service} has died")
    until(lambda: all_is_healthy(project, service), 60, f"{service} is healthy")


def test_a_server_that_has_lost_everything_is_believed_again(project: Project) -> None:
    """Another authority, no entries, no agents: the registrar and the agent begin anew, by themselves."""
    data = f"{project.name}_spire-data"
    docker("kill", "--signal", "KILL", project.container("spire-server")["Id"])
    before = serials(project)  # nobody gets a certificate while the server is away
    wipe = "import os; [os.unlink(entry) for entry in os.scandir('/data')]"
    run_python(wipe, options=("--volume", f"{data}:/data"))
    docker("start", project.container("spire-server")["Id"])
    until(lambda: all_is_healthy(project, "spire-server", "registrar", "spire-agent"), 90, "SPIRE is back")
    until(lambda: not before & serials(project), 120, "every service has a certificate of the new authority")
    until(lambda: an_order_is_paid(project.url), 60, "an order by them")
