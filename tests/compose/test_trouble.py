"""Each container dies, the server loses all it knew, the machine sleeps: what goes on, and what returns."""

from __future__ import annotations

import time

import pytest

from tests.compose.project import Project, beside, docker, run_python
from tests.compose.test_rotation import chain
from tests.orders_meanwhile import OrdersMeanwhile, an_order_is_paid
from tests.waiting import until

#: Lives so short that somebody can wait until all have run out. There is no condition to wait for: it is time
#: itself that must pass.
SHORT_LIVES = {"SVID_TTL": "10s", "AGENT_TTL": "20s", "CA_TTL": "40s"}
LONGER_THAN_ANY_LIFE = 50.0


def all_is_healthy(project: Project, *services: str) -> bool:
    return all(project.container(service)["State"]["Health"]["Status"] == "healthy" for service in services)


def serials(project: Project) -> set[str]:
    """Those of the certificates that the services have now."""
    return {str(service["identity"]["serial"]) for service in chain(project) if service.get("identity")}


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


def test_a_machine_that_slept_until_everything_had_run_out(project: Project) -> None:
    """No certificate is valid any more, the agent's and the authority's neither."""
    with beside(project, "asleep", SHORT_LIVES) as asleep:
        assert an_order_is_paid(asleep.url)
        asleep.compose("pause")
        time.sleep(LONGER_THAN_ANY_LIFE)
        asleep.compose("unpause")
        began = time.monotonic()
        until(lambda: an_order_is_paid(asleep.url), 120, "an order after the sleep")
        print(f"the first order was paid {time.monotonic() - began:.0f} s after the machine woke up")
