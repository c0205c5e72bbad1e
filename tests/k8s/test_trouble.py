"""People order while pods are replaced and SPIRE is away: nothing is lost, and nothing fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s.cluster import kubectl, pods_of, rolled_out
from tests.orders_meanwhile import OrdersMeanwhile, an_order_is_paid
from tests.waiting import until


def restarted(namespace: str, kind: str) -> None:
    """Replace its pods, as an update of its image does."""
    kubectl("--namespace", namespace, "rollout", "restart", kind)
    rolled_out(namespace, kind, 300)


def scaled(service: str, replicas: int) -> None:
    kubectl("--namespace", "zt-demo", "scale", f"deployment/{service}", f"--replicas={replicas}")
    rolled_out("zt-demo", f"deployment/{service}")
    until(lambda: len(pods_of(service)) == replicas, 60, f"{replicas} pods of {service}")


def scaled_out_and_back() -> None:
    for service in ("payments", "orders"):
        scaled(service, 3)
        scaled(service, 2)


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda: restarted("zt-demo", "deployment/payments"), id="payments are replaced"),
        pytest.param(lambda: restarted("zt-demo", "deployment/orders"), id="orders are replaced"),
        pytest.param(scaled_out_and_back, id="scaled out and back"),
        pytest.param(lambda: restarted("spire-system", "daemonset/spire-agent"), id="the agent is replaced"),
    ],
)
def test_no_order_fails_while(page: str, trouble: Callable[[], None]) -> None:
    orders = OrdersMeanwhile(page)
    with orders.going_on():
        until(lambda: orders.paid > 5, 30, "orders before")
        trouble()
        served = orders.paid
        until(lambda: orders.paid > served + 10, 60, "orders afterwards")
    assert orders.failed == {}


@pytest.mark.timeout(500)
def test_a_server_that_has_forgotten_everything_gives_identities_again(page: str) -> None:
    """Its state goes with its pod here. The agent begins anew, once the kubelet has given it the new bundle,
    and pods that start get certificates of the new authority, which those that run already must trust."""
    restarted("spire-system", "statefulset/spire-server")
    restarted("zt-demo", "deployment/payments")
    restarted("zt-demo", "deployment/orders")
    until(lambda: an_order_is_paid(page), 120, "an order by certificates of the new authority")
