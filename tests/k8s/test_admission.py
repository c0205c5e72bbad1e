"""What the API server refuses to let in: each with what it lets in, and with what becomes of it otherwise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.k8s.cluster import pods_of, without
from tests.waiting import until
from ztdev.kubernetes.kubectl import read, refusal, said_of
from ztdev.kubernetes.pods import as_deployed

Change = Callable[[dict[str, Any]], None]

PAYMENTS = "spiffe://zt.example/ns/zt-demo/sa/payments"

DIGEST = "sha256:" + "0" * 64


def rightful() -> dict[str, Any]:
    return as_deployed("orders", "tried")


def let_in(document: dict[str, Any]) -> bool:
    return said_of(document) == ""


def changed(change: Change) -> dict[str, Any]:
    document = copy.deepcopy(rightful())
    change(document)
    return document


def image(name: str, document: dict[str, Any]) -> None:
    document["spec"]["containers"][0]["image"] = name


def another_container(where: str, name: str, document: dict[str, Any]) -> None:
    container = copy.deepcopy(document["spec"]["containers"][0])
    container |= {"name": "another", "image": name}
    for field in ("livenessProbe", "readinessProbe", "ports"):
        del container[field]
    document["spec"].setdefault(where, []).append(container)


def volume(source: dict[str, Any], document: dict[str, Any]) -> None:
    document["spec"]["volumes"].append({"name": "another", **source})


def spec(field: str, value: Any, document: dict[str, Any]) -> None:
    document["spec"][field] = value


def held(field: str, value: Any, document: dict[str, Any]) -> None:
    document["spec"]["containers"][0]["securityContext"][field] = value


def privileged(document: dict[str, Any]) -> None:
    held("privileged", True, document)
    held("allowPrivilegeEscalation", True, document)


def labelled(name: str, document: dict[str, Any]) -> None:
    document["metadata"]["labels"]["app.kubernetes.io/name"] = name


def token(audience: dict[str, str]) -> dict[str, Any]:
    return {"projected": {"sources": [{"serviceAccountToken": {"path": "token", **audience}}]}}


@dataclass(frozen=True)
class Refusal:
    """A `change` to a rightful pod, which `policy` refuses for `reason`."""

    policy: str
    reason: str
    change: Change


REFUSALS = {
    "a tag": Refusal("zt-images", "image_not_pinned", partial(image, "docker.io/zt-demo/orders:local")),
    "another registry": Refusal("zt-images", "image_source", partial(image, f"evil.example/orders@{DIGEST}")),
    "a registry with our name in it": Refusal(
        "zt-images", "image_source", partial(image, f"docker.io/zt-demo-evil/orders@{DIGEST}")
    ),
    "an init container of another image": Refusal(
        "zt-images", "image_source", partial(another_container, "initContainers", f"evil.example/x@{DIGEST}")
    ),
    "a sidecar with a tag": Refusal(
        "zt-images", "image_not_pinned", partial(another_container, "containers", "docker.io/zt-demo/orders")
    ),
    "another driver's volume": Refusal(
        "zt-pods", "volume_driver", partial(volume, {"csi": {"driver": "evil.example"}})
    ),
    "a token of the API server": Refusal("zt-pods", "token_audience", partial(volume, token({}))),
    "a token for SPIRE's server": Refusal(
        "zt-pods", "token_audience", partial(volume, token({"audience": "spire-server"}))
    ),
    "the account's token": Refusal(
        "zt-pods", "token_audience", partial(spec, "automountServiceAccountToken", True)
    ),
    "a root that is written to": Refusal(
        "zt-pods", "root_writable", partial(held, "readOnlyRootFilesystem", False)
    ),
    "orders' label, another account": Refusal(
        "zt-accounts", "account_reused", partial(spec, "serviceAccountName", "payments")
    ),
    "orders' account, another label": Refusal("zt-accounts", "account_reused", partial(labelled, "payments")),
}

#: By Pod Security, which comes with the API server.
RESTRICTED: dict[str, Change] = {
    "privileged": privileged,
    "a directory of the node": partial(volume, {"hostPath": {"path": "/run/spire/agent-sockets"}}),
    "the node's network": partial(spec, "hostNetwork", True),
    "the node's processes": partial(spec, "hostPID", True),
    "root": partial(held, "runAsUser", 0),
    "a capability": partial(held, "capabilities", {"drop": ["ALL"], "add": ["NET_ADMIN"]}),
}


def test_every_expression_is_one_that_the_api_server_understands() -> None:
    """A field that is not there is let through when a policy is applied, and only told afterwards."""
    policies = read("validatingadmissionpolicies")["items"]
    ours = [each for each in policies if each["metadata"]["name"].startswith("zt-")]
    others = {"zt-doors", "zt-identities", "zt-entries"}
    assert {each["metadata"]["name"] for each in ours} == {each.policy for each in REFUSALS.values()} | others

    def checked(policy: dict[str, Any]) -> bool:
        found = read("validatingadmissionpolicy", policy["metadata"]["name"])
        return "typeChecking" in found.get("status", {})

    for policy in ours:
        until(partial(checked, policy), 30, "the API server's verdict")
        found = read("validatingadmissionpolicy", policy["metadata"]["name"])
        assert found["spec"]["failurePolicy"] == "Fail"
        assert not found["status"]["typeChecking"].get("expressionWarnings"), found["metadata"]["name"]


@pytest.mark.parametrize("attempt", REFUSALS)
def test_what_is_not_ours_is_not_let_in(attempt: str) -> None:
    refusal = REFUSALS[attempt]
    assert said_of(rightful()) == ""
    refused = said_of(changed(refusal.change))
    assert f"ValidatingAdmissionPolicy '{refusal.policy}'" in refused
    assert f"{refusal.reason}: " in refused


@pytest.mark.parametrize("attempt", RESTRICTED)
def test_pod_security_refuses_what_takes_hold_of_the_node(attempt: str) -> None:
    assert said_of(rightful()) == ""
    assert 'violates PodSecurity "restricted:latest"' in said_of(changed(RESTRICTED[attempt]))


@pytest.mark.parametrize("policy", sorted({refusal.policy for refusal in REFUSALS.values()}))
def test_without_its_policy_each_is_let_in(policy: str) -> None:
    attempts = [changed(refusal.change) for refusal in REFUSALS.values() if refusal.policy == policy]
    with without(policy, partial(let_in, attempts[0])):
        for attempt in attempts:
            assert said_of(attempt) == ""


def put_into_a_pod() -> str:
    """What the API server says of a container of ours that is put into a pod of payments which runs."""
    pod = pods_of("payments")[0]
    container = {
        "name": "looks-around",
        "image": pod["spec"]["containers"][0]["image"],
        "securityContext": pod["spec"]["containers"][0]["securityContext"],
        "volumeMounts": [{"name": "spiffe-workload-api", "mountPath": "/spiffe-workload-api"}],
    }
    pod["spec"]["ephemeralContainers"] = [container]
    path = f"/api/v1/namespaces/zt-demo/pods/{pod['metadata']['name']}/ephemeralcontainers?dryRun=All"
    return refusal("replace", "--raw", path, "--filename=-", given=json.dumps(pod))


def test_nobody_is_put_into_a_pod_that_has_an_identity() -> None:
    """Pod Security has nothing against it: it is held like the others."""
    assert "ephemeral_container: " in put_into_a_pod()
    with without("zt-pods", lambda: put_into_a_pod() == ""):
        pass


@pytest.mark.parametrize(
    "change", [{"type": "NodePort"}, {"type": "LoadBalancer"}, {"externalIPs": ["192.0.2.1"]}], ids=str
)
def test_no_service_makes_a_door_of_its_own(change: dict[str, Any]) -> None:
    ports = [{"port": 80}]
    rightful = {"selector": {"app.kubernetes.io/name": "payments"}, "ports": ports}
    metadata = {"namespace": "zt-demo", "name": "tried"}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": rightful}
    assert said_of(service) == ""
    exposed = {**service, "spec": rightful | change}
    assert "service_exposed: " in said_of(exposed)
    with without("zt-doors", partial(let_in, exposed)):
        pass


def test_nobody_is_given_another_s_identity() -> None:
    """By an object of SPIRE's controller manager that names it."""
    ours = read("clusterspiffeid", "zt-demo")
    rightful = {**ours, "metadata": {"name": "tried"}}
    rightful.pop("status", None)
    assert said_of(rightful) == ""
    named = {**rightful, "spec": {**ours["spec"], "spiffeIDTemplate": PAYMENTS}}
    assert "identity_named: " in said_of(named)
    with without("zt-identities", partial(let_in, named)):
        pass

    entry = {
        "apiVersion": "spire.spiffe.io/v1alpha1",
        "kind": "ClusterStaticEntry",
        "metadata": {"name": "tried"},
        "spec": {"spiffeID": PAYMENTS, "parentID": f"{PAYMENTS}-node", "selectors": ["k8s:ns:default"]},
    }
    assert "identity_named: " in said_of(entry)
    with without("zt-entries", partial(let_in, entry)):
        pass
