"""The chain on a real Kubernetes: an order, who is behind it, and how each pod is held."""

from __future__ import annotations

from tests.k8s.cluster import manifests
from ztdev.kubernetes.kubectl import apply, read
from ztdev.options import SERVICES
from ztdev.shop import Visitor


def test_an_order_is_paid_and_every_hop_is_proved(page: str) -> None:
    with Visitor(page) as visitor:
        document = visitor.order()
    assert document["order"]["status"] == "paid"
    for service in SERVICES:
        assert f"spiffe://zt.example/ns/zt-demo/sa/{service}" in str(document)


def test_roles_come_by_the_cluster_s_own_tokens(page: str) -> None:
    with Visitor(page) as visitor:
        services = {each["service"]: each for each in visitor.status()["services"]}
    assert set(services) == set(SERVICES)
    for name in ("orders", "payments"):
        credentials = services[name]["credentials"]
        assert credentials["state"] == "serving"
        assert credentials["role_arn"].endswith(f":role/zt-demo-{name}")


def test_every_pod_of_ours_can_do_little() -> None:
    for namespace in ("zt-demo", "zt-local"):
        enforced = read("namespace", namespace)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        assert enforced == "restricted"
        pods = read("pods", "--namespace", namespace)["items"]
        assert pods
        for pod in pods:
            assert pod["spec"]["automountServiceAccountToken"] is False
            for container in pod["spec"]["containers"]:
                assert "@sha256:" in container["image"]
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"]["memory"]


def test_to_apply_it_again_changes_nothing() -> None:
    def generations() -> dict[str, int]:
        found = read("deployments,statefulsets,daemonsets", "--all-namespaces")["items"]
        return {each["metadata"]["uid"]: each["metadata"]["generation"] for each in found}

    before = generations()
    objects = manifests()
    apply(*objects)
    assert generations() == before
    assert any(each["kind"] == "ClusterSPIFFEID" for each in objects)
