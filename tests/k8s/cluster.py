"""overlays/local on the cluster that KUBECONFIG names: images loaded, applied, ready.

`K8S_LOAD` is a command that takes the name of an image of the Docker engine here, makes the cluster have it,
and prints what a pod calls it by, with its digest.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.waiting import until
from ztdev.images import images
from ztdev.kubernetes.kubectl import ClusterFault, apply, kubectl, read, rendered, run
from ztdev.ports import choose_free_ports
from ztdev.postgres import make_server_tls

ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / "k8s" / "overlays" / "local"

#: Where the overlay is written with the images that the cluster has.
PINNED = ROOT / "build" / "k8s-local"

CONTROLLER_MANAGER = "ghcr.io/spiffe/spire-controller-manager:0.6.3"

NAMESPACES = ("zt-demo", "zt-local", "spire-system")

#: An image of each namespace where admission asks where images come from.
IMAGE_IN = {"zt-demo": "zt-demo/orders", "spire-system": "ghcr.io/spiffe/spire-server"}

#: What the cluster had to say, for whoever looks for the reason of a failure.
LOG = ROOT / "build" / "k8s.log"

DATABASE_HOST = "postgres.zt-local.svc.cluster.local"


def pin(loaded: dict[str, str]) -> None:
    """Write the overlay with every image by its digest; `loaded` maps an overlay's name to NAME@DIGEST."""
    PINNED.mkdir(parents=True, exist_ok=True)
    pinned = [
        {"name": name, "newName": image.partition("@")[0], "digest": image.partition("@")[2]}
        for name, image in loaded.items()
    ]
    sources = {
        "name": "images",
        "namespace": "zt-admission",
        "behavior": "merge",
        "options": {"disableNameSuffixHash": True},
        "literals": [f"{where}={loaded[name].rpartition('/')[0]}/" for where, name in IMAGE_IN.items()],
    }
    wrapper = {
        "resources": [os.path.relpath(OVERLAY, PINNED)],
        "images": pinned,
        "configMapGenerator": [sources],
    }
    (PINNED / "kustomization.yaml").write_text(yaml.safe_dump(wrapper))


def manifests() -> list[dict[str, Any]]:
    """What `pin` has written, as it is applied."""
    return rendered(PINNED)


@contextmanager
def without(policy: str, let_in: Callable[[], bool]) -> Iterator[None]:
    """Admission as it is while nobody has bound `policy`. `let_in` tells whether it is not asked (any more);
    the API server takes a moment to notice."""
    binding = read("validatingadmissionpolicybinding", policy)
    kubectl("delete", "validatingadmissionpolicybinding", policy)
    try:
        until(let_in, 20, f"{policy} is not asked any more")
        yield
    finally:
        apply({**binding, "metadata": {"name": policy}})
        until(lambda: not let_in(), 20, f"{policy} is asked again")


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
    wanted = (*images().values(), CONTROLLER_MANAGER)
    return {image.rpartition(":")[0]: load(image) for image in wanted}


def load(image: str) -> str:
    """Make the cluster have an image of the engine here: what a pod calls it by, with its digest."""
    return run(*shlex.split(os.environ["K8S_LOAD"]), image).split()[-1]


@contextmanager
def forwarded(service: str, port: int) -> Iterator[int]:
    """The port of this machine by which somebody with access to the cluster reaches a service of ours."""
    (here,) = choose_free_ports(1)
    forward = ("kubectl", "--namespace", "zt-demo", "port-forward", f"service/{service}", f"{here}:{port}")
    with subprocess.Popen(forward, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            if not said.startswith("Forwarding"):
                raise ClusterFault(said + process.stdout.read())
            yield here
        finally:
            process.terminate()


@contextmanager
def page(scheme: str = "http") -> Iterator[str]:
    """The address of the page."""
    with forwarded("frontend", 80) as port:
        yield f"{scheme}://localhost:{port}"


def deploy() -> None:
    """Everything, until it is ready."""
    pin(load_images())
    objects = manifests()
    early = [each for each in objects if each["kind"] in ("Namespace", "CustomResourceDefinition")]
    apply(*early)
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", "--all")
    if not kubectl("--namespace", "zt-local", "get", "secrets", "--output", "name", "--ignore-not-found"):
        apply(*database_secrets())
    apply(*objects)
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
    gone = ("delete", "--ignore-not-found", "--wait=false", "--filename=-")
    kubectl(*gone, given=yaml.safe_dump_all(manifests()))


def rows(database: str, query: str) -> list[str]:
    """What the administrator reads in a database, a line for each row."""
    password = 'PGPASSWORD="$(cat /srv/database/administrator/password)"'
    ask = f"{password} psql --username postgres --host /var/run/postgresql -At --dbname {database}"
    target = ("--namespace", "zt-local", "exec", "--stdin", "statefulset/data", "--container", "postgres")
    return kubectl(*target, "--", "sh", "-c", ask, given=query).splitlines()
