"""What is put onto the cluster, in the order in which one thing needs another."""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import yaml

from ztdev.errors import ProgramMissing, StackError
from ztdev.kubernetes.kubectl import ClusterFault, apply, kubectl, read
from ztdev.postgres import make_server_tls

from .settings import BUILD, ROOT

Say = Callable[[str], None]

NAMESPACE, DATABASES, DOOR = "zt-demo", "zt-demo-databases", "zt-door"
SPIRE, KYVERNO = "spire-system", "kyverno"

#: What runs of ours, in the order in which each needs the other.
SERVICES = ("payments", "orders", "frontend")
MIGRATIONS = ("orders-migrate", "payments-migrate")

#: What is not put there before the databases know whom they serve.
_LATE = {"Deployment", "Job"}
#: What others are of, or are in.
_FIRST = {"Namespace", "CustomResourceDefinition", "StorageClass"}

#: Kyverno's kinds, as `make deploy-tools` takes them from its module.
KYVERNO_KINDS = ROOT / ".tools" / "kyverno" / "crds.yaml"

#: Seconds that EKS takes a token for, less one minute.
_TOKEN_LASTS = 14 * 60


# -- the way in ------------------------------------------------------------------------------------------


def choose(session: boto3.Session, name: str, kubeconfig: Path | None) -> Path:
    """Have kubectl ask the cluster `name`, by `kubeconfig` or else by the credentials of this session."""
    file = kubeconfig or _write_kubeconfig(session, name)
    os.environ["KUBECONFIG"] = str(file)
    return file


def _write_kubeconfig(session: boto3.Session, name: str) -> Path:
    """Write how kubectl reaches the cluster `name` with the credentials of this session: no key is in it."""
    cluster = session.client("eks").describe_cluster(name=name)["cluster"]
    token = ["-m", "ztdev.eks", "token", "--cluster", name, "--region", session.region_name]
    user: dict[str, Any] = {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": token,
            "interactiveMode": "Never",
        }
    }
    if session.profile_name != "default":
        user["exec"]["env"] = [{"name": "AWS_PROFILE", "value": session.profile_name}]
    authority = cluster["certificateAuthority"]["data"]
    written = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [
            {
                "name": name,
                "cluster": {"server": cluster["endpoint"], "certificate-authority-data": authority},
            }
        ],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "kubeconfig"
    file.touch(mode=0o600)
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    return file


def token(session: boto3.Session, cluster: str) -> dict[str, Any]:
    """What kubectl shows EKS: a signed question to STS, by which EKS learns who asks (an ExecCredential,
    client.authentication.k8s.io/v1)."""
    client = session.client("sts")

    def name_cluster(request: Any, **_: Any) -> None:
        request.headers["x-k8s-aws-id"] = cluster

    client.meta.events.register("before-sign.sts.GetCallerIdentity", name_cluster)
    url = client.generate_presigned_url("get_caller_identity", ExpiresIn=60, HttpMethod="GET")
    until = datetime.now(UTC) + timedelta(seconds=_TOKEN_LASTS)
    text = base64.urlsafe_b64encode(url.encode()).decode().rstrip("=")
    return {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": f"k8s-aws-v1.{text}", "expirationTimestamp": f"{until:%Y-%m-%dT%H:%M:%SZ}"},
    }


def answers() -> str:
    """The version of the cluster that KUBECONFIG names. Raises `ClusterFault` when none answers."""
    told: Mapping[str, Any] = json.loads(kubectl("version", "--output", "json", timeout=60))
    return str(told["serverVersion"]["gitVersion"])


# -- what is put there -----------------------------------------------------------------------------------


def prepare(objects: Collection[dict[str, Any]]) -> None:
    """Namespaces and kinds."""
    if not KYVERNO_KINDS.is_file():
        raise ProgramMissing(f"{KYVERNO_KINDS} is not there: make deploy-tools")
    kinds = f"--filename={KYVERNO_KINDS}"
    kubectl("apply", "--server-side", "--force-conflicts", kinds)
    apply(*[each for each in objects if each["kind"] in _FIRST])
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", "--all")


