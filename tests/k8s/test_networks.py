"""Network policies: what must connect, what must not, and that somebody enforces them at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.k8s.cluster import pods_of
from tests.waiting import until
from ztdev.inside import CONNECT, RESOLVE
from ztdev.kubernetes.kubectl import apply, kubectl, python, read
from ztdev.kubernetes.pods import running, waiting

#: Where each listens, by the name that pods call it by.
LISTENS = {
    "frontend": ("frontend.zt-demo", 80),
    "orders": ("orders.zt-demo", 8443),
    "payments": ("payments.zt-demo", 8443),
    "postgres": ("postgres.zt-local", 5432),
    "cloud": ("cloud.zt-local", 4566),
    "api server": ("kubernetes.default", 443),
    "spire": ("spire-server.spire-system", 8081),
}

MUST = {
    "frontend": {"orders"},
    "orders": {"payments", "postgres", "cloud"},
    "payments": {"postgres", "cloud"},
}


def reached(service: str, *targets: tuple[str, int]) -> list[bool]:
    """Which of `targets` a pod of `service` can connect to."""
    told = python("zt-demo", f"deployment/{service}", CONNECT, targets)
    return [outcome == "connected" for outcome in told]


@contextmanager
def without_policies() -> Iterator[None]:
    kept = [
        {**each, "metadata": {key: each["metadata"][key] for key in ("name", "namespace")}}
        for each in read("networkpolicies", "--namespace", "zt-demo")["items"]
    ]
    kubectl("--namespace", "zt-demo", "delete", "networkpolicies", "--all")
    try:
        yield
    finally:
        apply(*kept)


def test_they_are_enforced_by_somebody() -> None:
    """What they forbid connects without them, and is refused with them."""
    target = LISTENS["payments"]
    with without_policies():
        until(lambda: reached("frontend", target) == [True], 30, "without a policy anybody reaches payments")
    until(lambda: reached("frontend", target) == [False], 30, "with it frontend does not")


@pytest.mark.parametrize("service", MUST)
def test_each_service_reaches_those_it_has_business_with_and_nobody_else(service: str) -> None:
    others = [name for name in LISTENS if name != service]
    outcomes = dict(zip(others, reached(service, *(LISTENS[name] for name in others)), strict=True))
    assert outcomes == {name: name in MUST[service] for name in others}


def test_nobody_of_a_name_of_his_own_asks_a_name_server() -> None:
    """Whoever may ask one has a way out of the cluster in his questions, where it passes them on."""
    asked = ["payments.zt-demo", "a-word-of-a-secret.attacker.example"]

    def answered(pod: str) -> bool:
        return "unanswered" not in python("zt-demo", pod, RESOLVE, asked[:1])

    assert answered("deployment/orders")
    with running(waiting("asks", account="asks", label="asks")) as pod:
        with without_policies():
            until(lambda: answered(pod), 30, "without a policy anybody asks")
        until(lambda: not answered(pod), 30, "with it nobody does")
        assert python("zt-demo", pod, RESOLVE, asked) == ["unanswered", "unanswered"]


def test_a_probes_port_is_for_the_kubelet_alone() -> None:
    for service in ("orders", "payments"):
        pods = pods_of(service)
        assert reached("frontend", (str(pods[0]["status"]["podIP"]), 9090)) == [False]
        assert all(
            condition["status"] == "True"
            for pod in pods
            for condition in pod["status"]["conditions"]
            if condition["type"] == "Ready"
        )


def test_nobody_reaches_the_metadata_of_the_node_nor_the_world() -> None:
    for service in MUST:
        assert reached(service, ("169.254.169.254", 80), ("192.0.2.1", 443)) == [False, False]
