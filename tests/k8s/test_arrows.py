"""Network policies as data: of all pairs of pods and ports, these connect, in each overlay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.k8s.cluster import OVERLAY, ROOT
from ztdev.kubernetes.kubectl import rendered
from ztdev.kubernetes.picture import beyond, picture
from ztdev.kubernetes.reach import Arrow, Place, arrows

SERVICES = {"frontend", "orders", "orders-migrate", "payments", "payments-migrate"}

#: The picture in docs, as far as it is the same everywhere.
CHAIN = {
    Arrow("zt-demo/frontend", "zt-demo/orders", "tcp/8443"),
    Arrow("zt-demo/orders", "zt-demo/payments", "tcp/8443"),
    Arrow("outside", "spire-system/spire-server", "tcp/8081"),
}

#: What is a service of AWS elsewhere is a pod in this overlay.
LOCAL = {
    *(
        Arrow(f"zt-demo/{service}", "zt-local/data", port)
        for service in SERVICES - {"frontend"}
        for port in ("tcp/4566", "tcp/5432")
    ),
    Arrow("zt-local/data", "zt-local/data", "tcp/4566"),
    Arrow("zt-local/data", "zt-local/data", "tcp/5432"),
    Arrow("zt-local/data", "API server", "tcp/6443"),
    Arrow("spire-system/spire-server", "API server", "tcp/6443"),
}

EKS = {
    Arrow("door", "zt-demo/frontend", "tcp/8080"),
    Arrow("door", "zt-demo/frontend", "tcp/9090"),
    *(
        Arrow(f"zt-demo/{name}", where, port)
        for service in ("orders", "payments")
        for name in (service, f"{service}-migrate")
        for where, port in ((f"{service}' database", "tcp/5432"), ("endpoints of AWS", "tcp/443"))
    ),
    Arrow("spire-system/spire-server", "API server", "tcp/443"),
    # To S3, by a gateway: its addresses are outside.
    *(Arrow("kyverno/kyverno", where, "tcp/443") for where in ("API server", "endpoints of AWS", "outside")),
    Arrow("API server", "kyverno/kyverno", "tcp/9443"),
    # Anybody may knock at SPIRE's server: an agent has the address of its node.
    Arrow("somebody's pod", "spire-system/spire-server", "tcp/8081"),
    Arrow("door", "spire-system/spire-server", "tcp/8081"),
    Arrow("API server", "spire-system/spire-server", "tcp/8081"),
}


def names(*pods: str) -> set[Arrow]:
    return {Arrow(pod, "kube-system/kube-dns", port) for pod in pods for port in ("tcp/53", "udp/53")}


ASK = names("spire-system/spire-server", *(f"zt-demo/{each}" for each in SERVICES))

ALLOWED = {
    OVERLAY: CHAIN | LOCAL | ASK | names("zt-local/data"),
    OVERLAY.with_name("eks"): CHAIN | EKS | ASK | names("kyverno/kyverno"),
}


@pytest.mark.parametrize("overlay", ALLOWED, ids=lambda overlay: overlay.name)
def test_exactly_the_arrows_of_the_picture_are_allowed(overlay: Path) -> None:
    assert set(arrows(rendered(overlay), beyond(overlay))) == ALLOWED[overlay]


@pytest.mark.parametrize("overlay", ALLOWED, ids=lambda overlay: overlay.name)
def test_the_picture_is_of_these_policies(overlay: Path) -> None:
    allowed = arrows(rendered(overlay), beyond(overlay))
    assert (overlay / "arrows.md").read_text() == picture(allowed), "run: make arrows"


def test_with_observability_prometheus_reads_metrics_and_nothing_else(tmp_path: Path) -> None:
    components = [os.path.relpath(ROOT / "k8s" / "components" / "observability", tmp_path)]
    wrapper = {"resources": [os.path.relpath(OVERLAY, tmp_path)], "components": components}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(wrapper))
    labels = (("app.kubernetes.io/name", "prometheus"),)
    prometheus = Place("prometheus", "monitoring", labels, calls=True)
    found = arrows(rendered(tmp_path), [prometheus])
    assert {arrow for arrow in found if arrow.sender == str(prometheus)} == {
        *(
            Arrow(str(prometheus), f"zt-demo/{service}", "tcp/9090")
            for service in ("frontend", "orders", "payments")
        ),
        Arrow(str(prometheus), "spire-system/spire-server", "tcp/8081"),
    }
