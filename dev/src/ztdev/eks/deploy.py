"""From an account with nothing in it to the demo, verified: one step after another.

Each step brings what it is about to what it should be, whatever it finds. So whoever runs it again goes on
where it failed, or changes what has changed, or changes nothing.
"""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import boto3
from rich.table import Table

from ztdev.aws.stacks import Stack
from ztdev.errors import StackError
from ztdev.events import Steps
from ztdev.functions import kept, with_authorities
from ztdev.kubernetes import verify
from ztdev.kubernetes.kubectl import ClusterFault, rendered
from ztdev.state import default_tools_directory

from . import account, cluster
from .preflight import Ready
from .registry import Registry
from .settings import ARCHITECTURES, BUILD, PREFIX, ROOT, TAGS, Settings, stack_name

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient

#: The authorities of RDS's certificates, all regions.
_RDS_AUTHORITIES = "https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem"

#: Seconds between two looks at a stack.
EVERY = 5.0


class NotVerified(StackError):
    """It is deployed, and a control is not enforced, or not proved. `table` says which."""

    def __init__(self, text: str, table: Table) -> None:
        super().__init__(text)
        self.table = table


class Deployment:
    """One deployment of `settings`, with what `preflight` found, told step by step."""

    def __init__(
        self,
        session: boto3.Session,
        settings: Settings,
        ready: Ready,
        steps: Steps,
    ) -> None:
        self._session = session
        self._settings = settings
        self._ready = ready
        self._steps = steps
        self._cloudformation: CloudFormationClient = session.client("cloudformation")
        #: By whom stacks are made, if that is laid down (infra/deployer.yaml).
        self._deployer = self._stack("deployer").outputs()
        self._platform: Mapping[str, str] = {}
        self._workload: Mapping[str, str] = {}
        self._digests: Mapping[str, str] = {}
        self._key = ""
        self._database_ca = ""
        self._objects: list[dict[str, Any]] = []

    def run(self) -> Table:
        """Every step. The table says what was seen of each control.

        Raises:
            StackError: a step failed; those before it stay done.
            NotVerified: all is there, but not as safe as it should be.
        """
        for name, act in (
            ("platform", self.platform),
            ("roles and secrets", self.secrets),
            ("images", self.images),
            ("the way into the cluster", self.way_in),
            ("signatures at admission", self.signatures),
            ("SPIRE, network policies, admission", self.rules),
            ("roles of the databases", self.databases),
            ("rotation", self.rotation),
            ("services", self.services),
            ("door", self.door),
        ):
            with self._steps.step(name) as detail:
                detail.text = act()
        with self._steps.step("verify") as detail:
            findings = verify.look(self._say)
            table = verify.table(findings)
            open_ones = [each.control for each in findings if each.outcome != "enforced"]
            if open_ones:
                raise NotVerified(f"Not proved to be enforced: {', '.join(open_ones)}.", table)
            detail.text = f"{len(findings)} controls are enforced"
        return table

    # -- steps: each says what has become of it

    def platform(self) -> str:
        """Network, cluster, databases, registry; a quarter of an hour and more."""
        architecture, _ = ARCHITECTURES[self._ready.engine]
        parameters = {
            **self._settings.parameters,
            "NamePrefix": PREFIX,
            "AdministratorArn": self._ready.administrator,
            "ApiCidrs": self._ready.api_cidrs,
            "Architecture": architecture,
        }
        self._platform = self._deploy("platform", parameters)
        return f"cluster {self._platform['ClusterName']}"

    def secrets(self) -> str:
        """Secrets with the first passwords, and who may read them. Until the databases know these, nothing
        rotates them; and a role may read them all, which goes away again with `rotation`."""
        stack = self._stack("workload")
        if stack.parameters().get("RotationSchedule"):
            self._workload = stack.outputs()
            return "as they are"
        administrators = (
            "OrdersAdministratorSecretArn",
            "PaymentsAdministratorSecretArn",
            "AdministratorKeyArn",
        )
        self._workload = self._deploy_workload({name: self._platform[name] for name in administrators})
        return "made"

    def images(self) -> str:
        """Built, pushed, signed, and with a signed list of what is in them."""
        registry = Registry(
            self._session, self._settings, self._platform["Registry"], self._ready.engine, self._say
        )
        self._digests = registry.bring()
        BUILD.mkdir(parents=True, exist_ok=True)
        self._key = registry.public_key()
        (BUILD / "images.pub").write_text(self._key)
        return f"{len(self._digests)} in {self._platform['Registry']}, signed by {self._settings.signer}"

    def way_in(self) -> str:
        """What kubectl needs from here on."""
        file = cluster.choose(self._session, self._platform["ClusterName"], self._settings.kubeconfig)
        try:
            return f"Kubernetes {cluster.answers()}, by {file}"
        except ClusterFault as fault:
            raise ClusterFault(
                f"The cluster does not answer by {file}: {fault}\n"
                f"It is reached from {self._ready.api_cidrs or 'inside its network alone'} (--api-cidrs)."
            ) from None

    def signatures(self) -> str:
        """Kyverno, and the policy that has it ask for our signature: before anything else of ours runs."""
        self._write_manifests()
        self._objects = rendered(BUILD)
        cluster.prepare(self._objects)
        cluster.apply_signatures(self._objects)
        return f"of {self._settings.signer}"

    def rules(self) -> str:
        """All but what runs of ours."""
        self._database_ca = self._authorities()
        cluster.give(self._database_ca)
        cluster.apply_rules(self._objects)
        return f"{len(self._objects)} objects, from {BUILD.relative_to(ROOT)}"

    def databases(self) -> str:
        """Once: afterwards the rotation changes the passwords."""
        if "DatabasesRoleArn" not in self._workload:
            return "as they are"
        cluster.make_databases(rendered(BUILD / "databases"), self._database_ca, self._say)
        return "made"

    def rotation(self) -> str:
        """The function and its schedule; and nobody may read all logins any more."""
        _, architecture = ARCHITECTURES[self._ready.engine]
        ca_file = BUILD / "database-ca.pem"
        ca_file.write_text(self._database_ca)
        made = with_authorities(kept(default_tools_directory() / "packages", architecture), ca_file, BUILD)
        bucket = self._platform["PackagesBucket"]
        self._session.client("s3").put_object(Bucket=bucket, Key=made.file.name, Body=made.file.read_bytes())
        self._workload = self._deploy_workload(
            {
                "RotationPackageBucket": bucket,
                "RotationPackageKey": made.file.name,
                "RotationArchitecture": architecture,
                "RotationSubnetIds": self._platform["RotationSubnetIds"],
                "RotationSecurityGroupIds": self._platform["RotationSecurityGroupId"],
                "RotationSchedule": self._settings.schedule,
            },
        )
        cluster.forget_databases()
        return self._settings.schedule

    def services(self) -> str:
        """What people came for."""
        cluster.apply_services(self._objects, self._say)
        return f"{', '.join(cluster.SERVICES)} are ready"

    def door(self) -> str:
        """The way in for people, if there is to be one."""
        outputs: Mapping[str, str] = self._stack("door").outputs()
        if self._settings.door:
            of_platform = ("NetworkId", "DoorCidr", "EndpointSubnetIds", "EndpointsGroupId", "ClusterGroupId")
            parameters = {name: self._platform[name] for name in of_platform}
            fixed = {"NamePrefix": PREFIX, "NodesCidr": self._platform["NetworkCidr"]}
            outputs = self._deploy("door", {**parameters, **fixed, **self._settings.door})
        if not outputs:
            return "there is none (--door)"
        folder = BUILD / "door"
        account.write(folder, self._account().door(folder, outputs["TargetsArn"]))
        cluster.apply_door(rendered(folder))
        return f"{self._settings.page} is to be an alias of {outputs['Host']}"

    # -- parts of them

    def _say(self, text: str) -> None:
        self._steps.notice(text)

    def _stack(self, part: str) -> Stack:
        return Stack(self._cloudformation, stack_name(part), self._say, every=EVERY)

    def _deploy_workload(self, parameters: Mapping[str, str]) -> Mapping[str, str]:
        of_platform = ("OidcIssuerHost", "OrdersDatabaseHost", "PaymentsDatabaseHost")
        always = {name: self._platform[name] for name in of_platform}
        return self._deploy("workload", {"NamePrefix": PREFIX, **always, **parameters})

    def _deploy(self, part: str, parameters: Mapping[str, str]) -> Mapping[str, str]:
        if self._deployer:
            parameters = {**parameters, "RoleBoundaryArn": self._deployer["BoundaryArn"]}
        role = self._deployer.get("CloudFormationRoleArn")
        return self._stack(part).deploy(ROOT / "infra" / f"{part}.yaml", parameters, TAGS, role)

    def _account(self) -> account.Account:
        return account.Account(
            platform=self._platform,
            workload=self._workload,
            digests=self._digests,
            region=self._session.region_name,
            key=self._key,
            overlay=self._settings.overlay,
        )

    def _write_manifests(self) -> None:
        values = self._account()
        account.write(BUILD, values.services(BUILD, self._settings.page))
        if "DatabasesRoleArn" in self._workload:
            account.write(BUILD / "databases", values.databases(BUILD / "databases"))

    def _authorities(self) -> str:
        """What the databases' certificates are checked by (PEM)."""
        try:
            if self._settings.database_ca is not None:
                return self._settings.database_ca.read_text()
            with urllib.request.urlopen(_RDS_AUTHORITIES, timeout=30) as answer:
                text: str = answer.read(4_000_000).decode("ascii")
        except (OSError, ValueError) as error:
            where = self._settings.database_ca or _RDS_AUTHORITIES
            raise StackError(f"The databases' authorities cannot be read: {where}: {error}") from None
        try:
            ssl.create_default_context(cadata=text)
        except ssl.SSLError as error:
            raise StackError(f"{_RDS_AUTHORITIES} gives no certificates: {error}") from None
        return text
