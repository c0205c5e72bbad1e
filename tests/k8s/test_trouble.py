"""People order while pods are replaced and SPIRE is away: nothing is lost, and nothing fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s.cluster import pods_of, rolled_out, rows
from tests.orders_meanwhile import OrdersMeanwhile, an_order_is_paid
from tests.waiting import until
from ztdev.kubernetes.kubectl import ClusterFault, kubectl, read


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


def killed(service: str) -> None:
    """One of its pods is gone at once, with all that it was about to answer."""
    pod = pods_of(service)[0]["metadata"]["name"]
    kubectl("--namespace", "zt-demo", "delete", "--force", "--grace-period=0", f"pod/{pod}")


def test_a_node_that_is_emptied_keeps_one_of_each(page: str) -> None:
    """There is no other node here: what is evicted has nowhere to go, and the last of each stays."""
    (node,) = [each["metadata"]["name"] for each in read("nodes")["items"]]
    services = "app.kubernetes.io/name in (orders,payments)"
    drain = ("drain", node, f"--pod-selector={services}", "--delete-emptydir-data", "--timeout=20s")
    orders = OrdersMeanwhile(page)
    try:
        with orders.going_on():
            until(lambda: orders.paid > 5, 30, "orders before")
            with pytest.raises(ClusterFault, match=r"disruption budget|timeout"):
                kubectl(*drain)
            served = orders.paid
            until(lambda: orders.paid > served + 10, 60, "orders by those that stay")
    finally:
        kubectl("uncordon", node)
        for service in ("orders", "payments"):
            rolled_out("zt-demo", f"deployment/{service}")
    assert orders.failed == {}


def test_nothing_is_lost_or_paid_twice_while_pods_are_killed(page: str) -> None:
    """An order that meets a killed pod may fail; the books agree in the end."""
    orders = OrdersMeanwhile(page)
    with orders.going_on():
        for service in ("payments", "orders", "payments", "orders"):
            served = orders.paid
            until(lambda served=served: orders.paid > served + 5, 60, "orders before")  # type: ignore[misc]
            killed(service)
            rolled_out("zt-demo", f"deployment/{service}")
        served = orders.paid
        until(lambda: orders.paid > served + 10, 60, "orders afterwards")

    def books() -> tuple[list[str], list[str]]:
        """Which orders are paid, and which were charged, as often as they were."""
        paid = rows("orders", "select id from orders where status <> 'declined' order by id")
        return paid, rows("payments", "select order_id from charges order by order_id")

    def agree() -> bool:
        paid, charged = books()
        return paid == charged

    until(agree, 90, "orders and charges are the same")
    assert len(books()[0]) >= orders.paid
    print(f"{orders.paid} orders paid, {sum(orders.failed.values())} not: {orders.failed}")


@pytest.mark.timeout(500)
def test_a_server_that_has_forgotten_everything_gives_identities_again(page: str) -> None:
    """Its state goes with its pod here. The agent begins anew, once the kubelet has given it the new bundle,
    and pods that start get certificates of the new authority, which those that run already must trust."""
    restarted("spire-system", "statefulset/spire-server")
    restarted("zt-demo", "deployment/payments")
    restarted("zt-demo", "deployment/orders")
    until(lambda: an_order_is_paid(page), 120, "an order by certificates of the new authority")
