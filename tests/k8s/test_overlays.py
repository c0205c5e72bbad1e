"""Every object of the manifests that this cluster does not run passes its API server all the same.

Those of Kyverno run where `make deploy` is tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.k8s.cluster import ROOT
from ztdev.eks.account import IMAGES, Account
from ztdev.kubernetes.kubectl import apply, kubectl, rendered

FOLDERS = ("k8s/overlays/eks", "k8s/overlays/eks-databases", "k8s/overlays/eks-door", "k8s/spire/csi")

#: What this cluster has not.
NAMESPACES = ("zt-demo-databases", "zt-door")

OBJECTS = {
    f"{folder} {each['kind']} {each['metadata']['name']}": each
    for folder in FOLDERS
    for each in rendered(ROOT / folder)
    if each["kind"] not in ("CustomResourceDefinition", "Namespace", "ImageValidatingPolicy")
    and each["metadata"].get("namespace") != "kyverno"
}


@pytest.fixture(scope="module")
def namespaces_and_kinds() -> Iterator[None]:
    """Those that the cluster has not."""
    kinds = rendered(ROOT / "k8s" / "overlays" / "eks-door" / "crds")
    for name in NAMESPACES:
        kubectl("create", "namespace", name)
    apply(*kinds)
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", "--all")
    yield
    kubectl("delete", "--wait=false", "namespace", *NAMESPACES)
    names = [each["metadata"]["name"] for each in kinds]
    kubectl("delete", "--wait=false", "customresourcedefinition", *names)


@pytest.mark.usefixtures("namespaces_and_kinds")
@pytest.mark.parametrize("name", OBJECTS)
def test_the_api_server_takes_it(name: str) -> None:
    """Under another name, since some of that name is there."""
    document = json.loads(json.dumps(OBJECTS[name]))
    document["metadata"]["name"] = f"tried-{document['metadata']['name']}"
    said = kubectl(
        *("create", "--dry-run=server", "--validate=strict", "--filename=-", "--output=name"),
        given=json.dumps(document),
    )
    assert "tried-" in said


def test_there_is_something_to_try() -> None:
    assert {Path(name.split()[0]) for name in OBJECTS} == {Path(folder) for folder in FOLDERS}


OTHER = {
    "Registry": "444455556666.dkr.ecr.us-east-1.amazonaws.com/shop/",
    "OrdersDatabaseHost": "orders.database",
    "PaymentsDatabaseHost": "payments.database",
    "OrdersDataCidr": "10.9.192.0/24",
    "PaymentsDataCidr": "10.9.193.0/24",
    "EndpointsCidr": "10.9.194.0/24",
    "ControlCidr": "10.9.195.0/24",
    "DoorCidr": "10.9.196.0/24",
    "NetworkCidr": "10.9.0.0/16",
    "NetworkId": "vpc-0123",
    "OrdersAdministratorSecretArn": "arn:aws:secretsmanager:us-east-1:444455556666:secret:rds!one",
    "PaymentsAdministratorSecretArn": "arn:aws:secretsmanager:us-east-1:444455556666:secret:rds!two",
}

TARGETS = "arn:aws:elasticloadbalancing:us-east-1:444455556666:targetgroup/shop/0123456789abcdef"


def test_with_an_account_s_own_values_nothing_of_the_example_is_left(tmp_path: Path) -> None:
    roles = ("Orders", "Payments", "OrdersMigrate", "PaymentsMigrate", "Databases")
    secrets = ("OrdersDatabase", "OrdersOwner", "PaymentsDatabase", "PaymentsOwner")
    workload = {
        **{f"{role}RoleArn": f"arn:aws:iam::444455556666:role/{role}" for role in roles},
        **{f"{name}SecretArn": f"arn:aws:secretsmanager:us-east-1:444455556666:{name}" for name in secrets},
    }
    digests = {repository: f"sha256:{number:064x}" for number, repository in enumerate(IMAGES.values())}
    key = "-----BEGIN PUBLIC KEY-----\nours\n-----END PUBLIC KEY-----\n"
    account = Account(OTHER, workload, digests, "us-east-1", key)
    objects = []
    for name, make in (
        ("all", partial(account.services, page="shop.test")),
        ("databases", account.databases),
        ("door", partial(account.door, targets=TARGETS)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(make(folder)))
        objects += [each for each in rendered(folder) if each["kind"] != "CustomResourceDefinition"]
    text = yaml.safe_dump_all(objects)
    for left in (
        "111122223333",
        "example.",
        "page.example",
        "10.40.",
        "eu-central-1",
        "ghcr.io",
        "registry.k8s.io",
        "public.ecr.aws",
        "vpc-example",
    ):
        assert left not in text, left
    for value in (*OTHER.values(), *workload.values(), TARGETS):
        assert value in text, value
    for digest in digests.values():
        assert f"@{digest}" in text
    (policy,) = (each for each in objects if each["kind"] == "ImageValidatingPolicy")
    assert [each["cosign"]["key"]["data"] for each in policy["spec"]["attestors"]] == [key]
