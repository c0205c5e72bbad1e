"""infra/deployer.yaml: whoever deploys may do what is needed for that, and cannot make himself more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.unit.templates import read_template

INFRA = Path(__file__).resolve().parents[2] / "infra"
TEMPLATE = read_template(INFRA / "deployer.yaml")
OTHERS = {name: read_template(INFRA / f"{name}.yaml") for name in ("platform", "workload", "door")}

#: Permissions that CloudFormation's schemas name for something that no template of ours does.
NOT_NEEDED = {
    "ec2": "AssociateSubnetCidrBlock AttachVpnGateway CreateVpcEncryptionControl DetachVpnGateway"
    " DisassociateSubnetCidrBlock ModifyVpcTenancy",  # IPv6, VPN, tenancy
    "elasticloadbalancing": "ModifyCapacityReservation ModifyIpPools",
    "iam": "AddRoleToInstanceProfile CreateInstanceProfile DeleteInstanceProfile GetInstanceProfile"
    " RemoveRoleFromInstanceProfile TagInstanceProfile"  # EKS Auto Mode
    " DeleteRolePermissionsBoundary",  # never
    "secretsmanager": "GetSecretValue",  # CloudFormation makes the values, and has no need to read them
}

#: Services that the firewall could be associated with, and the rest of what buckets and endpoints could be.
OTHER_SERVICES = {
    "amplify",
    "apigateway",
    "apprunner",
    "appsync",
    "autoscaling",
    "bedrock-agentcore",
    "cognito-idp",
    "elasticfilesystem",
    "firehose",
    "payments",
    "s3files",
    "s3tables",
    "vpc-lattice",
    "vpce",
}


@cache
def schemas() -> dict[str, dict[str, Any]]:
    """What CloudFormation says of each type (the registry's schemas, as cfn-lint brings them)."""
    folder = files("cfnlint") / "data" / "schemas" / "resources"
    found: dict[str, dict[str, Any]] = {}
    for file in folder.iterdir():
        if file.name.endswith(".json"):
            schema = json.loads(file.read_text())
            found.setdefault(schema["typeName"], schema)
    return found


def needed() -> set[str]:
    """Each action that the handlers of our resources' types need to make, read, change and delete them."""
    types = {each["Type"] for template in OTHERS.values() for each in template["Resources"].values()}
    actions = {
        action
        for kind in types
        for verb, handler in schemas()[kind]["handlers"].items()
        if verb in ("create", "read", "update", "delete")
        for action in handler.get("permissions", [])
    }
    left_out = {f"{service}:{name}" for service, names in NOT_NEEDED.items() for name in names.split()}
    verified_access = {action for action in actions if "VerifiedAccess" in action}
    return {
        action
        for action in actions - left_out - verified_access
        if action.partition(":")[0] not in OTHER_SERVICES and not action.startswith("s3:REST")
    }


def statements(name: str) -> list[dict[str, Any]]:
    """Of a policy of the template."""
    found: list[dict[str, Any]] = TEMPLATE["Resources"][name]["Properties"]["PolicyDocument"]["Statement"]
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allowed(*policies: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each action that is allowed, with its statement."""
    for policy in policies:
        for statement in statements(policy):
            if statement["Effect"] == "Allow":
                for action in listed(statement["Action"]):
                    yield action, statement


MAKING = ("NetworkPolicy", "NamedPolicy", "IdentityPolicy")


def test_cloudformation_may_do_all_that_its_types_need() -> None:
    patterns = {action for action, _ in allowed(*MAKING)}
    assert len(needed()) > 300
    assert {each for each in needed() if not any(fnmatchcase(each, one) for one in patterns)} == set()


def test_cloudformation_may_do_nothing_that_its_types_do_not_need() -> None:
    """Whole services only where their names are ours; of others one may look at everything, and no more."""
    for action, statement in allowed(*MAKING):
        service, _, name = action.partition(":")
        if name == "*":
            names = [each["Fn::Sub"] for each in statement["Resource"]]
            assert all("${NamePrefix}" in each or each.endswith(":og:default:*") for each in names)
        elif "*" in name:
            assert name in ("Describe*", "Get*")
            assert service != "secretsmanager"
        elif action != "secretsmanager:GetSecretValue":  # the door's client secret, and only that
            assert action in needed(), action
    reads = [each for action, each in allowed(*MAKING) if action == "secretsmanager:GetSecretValue"]
    assert [each["Resource"]["Fn::Sub"].rpartition(":")[2] for each in reads] == ["${NamePrefix}-door/*"]


def test_what_has_no_name_of_ours_is_held_by_the_region() -> None:
    for _, statement in allowed(*MAKING):
        if statement["Resource"] == "*":
            assert statement["Condition"] == {"StringEquals": {"aws:RequestedRegion": {"Ref": "AWS::Region"}}}


def test_a_role_is_made_with_the_boundary_alone() -> None:
    """Else who may make roles may do anything: as a role that he makes."""
    with_it = {"StringEquals": {"iam:PermissionsBoundary": {"Ref": "Boundary"}}}
    growing = {"AttachRolePolicy", "CreateRole", "PutRolePermissionsBoundary", "PutRolePolicy"}
    for action, statement in allowed(*MAKING):
        if action.removeprefix("iam:") in growing:
            assert statement["Condition"] == with_it
    given = {action for action, _ in allowed(*MAKING, "DeployerPolicy")}
    assert not {each for each in given if re.match("iam:.*(Policy|Group|User|AccessKey)", each)} - {
        "iam:AttachRolePolicy",
        "iam:DeleteRolePolicy",
        "iam:DetachRolePolicy",
        "iam:GetRolePolicy",
        "iam:PutRolePolicy",
        "iam:UpdateAssumeRolePolicy",
    }
    within = statements("Boundary")[0]
    assert (within["Effect"], within["NotAction"]) == ("Allow", ["account:*", "iam:*", "organizations:*"])


def test_nobody_changes_the_role_that_he_acts_as() -> None:
    name = TEMPLATE["Resources"]["CloudFormationRole"]["Properties"]["RoleName"]["Fn::Sub"]
    assert not name.startswith("${NamePrefix}")
    for action, statement in allowed(*MAKING):
        if re.match("iam:(?!Get|List)", action):
            resource = statement["Resource"]["Fn::Sub"].partition("::${AWS::AccountId}:")[2]
            others = ("role/${NamePrefix}-*", "role/aws-service-role/", "oidc-provider/oidc.eks.")
            assert resource.startswith(others)


@pytest.mark.parametrize("name", OTHERS)
def test_every_role_has_the_boundary(name: str) -> None:
    roles = [each for each in OTHERS[name]["Resources"].values() if each["Type"] == "AWS::IAM::Role"]
    assert roles
    for role in roles:
        assert role["Properties"]["PermissionsBoundary"] == {
            "Fn::If": ["HasRoleBoundary", {"Ref": "RoleBoundaryArn"}, {"Ref": "AWS::NoValue"}]
        }


def test_a_policy_is_as_long_as_it_may_be() -> None:
    """6,144 characters without white space (IAM's quota of a managed policy)."""
    for name, resource in TEMPLATE["Resources"].items():
        if resource["Type"] == "AWS::IAM::ManagedPolicy":
            document = json.dumps(resource["Properties"]["PolicyDocument"], separators=(",", ":"))
            assert len(document) < 6144, name
