"""k8s/overlays/eks with the values of an account.

Out of the outputs of the stacks of platform.yaml and workload.yaml and the images in the registry, it makes a
kustomization that puts these over the examples of the overlay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .settings import OVERLAY

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
    "ghcr.io/kyverno/kyverno": "kyverno",
    "public.ecr.aws/eks/aws-load-balancer-controller": "aws-load-balancer-controller",
    "zt-demo/dev": "administration",
}


@dataclass(frozen=True)
class _Address:
    """Where an address is in a network policy, and the output of platform.yaml that says it."""

    policy: str
    path: str
    output: str
    namespace: str = "zt-demo"

    def patch(self, platform: Mapping[str, str]) -> dict[str, Any]:
        operation = [{"op": "replace", "path": self.path, "value": platform[self.output]}]
        target = {"kind": "NetworkPolicy", "name": self.policy, "namespace": self.namespace}
        return {"target": target, "patch": yaml.safe_dump(operation)}


_EGRESS = "/spec/egress/0/to/0/ipBlock/cidr"
_ADDRESSES = [
    _Address("orders-database", _EGRESS, "OrdersDataCidr"),
    _Address("payments-database", _EGRESS, "PaymentsDataCidr"),
    _Address("aws", _EGRESS, "EndpointsCidr"),
    _Address("door", "/spec/ingress/0/from/0/ipBlock/cidr", "DoorCidr"),
    _Address("server", "/spec/egress/1/to/0/ipBlock/cidr", "ControlCidr", "spire-system"),
    _Address("kyverno", "/spec/ingress/0/from/0/ipBlock/cidr", "ControlCidr", "kyverno"),
    _Address("kyverno", "/spec/egress/1/to/0/ipBlock/cidr", "ControlCidr", "kyverno"),
    _Address("kyverno", "/spec/egress/1/to/2/ipBlock/cidr", "EndpointsCidr", "kyverno"),
    _Address("kyverno", "/spec/egress/1/to/3/ipBlock/except/0", "NetworkCidr", "kyverno"),
]

_DATABASES = "zt-demo-databases"
_DATABASES_ADDRESSES = [
    _Address("databases", _EGRESS, "OrdersDataCidr", _DATABASES),
    _Address("databases", "/spec/egress/0/to/1/ipBlock/cidr", "PaymentsDataCidr", _DATABASES),
    _Address("databases", "/spec/egress/1/to/0/ipBlock/cidr", "EndpointsCidr", _DATABASES),
]

_DOOR_ADDRESSES = [
    _Address("controller", "/spec/egress/0/to/0/ipBlock/cidr", "ControlCidr", "zt-door"),
    _Address("controller", "/spec/egress/0/to/2/ipBlock/cidr", "EndpointsCidr", "zt-door"),
]


@dataclass(frozen=True)
class Account:
    """What an account has: outputs of its stacks, `digests` of the repositories in `IMAGES`, its `region`,
    the `key` that images are signed by (PEM); and the `overlay` that this is put over."""

    platform: Mapping[str, str]
    workload: Mapping[str, str]
    digests: Mapping[str, str]
    region: str
    key: str
    overlay: Path = OVERLAY

    def services(self, folder: Path, page: str) -> dict[str, Any]:
        """The kustomization of overlays/eks for `folder`; `page` is the name that people know the page by."""
        names = ("zt-demo", _DATABASES, "zt-door", "spire-system")
        sources = dict.fromkeys(names, self.platform["Registry"])
        settings = {
            "frontend-settings": {"ALLOWED_HOSTS": page},
            "orders-settings": self._database("Orders", "OrdersDatabase", "Orders"),
            "payments-settings": self._database("Payments", "PaymentsDatabase", "Payments"),
            "orders-migrate-settings": self._database("Orders", "OrdersOwner", "OrdersMigrate"),
            "payments-migrate-settings": self._database("Payments", "PaymentsOwner", "PaymentsMigrate"),
        }
        generators = [
            _merged("images", "zt-admission", sources) | {"options": {"disableNameSuffixHash": True}},
            *(_merged(name, "zt-demo", values) for name, values in settings.items()),
        ]
        key = [{"op": "replace", "path": "/spec/attestors/0/cosign/key/data", "value": self.key}]
        signatures = {"target": {"kind": "ImageValidatingPolicy", "name": "zt-signatures"}}
        patches = [*_patches(_ADDRESSES, self.platform), signatures | {"patch": yaml.safe_dump(key)}]
        return self._over(self.overlay, folder, generators, patches)

    def databases(self, folder: Path) -> dict[str, Any]:
        """The kustomization for `folder` of the job that makes the databases' roles."""
        settings = {
            "AWS_REGION": self.region,
            "AWS_ROLE_ARN": self.workload["DatabasesRoleArn"],
            "ORDERS_ADMINISTRATOR_SECRET": self.platform["OrdersAdministratorSecretArn"],
            "PAYMENTS_ADMINISTRATOR_SECRET": self.platform["PaymentsAdministratorSecretArn"],
        }
        overlay = self.overlay.with_name("eks-databases")
        generators = [_merged("databases-settings", _DATABASES, settings)]
        return self._over(overlay, folder, generators, _patches(_DATABASES_ADDRESSES, self.platform))

    def door(self, folder: Path, targets: str) -> dict[str, Any]:
        """The kustomization for `folder` of who enters pods into the door's target group (an ARN)."""
        settings = {"AWS_REGION": self.region, "AWS_VPC_ID": self.platform["NetworkId"]}
        group = [{"op": "replace", "path": "/spec/targetGroupARN", "value": targets}]
        binding = {"target": {"kind": "TargetGroupBinding"}, "patch": yaml.safe_dump(group)}
        generators = [_merged("door-settings", "zt-door", settings)]
        patches = [*_patches(_DOOR_ADDRESSES, self.platform), binding]
        return self._over(self.overlay.with_name("eks-door"), folder, generators, patches)

    def _database(self, service: str, secret: str, role: str) -> dict[str, str]:
        return {
            "AWS_REGION": self.region,
            "AWS_ROLE_ARN": self.workload[f"{role}RoleArn"],
            "DB_HOST": self.platform[f"{service}DatabaseHost"],
            "DB_SECRET_ID": self.workload[f"{secret}SecretArn"],
        }

    def _over(
        self,
        overlay: Path,
        folder: Path,
        generators: Sequence[Mapping[str, Any]],
        patches: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        registry = self.platform["Registry"]
        return {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(overlay, folder)],
            "images": [
                {"name": name, "newName": registry + repository, "digest": self.digests[repository]}
                for name, repository in IMAGES.items()
            ],
            "configMapGenerator": list(generators),
            "patches": list(patches),
        }


def _patches(addresses: Sequence[_Address], platform: Mapping[str, str]) -> list[dict[str, Any]]:
    return [address.patch(platform) for address in addresses]


def _merged(name: str, namespace: str, values: Mapping[str, str]) -> dict[str, Any]:
    literals = [f"{key}={value}" for key, value in values.items()]
    return {"name": name, "namespace": namespace, "behavior": "merge", "literals": literals}


def write(folder: Path, kustomization: Mapping[str, Any]) -> None:
    """Write it into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(dict(kustomization), sort_keys=False))
