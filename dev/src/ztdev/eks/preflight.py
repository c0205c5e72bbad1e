"""Everything that can be known before anything is made, and so before anything costs."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from ztdev.errors import ProgramMissing, StackError
from ztdev.images import tool
from ztdev.kubernetes.kubectl import run

from .settings import ARCHITECTURES, Settings

#: AWS's own answer to where a call comes from.
_WHERE_FROM = "https://checkip.amazonaws.com"


class NotReadyToDeploy(StackError):
    """What is missing, a line for each thing, with what to do."""


@dataclass(frozen=True)
class Ready:
    """What preflight found.

    Attributes:
        account: number of the account.
        region: where everything will be.
        administrator: the ARN of the role or user that asks; it will administer the cluster.
        api_cidrs: from where the API server will be reached.
        engine: the architecture of the Docker engine here, and so of images and nodes.
        warnings: what could not be looked at.
    """

    account: str
    region: str
    administrator: str
    api_cidrs: str
    engine: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Quota:
    """A limit of the account, how much is in use, and how much is needed."""

    what: str
    service: str
    code: str
    needed: int
    used: Callable[[], int]


def preflight(session: boto3.Session, settings: Settings, *, new: bool) -> Ready:
    """Look at tools, credentials, zones and quotas; quotas only when the platform is `new`, since afterwards
    what is in use is ours.

    Raises:
        NotReadyToDeploy: something is missing. All that is missing is named at once.
    """
    missing: list[str] = []
    warnings: list[str] = []
    found = ""
    for look in (_kubectl, _tools):
        try:
            warnings += look(settings)
        except StackError as error:
            missing.append(str(error))
    try:
        found = engine()
    except StackError as error:
        missing.append(str(error))
    try:
        who = caller(session)
    except StackError as error:
        raise NotReadyToDeploy("\n".join([*missing, str(error)])) from None
    try:
        missing += _zones(session, settings, found)
        if new:
            short = list(_short(session, settings, found))
            missing += [text for text, known in short if known]
            warnings += [text for text, known in short if not known]
    except (ClientError, BotoCoreError) as error:
        missing.append(f"AWS says: {error}")
    api_cidrs = settings.api_cidrs
    if api_cidrs is None:
        try:
            api_cidrs = _here()
        except StackError as error:
            missing.append(str(error))
    if missing:
        raise NotReadyToDeploy("\n".join(missing))
    account, administrator = who
    assert api_cidrs is not None
    return Ready(account, session.region_name, administrator, api_cidrs, found, tuple(warnings))


def caller(session: boto3.Session) -> tuple[str, str]:
    """The account's number, and the ARN of the role or user whose credentials these are.

    Raises:
        NotReadyToDeploy: there are none, they are not taken, or no region is chosen.
    """
    if not session.region_name:
        raise NotReadyToDeploy("No region is chosen: --region, AWS_REGION, or `aws configure`.")
    try:
        found = session.client("sts").get_caller_identity()
    except (ClientError, BotoCoreError) as error:
        raise NotReadyToDeploy(
            f"AWS does not take the credentials here: {error}. `aws sts get-caller-identity` has to work."
        ) from None
    arn = str(found["Arn"])
    if arn.endswith(":root"):
        raise NotReadyToDeploy("These are the credentials of the account's root: take a role or a user.")
    if session_of := re.fullmatch(r"arn:([a-z-]+):sts::(\d+):assumed-role/(.+)/[^/]+", arn):
        return str(found["Account"]), _role(session, session_of[3])
    return str(found["Account"]), arn


def _role(session: boto3.Session, name: str) -> str:
    """The ARN of a role, with its path, which the ARN of a session does not have."""
    try:
        return str(session.client("iam").get_role(RoleName=name)["Role"]["Arn"])
    except (ClientError, BotoCoreError) as error:
        raise NotReadyToDeploy(f"The role {name} cannot be looked at: {error}") from None


def _kubectl(settings: Settings) -> list[str]:
    """Is there a kubectl that speaks to this Kubernetes?"""
    told = json.loads(run("kubectl", "version", "--client", "--output", "json"))
    minor = int(re.sub(r"\D", "", told["clientVersion"]["minor"]))
    wanted = int(settings.parameter("KubernetesVersion").partition(".")[2])
    if abs(minor - wanted) > 1:
        return [f"kubectl is of 1.{minor}, the cluster will be of 1.{wanted}: more than one release apart."]
    return []


def _tools(_: Settings) -> list[str]:
    """What signs images, and what lists what is in them."""
    absent = []
    for name in ("cosign", "syft"):
        try:
            tool(name)
        except ProgramMissing as error:
            absent.append(str(error))
    if absent:
        raise ProgramMissing("\n".join(absent))
    return []


def engine() -> str:
    """The architecture of the Docker engine."""
    try:
        found = run("docker", "version", "--format", "{{.Server.Arch}}", timeout=30).strip()
    except ProgramMissing:
        raise
    except StackError as error:
        raise NotReadyToDeploy(f"No Docker engine answers, to build the images: {error}") from None
    if found not in ARCHITECTURES:
        raise NotReadyToDeploy(
            f"The Docker engine is of {found}: nodes, and so images, are of {' or '.join(ARCHITECTURES)}."
        )
    return found


def _here() -> str:
    """The address that AWS sees this machine under, as a block of one."""
    try:
        with urllib.request.urlopen(_WHERE_FROM, timeout=10) as answer:
            text = answer.read(64).decode("ascii", "replace").strip()
    except OSError as error:
        raise NotReadyToDeploy(
            f"From where the API server may be reached is not known ({_WHERE_FROM}: {error}): say it by "
            "--api-cidrs 198.51.100.7/32, or --api-cidrs '' for nobody on the internet."
        ) from None
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3}){3}", text):
        raise NotReadyToDeploy(f"This machine's address is not of IPv4 ({text}): say --api-cidrs yourself.")
    return f"{text}/32"


def _machine(settings: Settings, engine: str) -> str:
    """The kind of a node's instance."""
    return f"{'t4g' if engine == 'arm64' else 't3'}.{settings.parameter('NodeSize')}"


