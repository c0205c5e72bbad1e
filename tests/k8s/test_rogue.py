"""Component `rogue`: what its README says that one sees."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator

import pytest
import yaml

from tests.k8s.cluster import PINNED, ROOT, without
from tests.waiting import until
from ztdev.kubernetes.kubectl import ClusterFault, apply, kubectl, rendered, run

COMPONENT = ROOT / "k8s" / "components" / "rogue"
SHOW, CONNECT, LABEL, DELETE = (
    shlex.split(command)
    for command in re.findall(r"^\| `(kubectl [^`]+)`", (COMPONENT / "README.md").read_text(), re.MULTILINE)
)


@pytest.fixture(scope="module", autouse=True)
def rogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """He is there, in the image that the overlay's orders has."""
    folder = tmp_path_factory.mktemp("rogue")
    pinned = yaml.safe_load((PINNED / "kustomization.yaml").read_text())
    pinned["resources"] = [os.path.relpath((PINNED / each).resolve(), folder) for each in pinned["resources"]]
    pinned["components"] = [os.path.relpath(COMPONENT, folder)]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(pinned))
    his = [each for each in rendered(folder) if each["metadata"]["name"] == "rogue"]
    assert {each["kind"] for each in his} == {"ServiceAccount", "Pod"}
    apply(*his)
    kubectl("--namespace", "zt-demo", "wait", "--for=condition=Ready", "--timeout=60s", "pod/rogue")
    yield
    kubectl("--namespace", "zt-demo", "delete", "--now", "pod/rogue", "serviceaccount/rogue")


def succeeds(command: list[str]) -> bool:
    try:
        run(*command)
    except ClusterFault:
        return False
    return True


def test_he_has_an_identity_of_his_own() -> None:
    until(lambda: succeeds(SHOW), 30, "SPIRE knows him")
    assert "spiffe://zt.example/ns/zt-demo/sa/rogue" in run(*SHOW)


def test_the_network_does_not_know_him() -> None:
    assert not succeeds(CONNECT)


def test_he_may_not_be_named_like_orders_and_is_not_taken_for_him() -> None:
    with pytest.raises(ClusterFault, match="account_reused"):
        run(*LABEL)
    assert DELETE == ["kubectl", "delete", "validatingadmissionpolicybinding", "zt-accounts"]
    label = kubectl(
        "--namespace", "zt-demo", "get", "pod", "rogue", "--output", "jsonpath={.metadata.labels}"
    )
    assert "orders" not in label
    with without("zt-accounts", lambda: succeeds([*LABEL, "--dry-run=server"])):
        run(*LABEL)
        until(lambda: succeeds(CONNECT), 30, "the network takes him for orders")
        run(
            "kubectl",
            "--namespace",
            "zt-demo",
            "label",
            "pod",
            "rogue",
            "app.kubernetes.io/name=rogue",
            "--overwrite",
        )
