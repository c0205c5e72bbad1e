"""overlays/local on the cluster that KUBECONFIG names: images loaded, applied, ready.

`K8S_LOAD` is a command that takes the name of an image of the Docker engine here, makes the cluster have it,
and prints what a pod calls it by, with its digest.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ztdev.errors import StackError
from ztdev.images import images
from ztdev.ports import choose_free_ports
from ztdev.postgres import make_server_tls

ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / "k8s" / "overlays" / "local"

#: Where the overlay is written with the images that the cluster has.
PINNED = ROOT / "build" / "k8s-local"

CONTROLLER_MANAGER = "ghcr.io/spiffe/spire-controller-manager:0.6.3"

NAMESPACES = ("zt-demo", "zt-local", "spire-system")

#: What the cluster had to say, for whoever looks for the reason of a failure.
LOG = ROOT / "build" / "k8s.log"

DATABASE_HOST = "postgres.zt-local.svc.cluster.local"


class ClusterFault(StackError):
    """The cluster, or what it was asked for, failed. The text is what kubectl said."""


def run(*command: str, given: str = "", timeout: float = 180) -> str:
    """What a command prints. Raises with what it said when it fails."""
    done = subprocess.run(
        command, input=given, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode != 0:
        raise ClusterFault(f"{shlex.join(command[:6])}: {done.stdout[-2000:]}{done.stderr[-3000:]}".strip())
    return done.stdout


def kubectl(*arguments: str, given: str = "", timeout: float = 180) -> str:
    return run("kubectl", *arguments, given=given, timeout=timeout)


def read(*arguments: str) -> dict[str, Any]:
    """An object, or a list of them, as the API server has it."""
    found: dict[str, Any] = json.loads(kubectl("get", *arguments, "--output", "json"))
    return found


def apply(*objects: dict[str, Any], text: str = "") -> None:
    """Apply objects, or a text of them, as the server itself sees them: an unknown field is a fault."""
    given = text or yaml.safe_dump_all(objects)
    kubectl(
        "apply", "--server-side", "--force-conflicts", "--validate=strict", "--filename", "-", given=given
    )


def pin(loaded: dict[str, str]) -> None:
    """Write the overlay with every image by its digest; `loaded` maps an overlay's name to NAME@DIGEST."""
    PINNED.mkdir(parents=True, exist_ok=True)
    pinned = [
        {"name": name, "newName": image.partition("@")[0], "digest": image.partition("@")[2]}
        for name, image in loaded.items()
    ]
    wrapper = {"resources": [os.path.relpath(OVERLAY, PINNED)], "images": pinned}
    (PINNED / "kustomization.yaml").write_text(yaml.safe_dump(wrapper))


def manifests() -> str:
    """What `pin` has written, as it is applied."""
    return kubectl("kustomize", "--load-restrictor", "LoadRestrictionsNone", str(PINNED))


def pods_of(service: str) -> list[dict[str, Any]]:
    """The pods of a service of ours."""
    selector = f"app.kubernetes.io/name={service}"
    found: list[dict[str, Any]] = read("pods", "--namespace", "zt-demo", "--selector", selector)["items"]
    return found


def rolled_out(namespace: str, kind: str, seconds: int = 150) -> None:
    """Wait until all of its pods are those that are wanted now, and ready."""
    status = ("rollout", "status", f"--timeout={seconds}s", kind)
    kubectl("--namespace", namespace, *status, timeout=seconds + 20)


def database_secrets() -> list[dict[str, Any]]:
    """A certificate of the database, its authority for those who call it, and an administrator's password."""
    tls = make_server_tls((DATABASE_HOST, "postgres"))

    def secret(name: str, **data: str) -> dict[str, Any]:
        metadata = {"name": name, "namespace": "zt-local"}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}

    def authority(namespace: str) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "database-ca", "namespace": namespace},
            "data": {"ca.pem": tls.authorities.decode()},
        }

    certificate = {"server.crt": tls.certificate.decode(), "server.key": tls.key.decode()}
    return [
        secret("database-tls", **certificate),
        secret("database-administrator", password=os.urandom(24).hex()),
        authority("zt-local"),
        authority("zt-demo"),
    ]