def _zones(session: boto3.Session, settings: Settings, engine: str) -> Iterator[str]:
    """The first three zones are taken, and each must have the nodes' kind of instance."""
    client = session.client("ec2")
    told = client.describe_availability_zones(
        Filters=[
            {"Name": "state", "Values": ["available"]},
            {"Name": "zone-type", "Values": ["availability-zone"]},
        ]
    )
    zones = sorted(zone["ZoneName"] for zone in told["AvailabilityZones"])
    if len(zones) < 3:
        yield f"{session.region_name} has {len(zones)} zones for this account, and three are needed."
        return
    machine = _machine(settings, engine)
    offered = client.describe_instance_type_offerings(
        LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": [machine]}]
    )
    there = {offer["Location"] for offer in offered["InstanceTypeOfferings"]}
    if absent := [zone for zone in zones[:3] if zone not in there]:
        yield f"There are no {machine} in {', '.join(absent)}: choose another NodeSize or region."


def _short(session: boto3.Session, settings: Settings, engine: str) -> Iterator[tuple[str, bool]]:
    """What the account has not enough of; False: what could not be looked at."""
    for quota in _quotas(session, settings, engine):
        try:
            limit, used = _limit(session, quota), quota.used()
        except (ClientError, BotoCoreError) as error:
            yield f"The account's limit of {quota.what} is not known: {error}", False
            continue
        if used + quota.needed > limit:
            yield (
                f"The account may have {limit} {quota.what}, {used} are in use, {quota.needed} are needed: "
                f"ask for more (aws service-quotas request-service-quota-increase "
                f"--service-code {quota.service} --quota-code {quota.code} "
                f"--desired-value {used + quota.needed}).",
                True,
            )


def _quotas(session: boto3.Session, settings: Settings, engine: str) -> list[_Quota]:
    ec2, eks, rds = (session.client(name) for name in ("ec2", "eks", "rds"))

    def cpus() -> int:
        """Of the running instances of the standard families, which share one limit."""
        running = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        pages = ec2.get_paginator("describe_instances").paginate(Filters=running)
        instances = [each for page in pages for some in page["Reservations"] for each in some["Instances"]]
        return sum(
            each["CpuOptions"]["CoreCount"] * each["CpuOptions"]["ThreadsPerCore"]
            for each in instances
            if re.match(r"[acdhimrtz]\d", each["InstanceType"])
        )

    def count(client: Any, operation: str, of: str) -> Callable[[], int]:
        return lambda: sum(len(page[of]) for page in client.get_paginator(operation).paginate())

    machine = _machine(settings, engine)

    def each_has() -> int:
        told = ec2.describe_instance_types(InstanceTypes=[machine])["InstanceTypes"][0]
        return int(told["VCpuInfo"]["DefaultVCpus"])

    nodes = int(settings.parameter("NodeCount"))
    return [
        _Quota("CPUs of instances", "ec2", "L-1216C47A", nodes * each_has(), cpus),
        _Quota("networks", "vpc", "L-F678F1CE", 1, count(ec2, "describe_vpcs", "Vpcs")),
        _Quota("clusters", "eks", "L-1194D53C", 1, count(eks, "list_clusters", "clusters")),
        _Quota("databases", "rds", "L-7B6409FD", 2, count(rds, "describe_db_instances", "DBInstances")),
    ]


def _limit(session: boto3.Session, quota: _Quota) -> int:
    client = session.client("service-quotas")
    try:
        found = client.get_service_quota(ServiceCode=quota.service, QuotaCode=quota.code)
    except client.exceptions.NoSuchResourceException:  # never changed for this account
        found = client.get_aws_default_service_quota(ServiceCode=quota.service, QuotaCode=quota.code)
    return int(found["Quota"]["Value"])
