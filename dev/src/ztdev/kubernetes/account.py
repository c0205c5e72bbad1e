"""k8s/overlays/eks with the values of an account: `python -m ztdev.kubernetes.account`.

Out of the outputs of the stacks of platform.yaml and workload.yaml and the images in the registry, it makes a
kustomization that puts these over the examples of the overlay.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

from ztdev.aws.stacks import Stack
from ztdev.errors import StackError

from .kubectl import ROOT

if TYPE_CHECKING:
    from mypy_boto3_ecr import ECRClient

OVERLAY = ROOT / "k8s" / "overlays" / "eks"

#: The images that run, by the name that the manifests give them; and their repositories, after the prefix.
IMAGES = {
    "zt-demo/frontend": "frontend",
    "zt-demo/orders": "orders",
    "zt-demo/payments": "payments",
    "ghcr.io/spiffe/spire-server": "spire-server",
    "ghcr.io/spiffe/spire-agent": "spire-agent",
    "ghcr.io/spiffe/spire-controller-manager": "spire-controller-manager",
    "ghcr.io/spiffe/spiffe-csi-driver": "spiffe-csi-driver",
    "registry.k8s.io/sig-storage/csi-node-driver-registrar": "csi-node-driver-registrar",
    "zt-demo/dev": "administration",
}


class Missing(StackError):
    """Something that the manifests need is not there yet. The text says what, and what makes it."""


def _images(registry: str, digests: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "newName": registry + repository, "digest": digests[repository]}
        for name, repository in IMAGES.items()
    ]


def kustomization(
    platform: Mapping[str, str],
    workload: Mapping[str, str],
    digests: Mapping[str, str],
    *,
    region: str,
    page: str,
    folder: Path,
) -> dict[str, Any]:
    """The kustomization for `folder`. `platform` and `workload` are the stacks' outputs, `digests` those of
    the repositories in `IMAGES`, `page` is the name that people know the page by."""
    registry = platform["Registry"]

    def settings(name: str, **values: str) -> dict[str, Any]:
        literals = [f"{key}={value}" for key, value in values.items()]
        return {"name": f"{name}-settings", "namespace": "zt-demo", "behavior": "merge", "literals": literals}

    def database(service: str, secret: str, role: str) -> dict[str, str]:
        return {
            "AWS_REGION": region,
            "AWS_ROLE_ARN": workload[role],
            "DB_HOST": platform[f"{service}DatabaseHost"],
            "DB_SECRET_ID": workload[secret],
        }

    sources = {
        "name": "images",
        "namespace": "zt-admission",
        "behavior": "merge",
        "options": {"disableNameSuffixHash": True},
        "literals": [f"{name}={registry}" for name in ("zt-demo", "zt-demo-databases", "spire-system")],
    }
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(OVERLAY, folder)],
        "images": _images(registry, digests),
        "configMapGenerator": [
            sources,
            settings("frontend", ALLOWED_HOSTS=page),
            settings("orders", **database("Orders", "OrdersDatabaseSecretArn", "OrdersRoleArn")),
            settings("payments", **database("Payments", "PaymentsDatabaseSecretArn", "PaymentsRoleArn")),
            settings("orders-migrate", **database("Orders", "OrdersOwnerSecretArn", "OrdersMigrateRoleArn")),
            settings(
                "payments-migrate", **database("Payments", "PaymentsOwnerSecretArn", "PaymentsMigrateRoleArn")
            ),
        ],
        "patches": [_address(*place, platform[output]) for place, output in _ADDRESSES],
    }


def databases(
    platform: Mapping[str, str],
    workload: Mapping[str, str],
    digests: Mapping[str, str],
    *,
    region: str,
    folder: Path,
) -> dict[str, Any]:
    """The kustomization for `folder` of the job that makes the databases' roles; see `kustomization`."""
    settings = {
        "AWS_REGION": region,
        "AWS_ROLE_ARN": workload["DatabasesRoleArn"],
        "ORDERS_ADMINISTRATOR_SECRET": platform["OrdersAdministratorSecretArn"],
        "PAYMENTS_ADMINISTRATOR_SECRET": platform["PaymentsAdministratorSecretArn"],
    }
    places = [
        ("/spec/egress/0/to/0/ipBlock/cidr", "OrdersDataCidr"),
        ("/spec/egress/0/to/1/ipBlock/cidr", "PaymentsDataCidr"),
        ("/spec/egress/1/to/0/ipBlock/cidr", "EndpointsCidr"),
    ]
    namespace = "zt-demo-databases"
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(OVERLAY.with_name("eks-databases"), folder)],
        "images": _images(platform["Registry"], digests),
        "configMapGenerator": [
            {
                "name": "databases-settings",
                "namespace": namespace,
                "behavior": "merge",
                "literals": [f"{key}={value}" for key, value in settings.items()],
            }
        ],
        "patches": [_address("databases", namespace, path, platform[output]) for path, output in places],
    }