def load_images() -> dict[str, str]:
    """Build them, and make the cluster have them: what it calls each, by its name without the tag."""
    run("docker", "compose", "build", "--quiet", timeout=1200)
    run(
        *("docker", "build", "--quiet", "--file", "tests/k8s/controller-manager.Dockerfile"),
        *("--tag", CONTROLLER_MANAGER, ".tools/spire-controller-manager"),
    )
    load = shlex.split(os.environ["K8S_LOAD"])
    wanted = (*images().values(), CONTROLLER_MANAGER)
    return {image.rpartition(":")[0]: run(*load, image).split()[-1] for image in wanted}


@contextmanager
def page() -> Iterator[str]:
    """The address of the page, as somebody with access to the cluster opens it."""
    (port,) = choose_free_ports(1)
    forward = ("kubectl", "--namespace", "zt-demo", "port-forward", "service/frontend", f"{port}:80")
    with subprocess.Popen(forward, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            if not said.startswith("Forwarding"):
                raise ClusterFault(said + process.stdout.read())
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def deploy() -> None:
    """Everything, until it is ready."""
    pin(load_images())
    text = manifests()
    objects = [each for each in yaml.safe_load_all(text) if each]
    early = [each for each in objects if each["kind"] in ("Namespace", "CustomResourceDefinition")]
    apply(*early)
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", "--all")
    apply({"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", **CSI_DRIVER})
    if not kubectl("--namespace", "zt-local", "get", "secrets", "--output", "name", "--ignore-not-found"):
        apply(*database_secrets())
    apply(text=text)
    for namespace, kind in (
        ("spire-system", "statefulset/spire-server"),
        ("spire-system", "daemonset/spire-agent"),
        ("zt-local", "statefulset/data"),
        ("zt-demo", "deployment/payments"),
        ("zt-demo", "deployment/orders"),
        ("zt-demo", "deployment/frontend"),
    ):
        rolled_out(namespace, kind)


def told() -> str:
    """Pods, events and logs of our namespaces."""
    parts = []
    for namespace in NAMESPACES:
        parts.append(_try("--namespace", namespace, "get", "pods", "--output=wide"))
        parts.append(_try("--namespace", namespace, "get", "events", "--sort-by=.lastTimestamp"))
        pods = _try("--namespace", namespace, "get", "pods", "--output=name").split()
        parts += [
            f"== {pod}\n" + _try("--namespace", namespace, "logs", pod, "--all-containers", "--tail=300")
            for pod in pods
        ]
    return "\n".join(parts)


def _try(*arguments: str) -> str:
    try:
        return kubectl(*arguments)
    except ClusterFault as fault:
        return str(fault)


def remove() -> None:
    """Take away what `deploy` has made; the rest of the cluster is not touched."""
    kubectl("delete", "--ignore-not-found", "--wait=false", "--filename", "-", given=manifests())


def python(namespace: str, target: str, program: str, *arguments: str, stdin: str = "") -> str:
    """Run a program in a container of ours, as its user; `target` is a pod or ``deployment/NAME``."""
    command = ("--namespace", namespace, "exec", "--stdin", target, "--")
    return kubectl(*command, PYTHON, "-c", program, *arguments, given=stdin)


#: The Python of the services' images.
PYTHON = "/opt/zt/bin/python"

#: The object of SPIFFE's driver, whose program the cluster under test has or stands in for.
CSI_DRIVER: dict[str, Any] = {
    "metadata": {
        "name": "csi.spiffe.io",
        "labels": {"security.kubernetes.io/csi-ephemeral-volume-profile": "restricted"},
    },
    "spec": {
        "attachRequired": False,
        "podInfoOnMount": True,
        "fsGroupPolicy": "None",
        "volumeLifecycleModes": ["Ephemeral"],
    },
}
