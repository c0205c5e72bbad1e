"""What only an account of AWS has, answered at the edge of boto3.

CloudFormation, IAM, KMS, STS and Secrets Manager are the local AWS's. Of templates it gets what it knows. The
rest is answered here, and each answer is held against the service's own description, as botocore has it.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import boto3
import yaml
from botocore.awsrequest import AWSResponse
from botocore.validate import ParamValidator

from tests.stack.test_platform_stack import known
from tests.unit.templates import Loader

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]

ADMINISTRATOR = "arn:aws:iam::111122223333:role/people/you"

#: What a manifest's digest is told for.
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.v2+json"
)


class Refused(Exception):
    """AWS refuses: its code, and what it says."""


class Edge:
    """Makes sessions whose calls are answered like this.

    Args:
        registry: host and port of what images are asked of.
        answers: operations that are answered otherwise, or besides.

    Attributes:
        refuse: operation (``ecr.DescribeImages``) that is refused, to what has to be asked of it for that.
        outputs: what the platform's outputs are instead, since a part of it is elsewhere.
        asked: the operations that were answered here.
        made_by: of each stack, the role that CloudFormation was told to act as.
        called: all of them, as IAM calls the permission for each.
        volumes: ids of volumes that are still there.
    """

    def __init__(self, registry: str, answers: Mapping[str, Answer] | None = None) -> None:
        self.refuse: dict[str, str] = {}
        self.outputs: dict[str, str] = {}
        self.asked: list[str] = []
        self.called: set[str] = set()
        self.made_by: dict[str, str | None] = {}
        self.volumes: list[str] = []
        self._registry = registry
        self._answers: dict[str, Answer] = {
            **{operation: partial(answer, self) for operation, answer in _ANSWERS.items()},
            **(answers or {}),
        }

    def session(self, region_name: str | None = None) -> boto3.Session:
        """As boto3.Session."""
        session = boto3.Session(region_name=region_name)
        events = session.events
        events.register("before-parameter-build", self._remember)
        events.register("before-parameter-build.cloudformation.CreateChangeSet", self._leave_out)
        events.register("before-call", self._answer)
        if "sts.GetCallerIdentity" not in self._answers:
            events.register("after-call.sts.GetCallerIdentity", self._administrator)
        events.register("after-call.cloudformation.DescribeStacks", self._elsewhere)
        return session

    # -- handlers

    def _remember(self, params: Mapping[str, Any], context: dict[str, Any], **_: Any) -> None:
        context["asked"] = params

    def _leave_out(self, params: dict[str, Any], **_: Any) -> None:
        self.made_by[params["StackName"]] = params.get("RoleARN")
        template = yaml.load(params["TemplateBody"], Loader)
        params["TemplateBody"] = json.dumps(known(template))

    def _answer(self, model: Any, context: Mapping[str, Any], **_: Any) -> Any:
        operation = f"{model.service_model.service_name}.{model.name}"
        self.called |= _PERMISSIONS.get(operation, {_permission(operation)})
        if operation in self.refuse and self.refuse[operation] in str(context["asked"]):
            return _error("AccessDenied", "not authorized to do this")
        answer = self._answers.get(operation)
        if answer is None:
            return None
        self.asked.append(operation)
        try:
            told = answer(context["asked"])
        except Refused as refused:
            return _error(str(refused), "as the registry or the account says")
        report = ParamValidator().validate(told, model.output_shape)
        assert not report.has_errors(), f"{operation}: {report.generate_report()}"
        return AWSResponse("", 200, {}, None), {**told, "ResponseMetadata": {"HTTPStatusCode": 200}}

    def _administrator(self, parsed: dict[str, Any], **_: Any) -> None:
        parsed["Arn"] = "arn:aws:sts::111122223333:assumed-role/you/here"

    def _elsewhere(self, parsed: dict[str, Any], **_: Any) -> None:
        for stack in parsed.get("Stacks", []):
            if stack["StackName"] == "zt-demo-platform" and stack.get("Outputs"):
                told = {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]} | self.outputs
                stack["Outputs"] = [{"OutputKey": key, "OutputValue": value} for key, value in told.items()]

    # -- answers

    def images(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Of the real registry."""
        tag = asked["imageIds"][0]["imageTag"]
        url = f"http://{self._registry}/v2/{asked['repositoryName']}/manifests/{tag}"
        request = urllib.request.Request(url, method="HEAD", headers={"Accept": _MANIFESTS})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                digest = answer.headers["Docker-Content-Digest"]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise Refused("ImageNotFoundException") from None
            raise
        return {"imageDetails": [{"imageDigest": digest, "imageTags": [tag]}]}

    def marked(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Volumes of the cluster, a key that waits for its deletion, and a group that AWS still remembers."""
        key = asked["TagFilters"][0]["Key"]
        ours = {
            "kubernetes.io/cluster/zt-demo": [f"volume/{each}" for each in self.volumes],
            "eks:cluster-name": ["instance/i-0123"],
            "project": ["security-group/sg-0123"],
        }
        arns = [f"arn:aws:ec2:eu-central-1:111122223333:{each}" for each in ours[key]]
        return {"ResourceTagMappingList": [{"ResourceARN": arn} for arn in arns]}

    def volume(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """One that is there."""
        if asked["VolumeIds"][0] not in self.volumes:
            raise Refused("InvalidVolume.NotFound")
        return {"Volumes": [{"VolumeId": asked["VolumeIds"][0], "State": "available"}]}


def _error(code: str, message: str) -> Any:
    told = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    return AWSResponse("", 400, {}, None), told


#: Where an operation's permission has another name; for who one is, none is needed.
_PERMISSIONS = {
    "s3.DeleteObjects": {"s3:DeleteObject", "s3:DeleteObjectVersion"},
    "s3.ListObjectVersions": {"s3:ListBucketVersions"},
    "sts.GetCallerIdentity": set[str](),
}
_SERVICES = {"resourcegroupstaggingapi": "tag", "service-quotas": "servicequotas"}


def _permission(operation: str) -> str:
    service, _, name = operation.partition(".")
    return f"{_SERVICES.get(service, service)}:{name}"


def _login(_: Edge, __: Mapping[str, Any]) -> dict[str, Any]:
    token = base64.b64encode(b"AWS:a-password").decode()
    return {"authorizationData": [{"authorizationToken": token, "expiresAt": datetime.now(UTC)}]}


def _zones(_: Edge, __: Mapping[str, Any]) -> dict[str, Any]:
    return {"AvailabilityZones": [{"ZoneName": f"eu-central-1{zone}"} for zone in "abc"]}


def _offerings(_: Edge, asked: Mapping[str, Any]) -> dict[str, Any]:
    machine = asked["Filters"][0]["Values"][0]
    offers = [{"InstanceType": machine, "Location": f"eu-central-1{zone}"} for zone in "abc"]
    return {"InstanceTypeOfferings": offers}


def _instances(_: Edge, asked: Mapping[str, Any]) -> dict[str, Any]:
    state = "terminated" if "InstanceIds" in asked else "running"
    one = {
        "InstanceType": "m7i.large",
        "CpuOptions": {"CoreCount": 1, "ThreadsPerCore": 2},
        "State": {"Name": state},
    }
    return {"Reservations": [{"Instances": [one]}]}


def _quota(_: Edge, asked: Mapping[str, Any]) -> dict[str, Any]:
    if asked["ServiceCode"] == "eks":
        raise Refused("NoSuchResourceException")
    return {"Quota": {"Value": 32.0}}


def _nothing(_: Edge, __: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_ANSWERS: dict[str, Callable[[Edge, Mapping[str, Any]], dict[str, Any]]] = {
    "ec2.DescribeAvailabilityZones": _zones,
    "ec2.DescribeInstanceTypeOfferings": _offerings,
    "ec2.DescribeInstanceTypes": lambda *_: {"InstanceTypes": [{"VCpuInfo": {"DefaultVCpus": 2}}]},
    "ec2.DescribeInstances": _instances,
    "ec2.DescribeVpcs": lambda *_: {"Vpcs": [{"VpcId": "vpc-0123"}]},
    "ec2.DescribeVolumes": Edge.volume,
    "ecr.DescribeImages": Edge.images,
    "ecr.GetAuthorizationToken": _login,
    "eks.ListClusters": lambda *_: {"clusters": []},
    "iam.GetRole": lambda *_: {
        "Role": {
            "Path": "/people/",
            "RoleName": "you",
            "RoleId": "AROA0123456789ABCDEF",
            "Arn": ADMINISTRATOR,
            "CreateDate": datetime.now(UTC),
        }
    },
    "rds.DescribeDBInstances": lambda *_: {"DBInstances": []},
    "resourcegroupstaggingapi.GetResources": Edge.marked,
    "s3.DeleteObjects": _nothing,
    "s3.ListObjectVersions": lambda *_: {"Versions": [{"Key": "package.zip", "VersionId": "1"}]},
    "s3.PutObject": _nothing,
    "service-quotas.GetAWSDefaultServiceQuota": lambda *_: {"Quota": {"Value": 100.0}},
    "service-quotas.GetServiceQuota": _quota,
}
