"""infra/platform.yaml and door.yaml deployed into the stand-in for AWS, as far as it goes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.unit.templates import read_template
from ztdev.aws.cloud import LocalCloud
from ztdev.aws.stacks import Stack, StackFailed

from .clouds import cloud_alone

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

INFRA = Path(__file__).resolve().parents[2] / "infra"

#: What the stand-in does not know. Left out, the rest is made; docs/eks.md says so.
UNKNOWN = {
    "AWS::EC2::FlowLog",
    "AWS::EC2::SecurityGroupIngress",
    "AWS::EKS::AccessEntry",
    "AWS::EKS::Addon",
    "AWS::EKS::PodIdentityAssociation",
    "AWS::IAM::OIDCProvider",
    "AWS::Route53Resolver::FirewallDomainList",
    "AWS::Route53Resolver::FirewallRuleGroup",
    "AWS::Route53Resolver::FirewallRuleGroupAssociation",
    "AWS::SecretsManager::RotationSchedule",
    "AWS::WAFv2::WebACLAssociation",
}

#: Outputs of what it does not have: its databases keep no administrator's login in Secrets Manager.
UNTOLD = {"OrdersAdministratorSecretArn", "PaymentsAdministratorSecretArn"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cloud(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCloud]:
    async with cloud_alone(tmp_path_factory.mktemp("aws")) as cloud:
        yield cloud


def known(template: dict[str, Any]) -> dict[str, Any]:
    """A template without what the stand-in does not know."""
    kept = {
        name: dict(resource)
        for name, resource in template["Resources"].items()
        if resource["Type"] not in UNKNOWN
    }
    for resource in kept.values():
        wanted = resource.pop("DependsOn", [])
        names = [wanted] if isinstance(wanted, str) else wanted
        if left := [name for name in names if name in kept]:
            resource["DependsOn"] = left
    outputs = {name: output for name, output in template["Outputs"].items() if name not in UNTOLD}
    return {**template, "Resources": kept, "Outputs": outputs}


async def deploy(
    cloud: LocalCloud, name: str, template: dict[str, Any], folder: Path, **parameters: str
) -> dict[str, str]:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(template))
    stack = Stack(cloud.admin_client("cloudformation"), name, every=0.05)
    return await asyncio.to_thread(stack.deploy, file, parameters, {"project": "zt-demo"})


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The outputs of the platform, once it is made."""
    return {}


async def test_the_platform_is_made(cloud: LocalCloud, tmp_path: Path, made: dict[str, str]) -> None:
    administrator = "arn:aws:iam::111122223333:role/you"
    template = known(read_template(INFRA / "platform.yaml"))
    made |= await deploy(cloud, "zt-demo-platform", template, tmp_path, AdministratorArn=administrator)
    assert set(made) == set(template["Outputs"])
    assert made["DoorCidr"] == "10.40.196.0/24"

    client = cloud.admin_client("cloudformation")
    resources = client.describe_stack_resources(StackName="zt-demo-platform")["StackResources"]
    conditional = {name for name, each in template["Resources"].items() if "Condition" in each}
    made_of = {each["LogicalResourceId"] for each in resources}
    assert template["Resources"].keys() - conditional <= made_of <= template["Resources"].keys()
    assert {each["ResourceStatus"] for each in resources} == {"CREATE_COMPLETE"}


async def test_the_door_is_made_on_it(cloud: LocalCloud, tmp_path: Path, made: dict[str, str]) -> None:
    template = known(read_template(INFRA / "door.yaml"))
    given = {
        name: made[name]
        for name, parameter in template["Parameters"].items()
        if "Default" not in parameter and name in made
    }
    people = {
        "CertificateArn": "arn:aws:acm:eu-central-1:111122223333:certificate/x",
        "Issuer": "https://login.example",
        "ClientId": "zt-demo",
        "ClientSecretId": "zt-demo/orders/db",
    }
    outputs = await deploy(cloud, "zt-demo-door", template, tmp_path, **given, **people)
    assert set(outputs) == {"TargetsArn", "Host"}


async def test_who_deploys_is_made(cloud: LocalCloud, tmp_path: Path) -> None:
    outputs = await deploy(cloud, "zt-demo-deployer", read_template(INFRA / "deployer.yaml"), tmp_path)
    assert set(outputs) == {"BoundaryArn", "CloudFormationRoleArn", "DeployerPolicyArn"}


@pytest.mark.parametrize("kind", sorted(UNKNOWN))
async def test_what_is_left_out_is_what_the_stand_in_does_not_know(
    cloud: LocalCloud, tmp_path: Path, kind: str
) -> None:
    alone = {"Resources": {"It": {"Type": kind, "Properties": {}}}}
    with pytest.raises(StackFailed, match=re.escape(kind)):
        await deploy(cloud, re.sub(r"\W+", "-", kind).lower(), alone, tmp_path)
