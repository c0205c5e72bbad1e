"""Profile `observe`: metrics, alerts, dashboards and traces of the services that run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
import yaml

from tests.compose.project import ROOT, Project, docker, probe
from tests.compose.test_containers import CHAIN, held
from tests.waiting import until
from ztdev.shop import Visitor

OBSERVE = ROOT / "dev" / "compose" / "observe"
PROMTOOL = ROOT / ".tools" / "prometheus" / "promtool"
DASHBOARD = json.loads((OBSERVE / "grafana" / "dashboards" / "zero-trust.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
}

#: Nothing to show while all is well.
QUIET = {"Refused, by reason A", "Failures of the Workload API A", "Firing A"}


@pytest.fixture(scope="module")
def watched(project: Project) -> Iterator[Project]:
    """The project with Prometheus and Jaeger beside it. Grafana's is to be had from its registry alone."""
    for name in ("prometheus", "jaeger"):
        docker(
            *("build", "--quiet", "--file", "tests/compose/observe.Dockerfile", "--target", name),
            *("--tag", f"zt-demo/{name}:local", ".tools"),
            timeout=300,
        )
    project.compose("up", "--detach", "--wait", "--wait-timeout", "60", "--no-deps", "prometheus", "jaeger")
    yield project
    project.compose("rm", "--force", "--stop", "prometheus", "jaeger")


def api(project: Project, service: str, port: int, path: str, /, **query: str) -> Any:
    """What Prometheus or Jaeger answers on the port where it is published."""
    bindings = project.container(service)["NetworkSettings"]["Ports"][f"{port}/tcp"]
    assert [each["HostIp"] for each in bindings] == ["127.0.0.1"]
    answer = httpx.get(f"http://127.0.0.1:{bindings[0]['HostPort']}{path}", params=query, timeout=10)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def ask(project: Project, query: str) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = api(project, "prometheus", 9090, "/api/v1/query", query=query)["result"]
    return answer


def test_prometheus_and_jaeger_are_held_like_all_others(watched: Project) -> None:
    for service in ("prometheus", "jaeger"):
        held(watched, service)


def test_every_query_of_the_dashboard_finds_what_it_shows(watched: Project) -> None:
    with Visitor(watched.url) as visitor:
        visitor.order()
    until(lambda: len(ask(watched, 'up{job="services"} == 1')) == len(CHAIN), 30, "all three services answer")
    for name, query in QUERIES.items():
        if name not in QUIET:
            until(partial(ask, watched, query), 20, f"{name}: {query}")
        else:
            ask(watched, query)
    services = {each["metric"]["service"] for each in ask(watched, QUERIES["State of the identity A"])}
    assert services == set(CHAIN)


def test_no_alert_fires_while_all_is_well(watched: Project) -> None:
    def health() -> dict[str, str]:
        groups = api(watched, "prometheus", 9090, "/api/v1/rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    assert set(health()) == {rule["alert"] for rule in RULES}
    until(lambda: set(health().values()) == {"ok"}, 20, "every rule has been evaluated")
    assert ask(watched, 'ALERTS{alertstate="firing",severity="page"}') == []


def test_a_service_that_is_away_is_noticed(watched: Project) -> None:
    """How long it may be away before somebody is woken is tested below, without waiting for it."""
    query = 'ALERTS{alertname="ServiceUnwatched",service="payments"}'
    assert not ask(watched, query)
    engine = watched.container("payments")["Id"]
    docker("kill", engine)
    try:
        until(lambda: ask(watched, query), 60, "payments is missed")
    finally:
        docker("start", engine)
    until(lambda: not ask(watched, query), 60, "payments is back")


@pytest.mark.parametrize("command", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")])
def test_the_alerts_fire_when_they_should_and_not_before(command: tuple[str, ...]) -> None:
    done = subprocess.run([PROMTOOL, *command], cwd=OBSERVE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_order_is_one_trace_with_every_identity_in_it(watched: Project) -> None:
    with Visitor(watched.url) as visitor:
        visitor.order()

    def traces() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = api(
            watched, "jaeger", 16686, "/api/traces", service="payments", limit="50", lookback="1h"
        )
        return [trace for trace in found if len(trace["processes"]) == len(CHAIN)]

    until(traces, 30, "a trace through all three services")
    trace = traces()[0]
    assert {process["serviceName"] for process in trace["processes"].values()} == set(CHAIN)
    told = [{tag["key"]: tag["value"] for tag in span["tags"]} for span in trace["spans"]]
    peers = {(tags.get("ztmtls.own.id"), tags.get("ztmtls.peer.id")) for tags in told}
    frontend, orders, payments = (f"spiffe://zt.example/ns/zt-demo/sa/{name}" for name in CHAIN)
    assert {(frontend, orders), (orders, frontend), (orders, payments), (payments, orders)} <= peers
    roots = [span for span in trace["spans"] if not span["references"]]
    assert len(roots) == 1
    assert trace["processes"][roots[0]["processID"]]["serviceName"] == "frontend"


def test_nobody_but_prometheus_reads_the_metrics(watched: Project) -> None:
    """They are on a network of each service's own, not on the segments to its neighbours."""
    targets = {
        service: [(address, 9090) for address in (*watched.addresses(service), f"{service}.observe")]
        for service in CHAIN
    }
    for service in CHAIN:
        assert "connected" in probe(watched.network_of("prometheus"), targets[service])

    def strange(other: str) -> list[str]:
        others = [target for service in CHAIN if service != other for target in targets[service]]
        return probe(watched.network_of(other), others)

    places = (*CHAIN, "postgres", "cloud", "spire-agent")
    with ThreadPoolExecutor() as pool:
        for other, outcomes in zip(places, pool.map(strange, places), strict=True):
            assert "connected" not in outcomes, other
