"""`make deploy` and `make undeploy` from one end to the other: it fails at every step, and each time goes on
from there."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.k8s import cluster as local
from tests.k8s.test_rotation import spire_server
from tests.unit.test_deployer_template import allowed
from tests.waiting import until
from ztdev.aws.stacks import Stack
from ztdev.eks import __main__ as eks
from ztdev.eks import cluster, deploy, undeploy
from ztdev.eks.settings import BUILD, PREFIX, ROOT
from ztdev.images import tool
from ztdev.inside import READ_SECRETS
from ztdev.kubernetes.kubectl import ClusterFault, apply, kubectl, python, read, refusal, run, said_of
from ztdev.kubernetes.pods import as_deployed
from ztdev.shop import Visitor

from .conftest import REGISTRY, Database, EmptyCloud, Registries
from .edge import Edge

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

OVERLAY = Path(__file__).parent / "overlays" / "eks"

#: Where SPIRE's server keeps what it must not forget: on EKS a volume of its own.
VOLUME = Path("/var/tmp/zt-demo-spire")


A_DOOR = {
    "CertificateArn": "arn:aws:acm:eu-central-1:111122223333:certificate/page",
    "Issuer": "https://login.example",
    "ClientId": "page",
    "ClientSecretId": "zt-demo-door/client",
}


@dataclass
class Person:
    """Somebody who types the commands."""

    edge: Edge
    database: Database
    capsys: pytest.CaptureFixture[str]
    kubeconfig: str
    said: str = ""

    async def types(self, *arguments: str) -> int:
        """The exit status; what was said is in `said`."""
        self.capsys.readouterr()
        status = await asyncio.to_thread(eks.main, arguments)
        told = self.capsys.readouterr()
        self.said = told.out + told.err
        return status

    async def deploys(self, **instead: str) -> int:
        """`make deploy`, with options for what is not EKS's here."""
        options = {
            "region": "eu-central-1",
            "api-cidrs": "198.51.100.7/32",
            "kubeconfig": self.kubeconfig,
            "database-ca": str(self.database.ca_file),
            "overlay": str(OVERLAY),
        }
        given = options | {name.replace("_", "-"): value for name, value in instead.items()}
        flags = [part for name, value in given.items() for part in (f"--{name}", value)]
        door = [part for name, value in A_DOOR.items() for part in ("--door", f"{name}={value}")]
        return await self.types("deploy", "--yes", *flags, *door)

    async def undeploys(self) -> int:
        """`make undeploy`."""
        where = ("--region", "eu-central-1", "--kubeconfig", self.kubeconfig)
        return await self.types("undeploy", "--yes", *where)


@pytest.fixture
def person(
    edge: Edge,
    cloud: EmptyCloud,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Person:
    """Has credentials of the account."""
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KUBECONFIG", os.environ["KUBECONFIG"])  # what the command sets goes away again
    monkeypatch.setattr(eks, "boto3", SimpleNamespace(Session=edge.session))
    monkeypatch.setattr(deploy, "EVERY", 0.05)
    monkeypatch.setattr(undeploy, "EVERY", 0.2)
    return Person(edge, database, capsys, os.environ["KUBECONFIG"])


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    """On the engine. Those of the CSI driver do not run here, and are only brought to the registry."""
    run("docker", "compose", "build", "--quiet", timeout=1200)
    run(
        *("docker", "build", "--quiet", "--file", "tests/k8s/controller-manager.Dockerfile"),
        *("--tag", local.CONTROLLER_MANAGER, ".tools/spire-controller-manager"),
    )
    run(
        *("docker", "build", "--quiet", "--file", "tests/deploy/kyverno.Dockerfile"),
        *("--tag", "ghcr.io/kyverno/kyverno:v1.19.1", ".tools/kyverno"),
    )
    for name in (
        "ghcr.io/spiffe/spiffe-csi-driver:0.2.7",
        "registry.k8s.io/sig-storage/csi-node-driver-registrar:v2.13.0",
        "public.ecr.aws/eks/aws-load-balancer-controller:v3.5.0",
    ):
        run("docker", "tag", local.CONTROLLER_MANAGER, name)


@pytest.fixture(scope="module", autouse=True)
def volume() -> Iterator[None]:
    """A volume for SPIRE's server, as the class `spire` makes one."""
    VOLUME.mkdir(exist_ok=True)
    VOLUME.chmod(0o777)
    made = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "spire"},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "spire",
            "hostPath": {"path": str(VOLUME)},
        },
    }
    apply(made)
    yield
    kubectl("delete", "persistentvolume", "spire", "--wait=false")


