"""People order while all that runs out is replaced: certificates, the authority, the logins. None fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.orders_meanwhile import OrdersMeanwhile
from tests.waiting import until
from ztdev.shop import Visitor

#: Commands of spire-server print JSON with these.
OUTPUT = ("-output", "json")

#: Run inside a service: how many authorities it trusts now, as its own metrics say.
TRUSTED = """
import os, urllib.request
host = os.environ["PROBE_HOST"].replace("0.0.0.0", "127.0.0.1")
for line in urllib.request.urlopen(f"http://{host}:9090/metrics", timeout=2).read().decode().splitlines():
    if line.startswith("ztmtls_bundle_authorities{"):
        print(round(float(line.split()[-1])))
"""


def chain(url: str) -> list[dict[str, Any]]:
    """Each service of the chain, as the page's status tells it."""
    with Visitor(url) as visitor:
        services: list[dict[str, Any]] = visitor.status()["services"]
    return services


def no_order_fails_while_everything_is_replaced(
    url: str,
    spire_server: Callable[..., str],
    authorities_trusted: Callable[[str], int],
    *,
    certificates: int = 1,
    replace_logins: Callable[[], None] = lambda: None,
) -> OrdersMeanwhile:
    """Order on the page at `url` meanwhile, and say what became of it.

    `spire_server` runs a command of SPIRE's server and gives what it prints; `authorities_trusted` tells how
    many a service trusts. So many `certificates` of each service are seen before its authority is replaced,
    and three of its logins: where that does not happen by itself, `replace_logins` does it.
    """
    orders = OrdersMeanwhile(url)
    serials: dict[str, set[str]] = {"frontend": set(), "orders": set(), "payments": set()}
    versions: dict[str, set[str]] = {"orders": set(), "payments": set()}

    def authorities(command: str, *options: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(
            spire_server("localauthority", "x509", command, *options, *OUTPUT) or "{}"
        )
        return told

    def authority(slot: str) -> str:
        return str((authorities("show").get(slot) or {})["authority_id"])

    def look() -> None:
        for service in chain(url):
            serials[service["service"]].add(service["identity"]["serial"])
            if service.get("credentials"):
                versions[service["service"]].add(service["credentials"]["version"])

    def replaced() -> bool:
        look()
        return all(len(seen) >= 3 for seen in versions.values()) and all(
            len(seen) >= certificates for seen in serials.values()
        )

    with orders.going_on():
        until(lambda: orders.paid > 5, 30, "orders before")
        look()
        replace_logins()
        until(replaced, 90, f"every login is replaced twice, and certificates are: {serials} {versions}")

        authorities("prepare")
        new = authority("prepared")
        until(
            lambda: all(authorities_trusted(service) >= 2 for service in serials),
            30,
            "all trust the new authority before anything is signed by it",
        )
        authorities("activate", "-authorityID", new)
        old = authority("old")
        authorities("taint", "-authorityID", old)
        look()  # what was signed by the old authority is not taken for what is signed by the new one
        before = {service: set(seen) for service, seen in serials.items()}

        def renewed() -> bool:
            look()
            return all(serials[service] > before[service] for service in serials)

        until(renewed, 60, "every certificate is signed by the new authority")
        # The server renews its own certificate some seconds later than all others; should the agent meet the
        # old one before, it begins anew by itself.
        authorities("revoke", "-authorityID", old)
        served = orders.paid
        until(lambda: orders.paid > served + 10, 60, "orders after the old authority is gone")
    assert orders.failed == {}
    print(f"{orders.paid} orders paid, none failed; {serials} {versions}")
    return orders