def apply_signatures(objects: Collection[dict[str, Any]]) -> None:
    """From here on an image that is not signed is let in nowhere of ours. Who checks it comes first."""
    policies = [each for each in objects if each["kind"] == "ImageValidatingPolicy"]
    names = {each["metadata"]["name"] for each in policies}
    apply(*[each for each in objects if _is_kyverno(each)])
    rolled_out(KYVERNO, "Deployment", "kyverno")
    apply(*policies)
    for name in names:
        ready = "--for=jsonpath={.status.conditionStatus.ready}=true"
        kubectl("wait", ready, "--timeout=120s", f"imagevalidatingpolicy/{name}")


def give(database_ca: str) -> None:
    """What is in no manifest: the databases' authorities; and the key of the page's forms, made only once."""
    apply(_authorities(NAMESPACE, database_ca))
    _keep(NAMESPACE, "frontend-forms", {"key": secrets.token_bytes(32)})


def apply_rules(objects: Collection[dict[str, Any]]) -> None:
    """All but what runs of ours: SPIRE, the network's rules and those of admission, and wait until SPIRE
    serves."""
    apply(*[each for each in objects if not _is_late(each)])
    for each in objects:
        if each["kind"] in ("StatefulSet", "DaemonSet"):
            rolled_out(each["metadata"]["namespace"], each["kind"], each["metadata"]["name"])


def make_databases(objects: Collection[dict[str, Any]], database_ca: str, say: Say) -> None:
    """Run the job that makes the databases' roles, and wait for its end. It is run anew each time."""
    apply(*[each for each in objects if each["kind"] == "Namespace"])
    apply(_authorities(DATABASES, database_ca))
    kubectl("--namespace", DATABASES, "delete", "job", "databases", "--ignore-not-found")
    apply(*objects)
    completed(DATABASES, "databases", say)


def forget_databases() -> None:
    """The job's namespace is needed no more."""
    kubectl("delete", "namespace", DATABASES, "--ignore-not-found", timeout=300)


def apply_services(objects: Collection[dict[str, Any]], say: Say) -> None:
    """What runs of ours, with the databases' schemas brought up to date, and wait until all is ready."""
    kubectl("--namespace", NAMESPACE, "delete", "job", "--ignore-not-found", *MIGRATIONS)
    apply(*[each for each in objects if each["kind"] not in _FIRST])
    for job in MIGRATIONS:
        completed(NAMESPACE, job, say)
    for service in SERVICES:
        rolled_out(NAMESPACE, "Deployment", service)
        say(f"{service} is ready")


def apply_door(objects: Collection[dict[str, Any]]) -> None:
    """Who enters the pods of frontend into the door's target group. It does not start without a certificate
    for its webhooks, which are asked by nobody here: it gets one that nobody knows."""
    apply(*[each for each in objects if each["kind"] in _FIRST])
    kinds = [each["metadata"]["name"] for each in objects if each["kind"] == "CustomResourceDefinition"]
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", *kinds)
    tls = make_server_tls(("localhost",), name="door")
    certificate = {"tls.crt": tls.certificate.decode(), "tls.key": tls.key.decode()}
    _keep(DOOR, "door-certificate", {name: text.encode() for name, text in certificate.items()})
    apply(*[each for each in objects if each["kind"] not in _FIRST])
    for each in objects:
        if each["kind"] == "Deployment":
            rolled_out(DOOR, "Deployment", each["metadata"]["name"])


def _is_kyverno(each: Mapping[str, Any]) -> bool:
    """In its namespace, or a right of its account."""
    metadata = each["metadata"]
    return KYVERNO in (metadata.get("namespace"), metadata["name"]) and each["kind"] not in _FIRST


