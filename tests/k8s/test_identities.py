"""Who gets which identity, and how far it takes him."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.k8s.cluster import apply, kubectl, python, read
from tests.waiting import until

#: Asks for an identity until it has one, and calls payments with it; or tells that there is none to be had.
CALL = """
import asyncio, json, sys
from ztmtls.client import AsyncClient
from ztmtls.source import NoIdentity, X509Source
async def main():
    async with X509Source("unix:///spiffe-workload-api/spire-agent.sock") as source:
        try:
            await source.ready(20)
        except NoIdentity as none:
            return {"id": None, "reason": str(none.reason)}
        peer = "spiffe://zt.example/ns/zt-demo/sa/payments"
        async with AsyncClient(source, peer=peer, base_url="https://payments.zt-demo:8443") as client:
            answer = await client.get("/payments/00000000-0000-4000-8000-000000000000")
        told = {"status": answer.status_code, "reason": answer.json()["reason"]}
        return {"id": str(source.context.svid.id), **told}
print(json.dumps(asyncio.run(main())))
"""


def image_of(service: str) -> str:
    found = read("deployment", service, "--namespace", "zt-demo")
    return str(found["spec"]["template"]["spec"]["containers"][0]["image"])


@contextmanager
def pod(name: str, namespace: str, account: str, labels: dict[str, str]) -> Iterator[str]:
    """A pod of payments' own image that only waits, held as `restricted` wants it."""
    metadata: dict[str, Any] = {"namespace": namespace}
    held = {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    waits = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit(0)); signal.pause()"
    container = {
        "name": "waits",
        "image": image_of("payments"),
        "command": ["/opt/zt/bin/python", "-c", waits],
        "securityContext": held,
        "volumeMounts": [{"name": "api", "mountPath": "/spiffe-workload-api", "readOnly": True}],
    }
    spec = {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [{"name": "api", "csi": {"driver": "csi.spiffe.io", "readOnly": True}}],
    }
    apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {**metadata, "name": account}},
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**metadata, "name": name, "labels": labels},
            "spec": spec,
        },
    )
    try:
        kubectl("--namespace", namespace, "wait", "--for=condition=Ready", "--timeout=60s", f"pod/{name}")
        yield f"pod/{name}"
    finally:
        kubectl("--namespace", namespace, "delete", "--now", f"pod/{name}")


def call(namespace: str, target: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(python(namespace, target, CALL))
    return told


def test_the_same_image_under_another_account_is_somebody_else() -> None:
    rightful = call("zt-demo", "deployment/orders")
    assert rightful["id"] == "spiffe://zt.example/ns/zt-demo/sa/orders"
    assert rightful["reason"] not in ("caller_not_allowed", "route_not_allowed")

    # With orders' label he is where orders is in the network; who he is, the label does not say.
    with pod("rogue", "zt-demo", "rogue", {"app.kubernetes.io/name": "orders"}) as rogue:
        refused = call("zt-demo", rogue)
    assert refused == {
        "id": "spiffe://zt.example/ns/zt-demo/sa/rogue",
        "status": 403,
        "reason": "caller_not_allowed",
    }


def test_the_right_account_in_another_namespace_is_nobody() -> None:
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "zt-stranger"}})
    try:
        until(
            lambda: kubectl("--namespace", "zt-stranger", "get", "serviceaccounts", "--output=name"),
            20,
            "it is made",
        )
        with pod("payments", "zt-stranger", "payments", {"app.kubernetes.io/name": "payments"}) as stranger:
            assert call("zt-stranger", stranger) == {"id": None, "reason": "identity_denied"}
    finally:
        kubectl("delete", "--wait=false", "namespace", "zt-stranger")
