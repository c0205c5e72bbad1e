"""Pods of ours, as a deployment makes them, and pods that only wait, to be looked out of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ztdev.inside import PYTHON

from .kubectl import apply, kubectl, read

NAMESPACE = "zt-demo"

_WAIT = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit(0)); signal.pause()"


def as_deployed(service: str, name: str) -> dict[str, Any]:
    """A pod as the deployment of `service` makes them, under a name of its own."""
    template = read("deployment", service, "--namespace", NAMESPACE)["spec"]["template"]
    metadata = {"namespace": NAMESPACE, "name": name, "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def waiting(name: str, *, account: str, label: str, namespace: str = NAMESPACE) -> dict[str, Any]:
    """A pod of payments' own image that only waits, held as payments is, with the Workload API mounted."""
    container = as_deployed("payments", name)["spec"]["containers"][0]
    waits = {
        "name": "waits",
        "image": container["image"],
        "command": [PYTHON, "-c", _WAIT],
        "securityContext": container["securityContext"],
        "volumeMounts": [{"name": "api", "mountPath": "/spiffe-workload-api", "readOnly": True}],
    }
    spec = {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [waits],
        "volumes": [{"name": "api", "csi": {"driver": "csi.spiffe.io", "readOnly": True}}],
    }
    metadata = {"namespace": namespace, "name": name, "labels": {"app.kubernetes.io/name": label}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def account_of(document: dict[str, Any]) -> dict[str, Any]:
    """The service account of a pod."""
    metadata = {
        "namespace": document["metadata"]["namespace"],
        "name": document["spec"]["serviceAccountName"],
    }
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}


@contextmanager
def running(document: dict[str, Any]) -> Iterator[str]:
    """That pod with an account for it, until it isn't needed any more: what kubectl calls it."""
    account, pod = account_of(document), f"pod/{document['metadata']['name']}"
    here = ("--namespace", document["metadata"]["namespace"])
    try:
        apply(account, document)
        kubectl(*here, "wait", "--for=condition=Ready", "--timeout=60s", pod)
        yield pod
    finally:
        accounts = f"serviceaccount/{account['metadata']['name']}"
        kubectl(*here, "delete", "--ignore-not-found", "--now", pod, accounts)
