"""Everything away again, and the proof that nothing is left that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import ClientError

from ztdev.aws.stacks import Stack
from ztdev.errors import StackError
from ztdev.events import Steps
from ztdev.kubernetes.kubectl import kubectl, read

from . import cluster
from .settings import PREFIX, stack_name

#: Stacks, those first that are on top of others.
PARTS = ("door", "workload", "platform")

#: Kinds of resources that cost nothing by being there, by what their ARNs say: ``service:kind``.
_FREE = {
    "cloudformation:stack",
    "ec2:dhcp-options",
    "ec2:internet-gateway",
    "ec2:launch-template",
    "ec2:network-acl",
    "ec2:network-interface",
    "ec2:route-table",
    "ec2:security-group",
    "ec2:security-group-rule",
    "ec2:subnet",
    "ec2:vpc",
    "iam:oidc-provider",
    "iam:role",
    "lambda:function",
    "rds:pg",
    "rds:subgrp",
}

#: Seconds between two looks, and until AWS must have noticed that something is gone.
EVERY, WITHIN = 5.0, 900.0


class StillThere(StackError):
    """Something that costs is left, a line each."""


@dataclass(frozen=True)
class Left:
    """A resource that AWS still knows, and why it costs nothing; None: it costs."""

    arn: str
    free: str | None


class Removal:
    """Takes away what `Deployment` made.

    Args:
        kubeconfig: how the cluster is reached; None: written, for the credentials of the session.
    """

    def __init__(
        self,
        session: boto3.Session,
        kubeconfig: Path | None,
        steps: Steps,
    ) -> None:
        self._session = session
        self._kubeconfig = kubeconfig
        self._steps = steps

    def run(self) -> list[Left]:
        """Every step. What AWS still knows, none of which costs.

        Raises:
            StackError: a step failed; run again, it goes on there.
            StillThere: something that costs is left.
        """
        with self._steps.step("volumes and pods") as detail:
            detail.text = self.volumes()
        for part in PARTS:
            with self._steps.step(f"stack of {part}.yaml") as detail:
                detail.text = self.stack(part)
        with self._steps.step("nothing that costs is left") as detail:
            left = self.proof()
            detail.text = f"{len(left)} things are known to AWS for a while, and cost nothing"
        return left

    def volumes(self) -> str:
        """SPIRE's volume is made by the cluster, so the cluster has to take it away."""
        if "ClusterName" not in self._stack("platform").outputs():
            return "there is no cluster"
        try:
            cluster.choose(self._session, PREFIX, self._kubeconfig)
            cluster.answers()
        except (StackError, ClientError) as error:
            self._steps.notice(f"The cluster cannot be asked: {error}", "warning")
            return "not asked: what is left of it is found at the end"
        namespaces = (cluster.NAMESPACE, cluster.DATABASES, cluster.SPIRE)
        delete = ("delete", "namespace", "--ignore-not-found", *namespaces)
        kubectl(*delete, timeout=900)
        self._until(lambda: not self._claimed(), "The volumes of the cluster are not gone")
        return "gone"

    def stack(self, part: str) -> str:
        """One stack, with what is in its buckets."""
        stack = self._stack(part)
        if stack.status() is None:
            return "is not there"
        self._empty_buckets(stack)
        stack.delete()
        return "gone"

    def proof(self) -> list[Left]:
        """What AWS still knows of all that was marked as ours. It forgets what is gone with some delay."""
        found: list[Left] = []

        def nothing_costs() -> bool:
            nonlocal found
            found = [self._look(arn) for arn in sorted(set(self._marked()))]
            return all(left.free for left in found)

        try:
            self._until(nothing_costs, "")
        except StackError:
            lines = "\n".join(f"    {left.arn}" for left in found if left.free is None)
            raise StillThere(f"This is left, and costs:\n{lines}") from None
        return found

    # -- parts of them

    def _stack(self, part: str) -> Stack:
        client = self._session.client("cloudformation")
        return Stack(client, stack_name(part), self._steps.notice, every=EVERY)

    def _until(self, happens: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + WITHIN
        while not happens():
            if time.monotonic() > deadline:
                raise StackError(f"{otherwise} after {WITHIN:.0f} s.")
            time.sleep(EVERY)  # between two looks, until it happens or `WITHIN` is over

    def _claimed(self) -> Collection[Any]:
        """Volumes that pods of ours have asked for."""
        volumes = read("persistentvolumes")["items"]
        namespaces = {cluster.NAMESPACE, cluster.SPIRE}
        return [
            each
            for each in volumes
            if each["spec"].get("claimRef", {}).get("namespace") in namespaces
            and each["spec"]["persistentVolumeReclaimPolicy"] == "Delete"
        ]

    def _empty_buckets(self, stack: Stack) -> None:
        client = self._session.client("s3")
        for bucket in stack.resources("AWS::S3::Bucket"):
            try:
                pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket)
                for page in pages:
                    objects = [
                        {"Key": each["Key"], "VersionId": each["VersionId"]}
                        for each in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
                    ]
                    if objects:
                        client.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            except client.exceptions.NoSuchBucket:
                continue

    def _marked(self) -> Iterator[str]:
        """The ARN of everything that has one of our tags: what stacks, the cluster and its volumes make."""
        client = self._session.client("resourcegroupstaggingapi")
        for key, values in (
            ("project", [PREFIX]),
            ("eks:cluster-name", [PREFIX]),
            (f"kubernetes.io/cluster/{PREFIX}", ["owned"]),
        ):
            pages = client.get_paginator("get_resources").paginate(
                TagFilters=[{"Key": key, "Values": values}]
            )
            for page in pages:
                yield from (each["ResourceARN"] for each in page["ResourceTagMappingList"])

    def _look(self, arn: str) -> Left:
        """Whether it costs. What is a mere memory of AWS is asked for by name."""
        service, kind = _kind(arn)
        if f"{service}:{kind}" in _FREE:
            return Left(arn, "costs nothing")
        ask = _ASK.get(f"{service}:{kind}")
        if ask is None:
            return Left(arn, None)
        try:
            return Left(arn, ask(self._session, arn))
        except ClientError as error:
            if "NotFound" in error.response["Error"].get("Code", ""):
                return Left(arn, "is gone")
            raise


