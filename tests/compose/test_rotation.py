"""People order while all that runs out is replaced: certificates, the authority, the logins."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.compose.project import Project
from tests.orders_meanwhile import OrdersMeanwhile
from tests.waiting import until
from ztdev.shop import Visitor

SERVER = ("/opt/spire/bin/spire-server",)
SOCKET = ("-socketPath", "/srv/spire/socket/api.sock")


def chain(project: Project) -> list[dict[str, Any]]:
    """Each service of the chain, as the page's status tells it."""
    with Visitor(project.url) as visitor:
        services: list[dict[str, Any]] = visitor.status()["services"]
    return services


def spire(project: Project, *command: str) -> Any:
    return json.loads(
        project.compose("exec", "-T", "spire-server", *SERVER, *command, *SOCKET, "-output", "json")
    )


def authority_of(project: Project, slot: str) -> str:
    return str((spire(project, "localauthority", "x509", "show").get(slot) or {})["authority_id"])


TRUSTED = """
import os, urllib.request
metrics = f"http://{os.environ['PROBE_HOST']}:9090/metrics"
for line in urllib.request.urlopen(metrics, timeout=2).read().decode().splitlines():
    if line.startswith("ztmtls_bundle_authorities{"):
        print(line.split()[-1])
"""


def authorities_trusted(project: Project, service: str) -> int:
    """How many authorities `service` trusts now, as its own metrics say."""
    return round(float(project.python(service, TRUSTED)))


def test_a_login_is_replaced_when_somebody_asks(project: Project) -> None:
    def login() -> str:
        told = next(each for each in chain(project) if each["service"] == "orders")
        return str(told["credentials"]["version"])

    before = login()
    python = project.container("cloud")["Config"]["Entrypoint"][0]
    said = project.compose("exec", "-T", "cloud", python, "-m", "ztdev.compose", "rotate", "orders")
    assert re.search(r"orders: orders_app(_clone)? → orders_app(_clone)?  version", said)
    until(lambda: login() != before, 30, "orders uses another login")


def test_no_order_fails_while_everything_is_replaced(project: Project) -> None:
    orders = OrdersMeanwhile(project.url)
    serials: dict[str, set[str]] = {"frontend": set(), "orders": set(), "payments": set()}
    versions: dict[str, set[str]] = {"orders": set(), "payments": set()}

    def look() -> None:
        for service in chain(project):
            serials[service["service"]].add(service["identity"]["serial"])
            if service.get("credentials"):
                versions[service["service"]].add(service["credentials"]["version"])

    def replaced() -> bool:
        look()
        return all(len(seen) >= 3 for seen in (*serials.values(), *versions.values()))

    with orders.going_on():
        until(replaced, 90, f"every certificate and every login is replaced twice: {serials} {versions}")

        spire(project, "localauthority", "x509", "prepare")
        new = authority_of(project, "prepared")
        until(
            lambda: all(authorities_trusted(project, service) >= 2 for service in serials),
            30,
            "all trust the new authority before anything is signed by it",
        )
        spire(project, "localauthority", "x509", "activate", "-authorityID", new)
        old = authority_of(project, "old")
        spire(project, "localauthority", "x509", "taint", "-authorityID", old)
        look()  # what was signed by the old authority is not taken for what is signed by the new one
        before = {service: set(seen) for service, seen in serials.items()}

        def renewed() -> bool:
            look()
            return all(serials[service] > before[service] for service in serials)

        until(renewed, 60, "every certificate is signed by the new authority")
        # The server renews its own certificate some seconds later than all others; should the agent meet the
        # old one before, it begins anew by itself.
        spire(project, "localauthority", "x509", "revoke", "-authorityID", old)
        served = orders.paid
        until(lambda: orders.paid > served + 10, 60, "orders after the old authority is gone")
    assert orders.failed == {}
    assert orders.paid > 100
    print(f"{orders.paid} orders paid, none failed; {serials} {versions}")