@pytest.fixture(scope="module", autouse=True)
def nobody_checks_signatures() -> Iterator[None]:
    """Afterwards: an account's cluster goes away, with who does, but this one stays."""
    yield
    webhooks = "mutatingwebhookconfigurations,validatingwebhookconfigurations"
    kubectl("delete", "--selector", "webhook.kyverno.io/managed-by=kyverno", webhooks)
    kubectl("delete", "namespace", cluster.KYVERNO, "--wait=false", "--ignore-not-found")


@pytest.fixture(scope="module", autouse=True)
def deployer(cloud: EmptyCloud) -> dict[str, str]:
    """Stacks are made by a role of their own: its outputs."""
    stack = Stack(cloud.admin_client("cloudformation"), "zt-demo-deployer", every=0.05)
    return stack.deploy(ROOT / "infra" / "deployer.yaml", {}, {})


# -- a failure at each step ------------------------------------------------------------------------------


@contextmanager
def given(**instead: str) -> Iterator[dict[str, str]]:
    """Another option."""
    yield instead


@contextmanager
def refused(person: Person, operation: str, asked: str = "") -> Iterator[dict[str, str]]:
    """AWS refuses an operation, where `asked` is in what is asked."""
    person.edge.refuse[operation] = asked
    yield {}
    del person.edge.refuse[operation]


@contextmanager
def no_registry(registries: Registries) -> Iterator[dict[str, str]]:
    """Nobody answers at the registry."""
    registries.stop()
    yield {}
    registries.start()


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, job: str) -> Iterator[dict[str, str]]:
    """Ctrl-C, while a job is waited for."""
    wait = cluster.completed

    def completed(namespace: str, name: str, say: Callable[[str], None]) -> None:
        if name == job:
            raise KeyboardInterrupt
        wait(namespace, name, say)

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "completed", completed)
        yield {}


@contextmanager
def no_kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Nobody has fetched what Kyverno's kinds are."""
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "KYVERNO_KINDS", Path("/nowhere"))
        yield {}


@contextmanager
def everybody_to_everybody() -> Iterator[dict[str, str]]:
    """Somebody has made a policy that lets everything through."""
    metadata = {"name": "everything", "namespace": "zt-demo"}
    spec = {"podSelector": {}, "ingress": [{}], "egress": [{}], "policyTypes": ["Ingress", "Egress"]}
    apply({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec})
    yield {}
    kubectl("--namespace", "zt-demo", "delete", "networkpolicy", "everything")