def _keep(namespace: str, name: str, contents: Mapping[str, bytes]) -> None:
    """A Secret with `contents`, unless there is one of that name already."""
    try:
        kubectl("--namespace", namespace, "get", "secret", name, "--output", "name")
    except ClusterFault as fault:
        if "NotFound" not in str(fault):
            raise
        data = {key: base64.b64encode(value).decode() for key, value in contents.items()}
        metadata = {"name": name, "namespace": namespace}
        apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})


def _is_late(each: Mapping[str, Any]) -> bool:
    return each["kind"] in _FIRST or (
        each["kind"] in _LATE and each["metadata"].get("namespace") == NAMESPACE
    )


def _authorities(namespace: str, pem: str) -> dict[str, Any]:
    metadata = {"name": "database-ca", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"ca.pem": pem}}


# -- waiting ---------------------------------------------------------------------------------------------


def rolled_out(namespace: str, kind: str, name: str, within: int = 600) -> None:
    """Wait until all pods of it are those that are wanted now, and ready.

    Raises:
        ClusterFault: they are not, after `within` seconds. The text says what each pod waits for.
    """
    status = ("rollout", "status", f"--timeout={within}s", f"{kind.lower()}/{name}")
    try:
        kubectl("--namespace", namespace, *status, timeout=within + 30)
    except ClusterFault as fault:
        waiting = "\n".join(f"    {line}" for line in unready(namespace))
        raise ClusterFault(
            f"{kind} {name} in {namespace} is not ready: {fault}\n{waiting}".rstrip()
        ) from None


def completed(namespace: str, name: str, say: Say, within: float = 900) -> None:
    """Wait until a job has done its work.

    Raises:
        ClusterFault: it gave up, or it took too long. The text has the last lines that it wrote.
    """
    deadline = time.monotonic() + within
    said: list[str] = []
    while True:
        status = read("job", name, "--namespace", namespace).get("status", {})
        ended = {each["type"] for each in status.get("conditions", []) if each["status"] == "True"}
        if "Complete" in ended:
            return
        if "Failed" in ended or time.monotonic() > deadline:
            logs = _told("--namespace", namespace, "logs", f"job/{name}", "--tail=12")
            why = "gave up" if "Failed" in ended else f"is not done after {within:.0f} s"
            waiting = "\n".join(f"    {line}" for line in [*logs.splitlines(), *unready(namespace)])
            raise ClusterFault(f"The job {name} in {namespace} {why}:\n{waiting}")
        for line in unready(namespace):
            if line not in said:
                said.append(line)
                say(line)
        time.sleep(1)  # between two looks at the job, until it has ended or `within` is over


def unready(namespace: str) -> list[str]:
    """What each pod that is not ready waits for, or why there is none, a line each."""
    lines = []
    for pod in read("pods", "--namespace", namespace)["items"]:
        status = pod.get("status", {})
        if status.get("phase") == "Succeeded":
            continue
        conditions = {each["type"]: each for each in status.get("conditions", [])}
        if conditions.get("Ready", {}).get("status") == "True":
            continue
        containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
        reasons = [
            f"{state.get('reason', '?')} {state.get('message', '')}".strip()
            for each in containers
            if (state := each.get("state", {}).get("waiting"))
        ]
        scheduled = conditions.get("PodScheduled", {})
        if scheduled.get("status") == "False":
            reasons.append(str(scheduled.get("message", "not scheduled")))
        if reasons:
            lines.append(f"{pod['metadata']['name']}: {'; '.join(reasons)}")
    return lines + _refused(namespace)


def _refused(namespace: str) -> list[str]:
    """Of whom no pod is made, and why, as far as it was told in the last two minutes."""
    told = read("events", "--namespace", namespace, "--field-selector", "reason=FailedCreate")["items"]
    since = datetime.now(UTC) - timedelta(minutes=2)
    return [
        f"{event['involvedObject']['kind']} {event['involvedObject']['name']}: {event['message']}"
        for event in told
        if event.get("lastTimestamp") and datetime.fromisoformat(event["lastTimestamp"]) > since
    ]


def _told(*arguments: str) -> str:
    try:
        return kubectl(*arguments)
    except StackError as error:
        return str(error)