def _kind(arn: str) -> tuple[str, str]:
    """The service of an ARN, and its kind of resource."""
    _, _, service, _, _, resource = arn.split(":", 5)
    return service, resource.replace(":", "/").partition("/")[0]


def _key(session: boto3.Session, arn: str) -> str | None:
    state = session.client("kms").describe_key(KeyId=arn)["KeyMetadata"]["KeyState"]
    return "will be deleted, and costs nothing until then" if state == "PendingDeletion" else None


def _secret(session: boto3.Session, arn: str) -> str | None:
    found = session.client("secretsmanager").describe_secret(SecretId=arn)
    return "will be deleted, and costs nothing until then" if found.get("DeletedDate") else None


def _instance(session: boto3.Session, arn: str) -> str | None:
    told = session.client("ec2").describe_instances(InstanceIds=[arn.rpartition("/")[2]])
    states = {each["State"]["Name"] for some in told["Reservations"] for each in some["Instances"]}
    return "is gone" if states <= {"terminated"} else None


def _volume(session: boto3.Session, arn: str) -> str | None:
    session.client("ec2").describe_volumes(VolumeIds=[arn.rpartition("/")[2]])
    return None


def _database(session: boto3.Session, arn: str) -> str | None:
    session.client("rds").describe_db_instances(DBInstanceIdentifier=arn.rpartition(":")[2])
    return None


_ASK: Mapping[str, Callable[[boto3.Session, str], str | None]] = {
    "kms:key": _key,
    "secretsmanager:secret": _secret,
    "ec2:instance": _instance,
    "ec2:volume": _volume,
    "rds:db": _database,
}