async def test_it_goes_on_where_it_failed(
    person: Person,
    registries: Registries,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    nowhere = tmp_path / "kubeconfig"
    nowhere.write_text("")
    change = "cloudformation.CreateChangeSet"
    failures: list[tuple[str, Any, int, str]] = [
        ("preflight", refused(person, "sts.GetCallerIdentity"), 1, "AWS does not take the credentials"),
        ("platform", refused(person, change), 1, "platform.yaml is refused"),
        ("roles and secrets", refused(person, change, "zt-demo-workload"), 1, "workload.yaml is refused"),
        ("images", no_registry(registries), 1, "docker login"),
        ("the way into the cluster", given(kubeconfig=str(nowhere)), 1, "does not answer"),
        ("signatures at admission", no_kinds(monkeypatch), 8, "make deploy-tools"),
        ("SPIRE, network policies, admission", given(database_ca="/nowhere/ca.pem"), 1, "/nowhere/ca.pem"),
        ("roles of the databases", interrupted(monkeypatch, "databases"), 130, "run the same again"),
        ("rotation", refused(person, "s3.PutObject"), 1, "AccessDenied"),
        ("services", interrupted(monkeypatch, "orders-migrate"), 130, "run the same again"),
        ("door", refused(person, change, "zt-demo-door"), 1, "door.yaml is refused"),
        ("verify", everybody_to_everybody(), 1, "network policies are obeyed"),
    ]
    for step, failure, status, why in failures:
        with failure as instead:
            assert await person.deploys(**instead) == status, person.said
        assert f"✗ {step}" in person.said, person.said
        assert why in person.said
    before = generations(), registries.files()
    assert await person.deploys() == 0, person.said
    assert "controls are enforced" in person.said
    # Nothing but what somebody else had changed was left to do.
    assert (generations(), registries.files()) == before
    assert person.said.count("nothing to change") == 3
    assert "pushing" not in person.said
    assert "signing" not in person.said


def generations() -> dict[str, int]:
    """What runs, and how often it was changed."""
    found = read("deployments,statefulsets,daemonsets", "--all-namespaces")["items"]
    return {each["metadata"]["uid"]: each["metadata"]["generation"] for each in found}


# -- afterwards ------------------------------------------------------------------------------------------


async def test_an_order_is_paid(person: Person) -> None:
    """Over TLS, with a certificate of frontend's identity, which no browser knows."""
    bundle = json.loads(spire_server("bundle", "show", "-format", "spiffe"))
    authority = base64.b64decode(bundle["keys"][0]["x5c"][0])
    tls = ssl.create_default_context(cadata=authority)
    tls.check_hostname = False
    with local.page("https") as url, Visitor(url, tls=tls) as visitor:
        document = await asyncio.to_thread(visitor.order)
    assert document["order"]["status"] == "paid"


async def test_nobody_is_left_who_may_read_every_login(cloud: EmptyCloud) -> None:
    roles = cloud.admin_client("iam").list_roles()["Roles"]
    names = {each["RoleName"] for each in roles}
    assert {"zt-demo-orders", "zt-demo-rotate-orders"} <= names
    assert "zt-demo-databases" not in names
    assert "NotFound" in refusal("get", "namespace", cluster.DATABASES)
    for service in ("orders", "payments"):
        read_by = [f"zt-demo/{name}/db" for name in ("orders", "payments")]
        own = read_by.index(f"zt-demo/{service}/db")
        seen = python("zt-demo", f"deployment/{service}", READ_SECRETS, read_by)
        assert [each == "read" for each in seen] == [number == own for number in range(2)]


async def test_stacks_are_made_by_their_role_and_with_the_boundary(
    edge: Edge, cloud: EmptyCloud, deployer: dict[str, str]
) -> None:
    assert edge.made_by == dict.fromkeys(
        ("zt-demo-platform", "zt-demo-workload", "zt-demo-door"), deployer["CloudFormationRoleArn"]
    )
    for name in edge.made_by:
        (stack,) = cloud.admin_client("cloudformation").describe_stacks(StackName=name)["Stacks"]
        given = {each["ParameterKey"]: each["ParameterValue"] for each in stack["Parameters"]}
        assert given["RoleBoundaryArn"] == deployer["BoundaryArn"]


async def test_every_image_is_ours_signed_and_attested(person: Person, tmp_path: Path) -> None:
    """By the platform's key; by another's it is not."""
    namespaces = (cluster.NAMESPACE, cluster.SPIRE, cluster.KYVERNO)
    pods = [pod for each in namespaces for pod in read("pods", "--namespace", each)["items"]]
    running = {each["image"] for pod in pods for each in pod["spec"]["containers"]}
    assert len(running) == 7
    run(tool("cosign"), "generate-key-pair", "--output-key-prefix", str(tmp_path / "other"))
    for image in running:
        assert image.startswith(f"{REGISTRY}/zt-demo/")
        for command in (("verify",), ("verify-attestation", "--type", "cyclonedx")):
            check = (tool("cosign"), *command, "--insecure-ignore-tlog=true", "--key")
            run(*check, str(BUILD / "images.pub"), image)
            with pytest.raises(ClusterFault, match=r"signature|verif"):
                run(*check, str(tmp_path / "other.pub"), image)


async def test_pods_of_frontend_are_bound_to_the_door(cloud: EmptyCloud) -> None:
    binding = read("targetgroupbinding", "frontend", "--namespace", "zt-demo")["spec"]
    resources = cloud.admin_client("cloudformation").describe_stack_resources(StackName="zt-demo-door")
    ids = {each["LogicalResourceId"]: each["PhysicalResourceId"] for each in resources["StackResources"]}
    assert binding["targetGroupARN"] == ids["DoorTargets"]
    service = read("service", binding["serviceRef"]["name"], "--namespace", "zt-demo")
    assert binding["serviceRef"]["port"] in {each["port"] for each in service["spec"]["ports"]}


# -- images at admission -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signed:
    """Whose keys sign an image, and who its bill of materials; nobody: none does."""

    image: str = ""
    bill: str = ""


IMAGES = {
    "nobody has signed": (Signed(), "image_unsigned: "),
    "another has signed": (Signed("another", "another"), "image_unsigned: "),
    "we have signed, without a bill of materials": (Signed("ours"), "image_unattested: "),
    "we have signed, with another's bill of materials": (Signed("ours", "another"), "image_unattested: "),
    "we have signed, with a bill of materials": (Signed("ours", "ours"), ""),
}


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of somebody else."""
    name = str(tmp_path_factory.mktemp("another") / "cosign")
    run(tool("cosign"), "generate-key-pair", "--output-key-prefix", name)
    return f"{name}.key"


def pushed(signed: Signed, keys: Mapping[str, str], folder: Path) -> str:
    """An image of its own in the registry, with these signatures."""
    name = f"{REGISTRY}/zt-demo/orders:tried-{secrets.token_hex(4)}"
    built = f"FROM zt-demo/orders:local\nLABEL tried={name}\n"
    run("docker", "build", "--quiet", "--tag", name, "-", given=built)
    run("docker", "push", "--quiet", name)
    (digest,) = json.loads(run("docker", "image", "inspect", "--format", "{{json .RepoDigests}}", name))
    sign = ("--use-signing-config=false", "--tlog-upload=false", "--yes", "--key")
    if signed.image:
        run(tool("cosign"), "sign", *sign, keys[signed.image], digest)
    if signed.bill:
        bill = folder / "bill.json"
        bill.write_text('{"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": []}')
        predicate = ("--type", "cyclonedx", "--predicate", str(bill))
        run(tool("cosign"), "attest", *sign, keys[signed.bill], *predicate, digest)
    return str(digest)


def tried(image: str) -> dict[str, Any]:
    """A pod as orders has them, of another image."""
    pod = as_deployed("orders", "tried")
    pod["spec"]["containers"][0]["image"] = image
    return pod


@pytest.fixture
def images_of(
    person: Person, another: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What there is to try."""
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    keys = {"ours": f"awskms:///alias/{PREFIX}-images", "another": another}
    return {name: pushed(signed, keys, tmp_path) for name, (signed, _) in IMAGES.items()}


async def test_an_image_is_let_in_when_it_is_signed_and_attested_by_us(images_of: dict[str, str]) -> None:
    assert said_of(as_deployed("orders", "tried")) == ""
    for name, (_, reason) in IMAGES.items():
        said = said_of(tried(images_of[name]))
        if reason:
            assert f"zt-signatures failed: {reason}" in said, (name, said)
        else:
            assert said == "", name
    for where in ("initContainers", "containers"):
        pod = tried(images_of["we have signed, with a bill of materials"])
        beside = {**pod["spec"]["containers"][0], "name": "beside", "image": images_of["nobody has signed"]}
        for field in ("livenessProbe", "readinessProbe", "ports"):
            del beside[field]
        pod["spec"].setdefault(where, []).append(beside)
        assert "image_unsigned: " in said_of(pod), where

    # And what asks for it is this policy, nothing else.
    policy = read("imagevalidatingpolicy", "zt-signatures")
    kept = {name: policy[name] for name in ("apiVersion", "kind", "spec")}
    kubectl("delete", "imagevalidatingpolicy", "zt-signatures")
    try:
        unsigned = tried(images_of["nobody has signed"])
        until(lambda: not said_of(unsigned), 60, "nobody asks for signatures any more")
        for name in IMAGES:
            assert said_of(tried(images_of[name])) == "", name
    finally:
        apply({**kept, "metadata": {"name": "zt-signatures"}})
    until(lambda: "image_unsigned" in said_of(unsigned), 60, "somebody asks for signatures again")


async def test_without_kyverno_nothing_of_ours_starts_and_everything_else_does() -> None:
    ours = as_deployed("orders", "tried")
    other = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tried", "namespace": "default"}}
    other["spec"] = {"containers": [{"name": "any", "image": "registry.example/any"}]}
    assert said_of(ours) == ""
    kubectl("--namespace", cluster.KYVERNO, "scale", "deployment/kyverno", "--replicas=0")
    try:
        until(lambda: "failed calling webhook" in said_of(ours), 60, "nobody answers for Kyverno")
        assert said_of(other) == ""
        # Its own pods are not asked about, so it comes back.
    finally:
        kubectl("--namespace", cluster.KYVERNO, "scale", "deployment/kyverno", "--replicas=1")
        cluster.rolled_out(cluster.KYVERNO, "Deployment", "kyverno")
    until(lambda: said_of(ours) == "", 60, "pods of ours are let in again")


# -- away again ------------------------------------------------------------------------------------------


async def test_what_still_costs_is_named(
    person: Person, cloud: EmptyCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of the cluster that nobody has taken away."""
    monkeypatch.setattr(undeploy, "WITHIN", 2.0)
    monkeypatch.setattr(person.edge, "volumes", ["vol-0123"])
    assert await person.undeploys() == 1
    assert "volume/vol-0123" in person.said
    assert "security-group" not in person.said


async def test_all_of_it_goes_away(person: Person, cloud: EmptyCloud) -> None:
    assert await person.undeploys() == 0, person.said
    assert "Nothing is left that costs" in person.said
    for namespace in (cluster.NAMESPACE, cluster.SPIRE):
        assert "NotFound" in refusal("get", "namespace", namespace)
    secrets = cloud.admin_client("secretsmanager").list_secrets()["SecretList"]
    assert not [each for each in secrets if each["Name"].startswith("zt-demo/")]
    assert not [
        each
        for each in cloud.admin_client("cloudformation").describe_stacks()["Stacks"]
        if each["StackStatus"] != "DELETE_COMPLETE" and each["StackName"] != "zt-demo-deployer"
    ]
    assert {"s3.DeleteObjects", "resourcegroupstaggingapi.GetResources"} <= set(person.edge.asked)


async def test_who_deploys_may_do_what_it_takes_and_nothing_else(edge: Edge) -> None:
    """What was asked of AWS, all in all, is what the policy of deployer.yaml allows."""
    allows = {action for action, _ in allowed("DeployerPolicy")}
    assert edge.called - allows == set()
    assert allows - edge.called == {
        "eks:DescribeCluster",  # here the cluster is reached by another way
        "iam:PassRole",
        # The Docker engine and cosign ask these.
        *(f"ecr:{name}" for name in _OF_THE_ENGINE),
        "kms:GetPublicKey",
        "kms:Sign",
        # Of what is left of a deployment; nothing was.
        "kms:DescribeKey",
        "secretsmanager:DescribeSecret",
    }


_OF_THE_ENGINE = (
    "BatchCheckLayerAvailability",
    "BatchGetImage",
    "CompleteLayerUpload",
    "GetDownloadUrlForLayer",
    "InitiateLayerUpload",
    "PutImage",
    "UploadLayerPart",
)
