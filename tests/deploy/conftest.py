"""An account and a cluster with nothing in them: the local AWS, a registry, a database, and the edge."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.k8s import cluster
from tests.waiting import until
from ztdev.aws.cloud import LocalCloud
from ztdev.aws.issuer import AUDIENCE, Issuer
from ztdev.eks import preflight
from ztdev.eks.settings import ARCHITECTURES, ROOT
from ztdev.functions import kept, with_authorities
from ztdev.kubernetes.kubectl import apply, kubectl, read, rendered, run
from ztdev.state import default_tools_directory

from .edge import Edge

#: The node's address, where pods reach what runs beside the cluster.
NODE = "172.30.255.1"
ISSUER = "https://kubernetes.default.svc.cluster.local"
REGISTRY = "localhost:5000"
BUCKET = "zt-demo-packages-111122223333-eu-central-1"

_REGISTRY_CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:5000"}}
"""


@dataclass(frozen=True)
class Database:
    """A database, as platform.yaml's `outputs` tell of it, and who has signed its certificate."""

    outputs: Mapping[str, str]
    ca_file: Path


class EmptyCloud(LocalCloud):
    """The local AWS with the cluster's OIDC provider, and nothing deployed. In a bucket is `package`."""

    package: Path

    def _configuration(self) -> dict[str, Any]:
        packages = {f"{BUCKET}/{self.package.name}": str(self.package)}
        return super()._configuration() | {"packages": packages}

    def _deploy(self) -> None:
        self.admin_client("iam").create_open_id_connect_provider(
            Url=self._issuer.url, ClientIDList=[AUDIENCE], ThumbprintList=["0" * 40]
        )

    def environment(self) -> dict[str, str]:
        """For programs that ask it as the administrator."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self._admin.key_id,
            "AWS_SECRET_ACCESS_KEY": self._admin.secret,
        }


class Registries:
    """The registry, for the engine here and for the cluster: two processes on the same folder."""

    def __init__(self, folder: Path) -> None:
        self._config, self._images, self._log = (folder / name for name in ("config.yml", "images", "log"))
        self._config.write_text(_REGISTRY_CONFIG.format(folder=self._images))
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Serve, in the network of the engine and in that of the node."""
        serve = ("docker-registry", "serve", str(self._config))
        engine = ("nsenter", f"--net=/proc/{_engine()}/ns/net")
        with self._log.open("ab") as log:
            self._running = [subprocess.Popen(each, stderr=log) for each in (serve, (*engine, *serve))]
        until(self._serves, 20, "the registry serves")

    def stop(self) -> None:
        """Serve no more."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait(10)
        self._running = []

    def files(self) -> set[str]:
        """What is kept, by name."""
        return {str(file) for file in self._images.rglob("*") if file.is_file()}

    def _serves(self) -> bool:
        try:
            return httpx.get(f"http://{REGISTRY}/v2/").status_code == 200
        except httpx.TransportError:
            return False


def _engine() -> str:
    """The process of the Docker engine."""
    found = run("pgrep", "-x", "dockerd").split()
    return found[0]


_NAMESPACES = ("zt-demo", "zt-local", "spire-system", "zt-admission", "zt-door", "kyverno")


@pytest.fixture(scope="module", autouse=True)
def empty() -> None:
    """What other tests have taken away from the cluster is gone."""
    namespaces = [f"namespace/{name}" for name in _NAMESPACES]
    kinds = [each["metadata"]["name"] for each in rendered(ROOT / "k8s" / "spire" / "crds")]
    for gone in (*namespaces, *(f"customresourcedefinition/{name}" for name in kinds)):
        kubectl("wait", "--for=delete", gone, "--timeout=120s")


@pytest.fixture(scope="module")
def registries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registries]:
    """Empty, and running."""
    registries = Registries(tmp_path_factory.mktemp("registry"))
    registries.start()
    yield registries
    registries.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cloud(database: Database, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmptyCloud]:
    """Tokens of the cluster are taken."""
    folder = tmp_path_factory.mktemp("aws")
    packages = default_tools_directory() / "packages"
    package = await asyncio.to_thread(kept, packages, ARCHITECTURES[preflight.engine()][1])
    authority = folder / "cluster.pem"
    authority.write_text(read("configmap", "kube-root-ca.crt", "--namespace", "default")["data"]["ca.crt"])
    address = read("service", "kubernetes", "--namespace", "default")["spec"]["clusterIP"]
    issuer = Issuer(ISSUER, authority, {"kubernetes.default.svc.cluster.local:443": f"{address}:443"})
    cloud = EmptyCloud(
        folder / "cloud",
        host="0.0.0.0",
        port=443,
        names=(f"{NODE}:443", NODE, "127.0.0.1"),
        issuer=issuer,
        log_file=folder / "aws.log",
        databases={},
        environment_dir=default_tools_directory() / "aws-env",
    )
    cloud.package = with_authorities(package, database.ca_file, folder).file
    async with cloud:
        yield cloud


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """PostgreSQL with a database of each service, and an administrator who is no superuser, as RDS's."""
    objects = [
        each
        for each in rendered(cluster.OVERLAY)
        if "zt-local" in (each["metadata"].get("namespace"), each["metadata"]["name"])
        and each["kind"] != "NetworkPolicy"
    ]
    discovery = [each for each in rendered(cluster.OVERLAY) if each["metadata"]["name"] == _DISCOVERY]
    for each in objects:
        if "pg_hba.conf" in each.get("data", {}):
            each["data"]["pg_hba.conf"] += "hostssl all administrator all scram-sha-256\n"
        if each["kind"] == "StatefulSet":
            pod = each["spec"]["template"]["spec"]
            pod["containers"] = [one for one in pod["containers"] if one["name"] == "postgres"]
            pod["containers"][0]["image"] = cluster.load("postgres:17")
    secrets = [each for each in cluster.database_secrets() if each["metadata"]["namespace"] == "zt-local"]
    apply(*[each for each in objects if each["kind"] == "Namespace"])
    apply(*secrets, *discovery, *[each for each in objects if each["kind"] != "Namespace"])
    cluster.rolled_out("zt-local", "statefulset/data")
    cluster.rows("postgres", _LIKE_RDS)
    for name in ("orders", "payments"):
        cluster.rows("postgres", f"CREATE DATABASE {name} OWNER administrator")
    address = read("pod", "data-0", "--namespace", "zt-local")["status"]["podIP"]
    outputs = {
        "OrdersDatabaseHost": cluster.DATABASE_HOST,
        "PaymentsDatabaseHost": cluster.DATABASE_HOST,
        "OrdersDataCidr": f"{address}/32",
        "PaymentsDataCidr": f"{address}/32",
    }
    (authorities,) = (each for each in secrets if each["metadata"]["name"] == "database-ca")
    ca_file = tmp_path_factory.mktemp("database") / "ca.pem"
    ca_file.write_text(authorities["data"]["ca.pem"])
    yield Database(outputs, ca_file)
    kubectl("delete", "namespace", "zt-local", "--wait=false")


_DISCOVERY = "zt-local-issuer-discovery"
_LIKE_RDS = "CREATE ROLE administrator LOGIN CREATEROLE CREATEDB PASSWORD 'administrator'"


@pytest.fixture(scope="module")
def edge(database: Database, cloud: EmptyCloud, registries: Registries) -> Edge:
    """The rest of the account."""
    edge = Edge(REGISTRY)
    secrets = cloud.admin_client("secretsmanager")
    secrets.create_secret(Name="zt-demo-door/client", SecretString="of the page")
    login = '{"username": "administrator", "password": "administrator"}'
    server = read("endpoints", "kubernetes", "--namespace", "default")["subsets"][0]["addresses"][0]["ip"]
    edge.outputs = {
        **database.outputs,
        "Registry": f"{REGISTRY}/zt-demo/",
        "OidcIssuerHost": ISSUER.removeprefix("https://"),
        "EndpointsCidr": f"{NODE}/32",
        "ControlCidr": f"{server}/32",
        **{
            f"{service}AdministratorSecretArn": secrets.create_secret(
                Name=f"rds!{service.lower()}", SecretString=login
            )["ARN"]
            for service in ("Orders", "Payments")
        },
    }
    return edge
