"""Who gets which identity, and how far it takes him."""

from __future__ import annotations

from typing import Any

from tests.k8s.cluster import without
from tests.k8s.test_networks import LISTENS
from tests.waiting import until
from ztdev.inside import CALL_PAYMENTS, CONNECT
from ztdev.kubernetes.kubectl import apply, kubectl, python, said_of
from ztdev.kubernetes.pods import account_of, running, waiting


def call(namespace: str, target: str) -> dict[str, Any]:
    """Ask payments for a payment that there is not."""
    payment = "/payments/00000000-0000-4000-8000-000000000000"
    told: dict[str, Any] = python(namespace, target, CALL_PAYMENTS, [["GET", payment]])
    return told


def test_the_same_image_under_another_account_is_somebody_else() -> None:
    rightful = call("zt-demo", "deployment/orders")
    assert rightful["id"] == "spiffe://zt.example/ns/zt-demo/sa/orders"
    ((status, _),) = rightful["answers"]
    assert status == 404

    # With orders' label he is where orders is in the network; who he is, the label does not say.
    forged = waiting("rogue", account="rogue", label="orders")
    apply(account_of(forged))
    assert "account_reused: " in said_of(forged)
    with without("zt-accounts", lambda: said_of(forged) == ""), running(forged) as rogue:
        refused = call("zt-demo", rogue)
    assert refused == {
        "id": "spiffe://zt.example/ns/zt-demo/sa/rogue",
        "answers": [[403, "caller_not_allowed"]],
    }


def test_under_his_own_label_he_reaches_nobody() -> None:
    """Admission lets him in. The network does not know him."""
    with running(waiting("rogue", account="rogue", label="rogue")) as rogue:
        told = python("zt-demo", rogue, CONNECT, list(LISTENS.values()))
    assert "connected" not in told


def test_the_right_account_in_another_namespace_is_nobody() -> None:
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "zt-stranger"}})
    try:
        until(
            lambda: kubectl("--namespace", "zt-stranger", "get", "serviceaccounts", "--output=name"),
            20,
            "it is made",
        )
        with running(
            waiting("payments", account="payments", label="payments", namespace="zt-stranger")
        ) as stranger:
            assert call("zt-stranger", stranger) == {"id": None, "reason": "identity_denied"}
    finally:
        kubectl("delete", "--wait=false", "namespace", "zt-stranger")
