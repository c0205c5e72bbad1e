"""The chain in containers: an order, the identities behind it, and a second `up`."""

from __future__ import annotations

import httpx

from tests.compose.project import Project
from ztdev.shop import Visitor


def test_an_order_is_paid_and_every_hop_is_proved(project: Project) -> None:
    with Visitor(project.url) as visitor:
        document = visitor.order()
    assert document["order"]["status"] == "paid"
    text = str(document)
    for service in ("frontend", "orders", "payments"):
        assert f"spiffe://zt.example/ns/zt-demo/sa/{service}" in text


def test_every_service_says_that_all_is_well(project: Project) -> None:
    status = httpx.get(f"{project.url}/status", headers={"Accept": "application/json"}).json()
    assert [service["service"] for service in status["services"]] == ["frontend", "orders", "payments"]
    assert {service["identity"]["state"] for service in status["services"]} == {"serving"}


def test_up_again_changes_nothing(project: Project) -> None:
    before = {service: project.container(service)["Id"] for service in project.services}
    project.up()
    assert {service: project.container(service)["Id"] for service in project.services} == before