#: Where an address is in the overlay (policy, namespace, path), and the output that says it.
_ADDRESSES = [
    (("orders-database", "zt-demo", "/spec/egress/0/to/0/ipBlock/cidr"), "OrdersDataCidr"),
    (("payments-database", "zt-demo", "/spec/egress/0/to/0/ipBlock/cidr"), "PaymentsDataCidr"),
    (("aws", "zt-demo", "/spec/egress/0/to/0/ipBlock/cidr"), "EndpointsCidr"),
    (("door", "zt-demo", "/spec/ingress/0/from/0/ipBlock/cidr"), "DoorCidr"),
    (("server", "spire-system", "/spec/egress/1/to/0/ipBlock/cidr"), "ControlCidr"),
]


def _address(policy: str, namespace: str, path: str, cidr: str) -> dict[str, Any]:
    operation = [{"op": "replace", "path": path, "value": cidr}]
    target = {"kind": "NetworkPolicy", "name": policy, "namespace": namespace}
    return {"target": target, "patch": yaml.safe_dump(operation)}


def newest(client: ECRClient, prefix: str) -> dict[str, str]:
    """The digest of the image that was pushed last into each repository of `IMAGES`.

    Raises:
        Missing: a repository is not there, or is empty.
    """
    found, empty = {}, []
    for repository in IMAGES.values():
        pages = client.get_paginator("describe_images").paginate(repositoryName=f"{prefix}/{repository}")
        try:
            images = [image for page in pages for image in page["imageDetails"] if image.get("imageTags")]
        except client.exceptions.RepositoryNotFoundException:
            images = []
        if images:
            found[repository] = max(images, key=lambda image: image["imagePushedAt"])["imageDigest"]
        else:
            empty.append(f"{prefix}/{repository}")
    if empty:
        raise Missing(f"No image with a tag is in {', '.join(empty)}: push it there first.")
    return found


def outputs(client: Any, name: str, template: str) -> dict[str, str]:
    """The outputs of a stack that has been made. Raises `Missing` when it has not."""
    found = Stack(client, name).outputs()
    if not found:
        raise Missing(f"There is no stack {name} here: deploy infra/{template} under that name first.")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the kustomization, and say how it is applied."""
    parser = argparse.ArgumentParser(
        prog="python -m ztdev.kubernetes.account", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--page", required=True, help="the name that people know the page by: page.example")
    parser.add_argument("--region", help="default: the one of AWS's configuration")
    parser.add_argument("--prefix", default="zt-demo", help="NamePrefix of the stacks (default: %(default)s)")
    parser.add_argument("--platform", help="name of the stack of platform.yaml (default: PREFIX-platform)")
    parser.add_argument("--workload", help="name of the stack of workload.yaml (default: PREFIX-workload)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "eks", help="default: build/eks")
    given = parser.parse_args(arguments)
    try:
        session = boto3.Session(region_name=given.region)
        stacks = session.client("cloudformation")
        platform = outputs(stacks, given.platform or f"{given.prefix}-platform", "platform.yaml")
        workload = outputs(stacks, given.workload or f"{given.prefix}-workload", "workload.yaml")
        digests, region = newest(session.client("ecr"), given.prefix), session.region_name
    except (ClientError, BotoCoreError) as error:
        print(f"AWS says: {error}", file=sys.stderr)
        return 1
    except StackError as error:
        print(error, file=sys.stderr)
        return int(error.exit_status)
    folder: Path = given.folder
    written = kustomization(platform, workload, digests, region=region, page=given.page, folder=folder)
    _write(folder, written)
    if "DatabasesRoleArn" in workload:
        _write(
            folder / "databases",
            databases(platform, workload, digests, region=region, folder=folder / "databases"),
        )
    return 0


def _write(folder: Path, written: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(dict(written), sort_keys=False))
    render = f"kubectl kustomize --load-restrictor LoadRestrictionsNone {folder}"
    print(f"{render} | kubectl apply --server-side --filename -")


if __name__ == "__main__":
    sys.exit(main())
