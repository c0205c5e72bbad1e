"""What is deployed, where, and by whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ztdev.errors import ExitStatus, StackError
from ztdev.state import checkout

ROOT = checkout() or Path.cwd()
BUILD = ROOT / "build" / "eks"
OVERLAY = ROOT / "k8s" / "overlays" / "eks"

#: What all names start with; also the cluster's name. Others are not tried: one in an account and a region.
PREFIX = "zt-demo"

#: What everything is marked by that is made for it.
TAGS = {"project": PREFIX}

#: What a parameter of platform.yaml is when nobody says otherwise, as far as this program has to know it.
PLATFORM_DEFAULTS = {
    "NodeCount": "3",
    "NodeSize": "medium",
    "EndpointsInEveryZone": "false",
    "DatabaseClass": "db.t4g.micro",
    "DatabaseStandby": "false",
    "KubernetesVersion": "1.34",
}

#: Parameters of platform.yaml that have an option of their own, or that this program fills in.
TAKEN = {"NamePrefix", "AdministratorArn", "ApiCidrs", "Architecture", "RoleBoundaryArn"}

#: Parameters of door.yaml: those that there is no door without, and the others that are set by hand.
DOOR_NEEDS = {"CertificateArn", "Issuer", "ClientId", "ClientSecretId"}
DOOR_MAY_HAVE = {"Scheme", "Clients", "LogRetentionDays"}

#: What EKS calls an architecture that the Docker engine calls otherwise, and what Lambda calls it.
ARCHITECTURES = {"arm64": ("arm64", "arm64"), "amd64": ("x86-64", "x86_64")}


class Misused(StackError):
    """What was asked for makes no sense. The text says what to write instead."""

    exit_status = ExitStatus.USAGE


@dataclass(frozen=True)
class Settings:
    """What is deployed.

    Attributes:
        page: the host name that people know the page by.
        parameters: of platform.yaml, beyond those in `TAKEN`.
        api_cidrs: from where the API server is reached, separated by commas; None: from this machine.
        schedule: when logins rotate, as RotationSchedule of workload.yaml.
        key: what signs images, as cosign takes it; None: the platform's own key, in KMS.
        database_ca: PEM file with the authorities of the databases; None: fetched, those of RDS.
        kubeconfig: how the cluster is reached; None: written, for this person's credentials of AWS.
        door: parameters of door.yaml; none: there is no door, or the one that is there stays as it is.
        overlay: the kustomization that the account's values are put over.
    """

    page: str = "localhost"
    parameters: Mapping[str, str] = field(default_factory=dict)
    api_cidrs: str | None = None
    schedule: str = "rate(1 day)"
    key: str | None = None
    database_ca: Path | None = None
    kubeconfig: Path | None = None
    door: Mapping[str, str] = field(default_factory=dict)
    overlay: Path = OVERLAY

    def __post_init__(self) -> None:
        for name in self.door.keys() - DOOR_NEEDS - DOOR_MAY_HAVE:
            known = ", ".join(sorted(DOOR_NEEDS | DOOR_MAY_HAVE))
            raise Misused(f"--door {name}: there is no such thing. There are {known}.")
        if self.door and (missing := DOOR_NEEDS - self.door.keys()):
            raise Misused(f"--door: {', '.join(sorted(missing))} must be given, too (see infra/door.yaml).")
        for name in self.parameters.keys() & TAKEN:
            raise Misused(f"--parameter {name}: this is not set by hand (see --help).")

    def parameter(self, name: str) -> str:
        """A parameter of platform.yaml as it will be."""
        return self.parameters.get(name, PLATFORM_DEFAULTS[name])

    @property
    def signer(self) -> str:
        """The key that signs images."""
        return self.key or f"awskms:///alias/{PREFIX}-images"


def stack_name(part: str) -> str:
    """The name of the stack of infra/`part`.yaml."""
    return f"{PREFIX}-{part}"
