"""People order while all that runs out is replaced: certificates, the authority, the logins."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.compose.project import Project
from ztdev.shop import Visitor

SERVER = ("/opt/spire/bin/spire-server",)
SOCKET = ("-socketPath", "/srv/spire/socket/api.sock")


class Load:
    """One order after the other: what became of each."""

    def __init__(self, project: Project) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = project.url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._order, name="orders")

    def _order(self) -> None:
        with Visitor(self._url) as visitor:
            while not self._stop.is_set():
                try:
                    self.outcomes[visitor.order()["order"]["status"]] += 1
                except Exception as error:
                    self.outcomes[f"{type(error).__name__}: {error}"] += 1
                self._stop.wait(0.1)

    @property
    def failed(self) -> dict[str, int]:
        return {outcome: count for outcome, count in self.outcomes.items() if outcome != "paid"}

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join(30)


def until(holds: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.3)


def chain(project: Project) -> list[dict[str, Any]]:
    """Each service of the chain, as the page's status tells it."""
    answer = httpx.get(f"{project.url}/status", headers={"Accept": "application/json"}, timeout=10)
    services: list[dict[str, Any]] = answer.json()["services"]
    return services


def spire(project: Project, *command: str) -> Any:
    return json.loads(
        project.compose("exec", "-T", "spire-server", *SERVER, *command, *SOCKET, "-output", "json")
    )


def authority_of(project: Project, slot: str) -> str:
    return str((spire(project, "localauthority", "x509", "show").get(slot) or {})["authority_id"])


TRUSTED = """
import urllib.request
for line in urllib.request.urlopen("http://127.0.0.1:9090/metrics", timeout=2).read().decode().splitlines():
    if line.startswith("ztmtls_bundle_authorities{"):
        print(line.split()[-1])
"""


def authorities_trusted(project: Project, service: str) -> int:
    """How many authorities `service` trusts now, as its own metrics say."""
    return round(float(project.python(service, TRUSTED)))


def test_a_login_is_replaced_when_somebody_asks(project: Project) -> None:
    def login() -> str:
        orders = next(each for each in chain(project) if each["service"] == "orders")
        return str(orders["credentials"]["version"])

    before = login()
    python = project.container("cloud")["Config"]["Entrypoint"][0]
    said = project.compose("exec", "-T", "cloud", python, "-m", "ztdev.compose", "rotate", "orders")
    assert re.search(r"orders: orders_app(_clone)? → orders_app(_clone)?  version", said)
    until(lambda: login() != before, 30, "orders uses another login")


def test_no_order_fails_while_everything_is_replaced(project: Project) -> None:
    load = Load(project)
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

    with load.running():
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
        before = {service: set(seen) for service, seen in serials.items()}

        def renewed() -> bool:
            look()
            return all(serials[service] > before[service] for service in serials)

        until(renewed, 60, "every certificate is signed by the new authority")
        # The server renews its own certificate some seconds later than all others; should the agent meet the
        # old one before, it begins anew by itself.
        spire(project, "localauthority", "x509", "revoke", "-authorityID", old)
        served = load.outcomes["paid"]
        until(lambda: load.outcomes["paid"] > served + 10, 60, "orders after the old authority is gone")
    assert load.failed == {}
    assert load.outcomes["paid"] > 100
    print(f"{load.outcomes['paid']} orders paid, none failed; {serials} {versions}")
