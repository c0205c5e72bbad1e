"""infra/platform.yaml and door.yaml: what is reached from where, what is encrypted, what fits what."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.unit.templates import read_template

INFRA = Path(__file__).resolve().parents[2] / "infra"
PLATFORM = read_template(INFRA / "platform.yaml")
DOOR = read_template(INFRA / "door.yaml")
WORKLOAD = read_template(INFRA / "workload.yaml")

VPC = "10.40.0.0/16"

#: What one request to CloudFormation may hold of a template; a longer one needs a bucket first.
TEMPLATE_BYTES = 51_200


def of_type(kind: str, *templates: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The properties of every resource of a type, by its name."""
    return {
        name: resource["Properties"]
        for template in templates or (PLATFORM, DOOR)
        for name, resource in template["Resources"].items()
        if resource["Type"] == f"AWS::{kind}"
    }


def statements(value: Any) -> Iterator[dict[str, Any]]:
    """Every statement of a policy below `value`."""
    if isinstance(value, dict):
        if "Effect" in value:
            yield value
        for each in value.values():
            yield from statements(each)
    elif isinstance(value, list):
        for each in value:
            yield from statements(each)


def addresses(value: Any) -> Any:
    """What !Cidr and !Select make of the network's addresses."""
    if value == {"Ref": "VpcCidr"}:
        return VPC
    if value == {"Ref": "DoorCidr"}:
        return addresses(PLATFORM["Outputs"]["DoorCidr"]["Value"])
    if isinstance(value, dict) and "Fn::Select" in value:
        index, options = value["Fn::Select"]
        return addresses(options)[index]
    block, count, bits = value["Fn::Cidr"]
    network = ipaddress.ip_network(addresses(block))
    found = [str(each) for each in network.subnets(new_prefix=32 - bits)][:count]
    assert len(found) == count
    return found


def test_no_two_subnets_share_an_address() -> None:
    blocks = {
        name: ipaddress.ip_network(addresses(it["CidrBlock"])) for name, it in of_type("EC2::Subnet").items()
    }
    assert len(blocks) == 18
    assert all(each.subnet_of(ipaddress.ip_network(VPC)) for each in blocks.values())
    for one, other in combinations(blocks, 2):
        assert not blocks[one].overlaps(blocks[other]), (one, other)


def test_the_door_alone_has_a_way_to_the_internet() -> None:
    """Subnets without a table of their own have the network's main one, which leads nowhere."""
    for kind in ("Route", "InternetGateway", "NatGateway"):
        assert not of_type(f"EC2::{kind}", PLATFORM), kind
    (route,) = of_type("EC2::Route", DOOR).values()
    tables = of_type("EC2::SubnetRouteTableAssociation", DOOR).values()
    assert {it["SubnetId"]["Ref"] for it in tables} == set(of_type("EC2::Subnet", DOOR))
    assert {it["RouteTableId"]["Ref"] for it in tables} == {route["RouteTableId"]["Ref"]}
    assert not any(it.get("MapPublicIpOnLaunch") for it in of_type("EC2::Subnet").values())


def test_nobody_is_let_in_by_an_address_but_at_the_door() -> None:
    for name, group in of_type("EC2::SecurityGroup").items():
        assert bool(group.get("SecurityGroupIngress")) == (name == "DoorGroup"), name
    for name, rule in of_type("EC2::SecurityGroupIngress").items():
        assert "SourceSecurityGroupId" in rule, name
        assert rule["FromPort"] == rule["ToPort"], name


def test_an_endpoint_is_no_way_into_somebody_else_s_account() -> None:
    """What is stolen in here could else be carried out by it, with keys of a stranger's account."""
    for name, endpoint in of_type("EC2::VPCEndpoint").items():
        for statement in statements(endpoint["PolicyDocument"]):
            bound = statement.get("Condition") == {
                "StringEquals": {"aws:PrincipalAccount": {"Ref": "AWS::AccountId"}}
            }
            resource = json.dumps(statement["Resource"])
            assert bound or "${AWS::AccountId}" in resource or "starport-layer-bucket" in resource, name


def test_everything_that_is_kept_is_encrypted() -> None:
    (cluster,) = of_type("EKS::Cluster").values()
    assert cluster["EncryptionConfig"] == [
        {"Resources": ["secrets"], "Provider": {"KeyArn": {"Fn::GetAtt": ["ClusterKey", "Arn"]}}}
    ]
    for database in of_type("RDS::DBInstance").values():
        assert database["StorageEncrypted"] is True
        assert database["PubliclyAccessible"] is False
        assert "MasterUserPassword" not in database
    (parameters,) = of_type("RDS::DBParameterGroup").values()
    assert parameters["Parameters"]["rds.force_ssl"] == "1"
    for repository in of_type("ECR::Repository").values():
        assert repository["ImageTagMutability"] == "IMMUTABLE"
        assert repository["EncryptionConfiguration"]["EncryptionType"] == "KMS"
    for bucket in of_type("S3::Bucket").values():
        assert bucket["BucketEncryption"]
        assert all(bucket["PublicAccessBlockConfiguration"].values())


def test_a_key_is_not_lost_unnoticed() -> None:
    for key in of_type("KMS::Key").values():
        assert key["PendingWindowInDays"] == 30
        assert key.get("EnableKeyRotation") is (None if key.get("KeyUsage") == "SIGN_VERIFY" else True)
        own, *others = statements(key["KeyPolicy"])
        assert own["Principal"] == {"AWS": {"Fn::Sub": "arn:${AWS::Partition}:iam::${AWS::AccountId}:root"}}
        for other in others:
            assert set(other["Principal"]) == {"Service"}
            assert other["Condition"]["StringEquals"]["aws:SourceAccount"] == {"Ref": "AWS::AccountId"}
    (rule,) = of_type("Events::Rule").values()
    assert {"DisableKey", "ScheduleKeyDeletion"} <= set(rule["EventPattern"]["detail"]["eventName"])


def test_a_pod_does_not_reach_what_its_node_may() -> None:
    (template,) = of_type("EC2::LaunchTemplate").values()
    options = template["LaunchTemplateData"]["MetadataOptions"]
    assert options["HttpTokens"] == "required"
    assert options["HttpPutResponseHopLimit"] == 1
    (managed,) = [it["ManagedPolicyArns"] for name, it in of_type("IAM::Role").items() if name == "NodeRole"]
    assert {arn["Fn::Sub"].rpartition("/")[2] for arn in managed} == {
        "AmazonEKSWorkerNodeMinimalPolicy",
        "AmazonEC2ContainerRegistryPullOnly",
    }


def test_network_policies_have_somebody_who_enforces_them() -> None:
    (values,) = [
        it["ConfigurationValues"] for it in of_type("EKS::Addon").values() if "ConfigurationValues" in it
    ]
    told = json.loads(values["Fn::Sub"])
    assert told["enableNetworkPolicy"] == "true"
    assert told["env"]["NETWORK_POLICY_ENFORCING_MODE"] == "${NetworkPolicyMode}"


@pytest.mark.parametrize("role", sorted(of_type("IAM::Role")))
def test_a_role_is_for_one_service_of_aws(role: str) -> None:
    properties = of_type("IAM::Role")[role]
    (trust,) = statements(properties["AssumeRolePolicyDocument"])
    assert set(trust["Principal"]) == {"Service"}
    if trust["Principal"]["Service"] != "ec2.amazonaws.com":
        assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}
    for statement in statements(properties.get("Policies", [])):
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any(action.endswith("*") for action in actions)
        if statement["Resource"] == "*":
            # A login of the registry is for all of it; what it may read there is said elsewhere.
            narrow = r"[a-z0-9]+:Describe\w+|ecr:GetAuthorizationToken"
            assert all(re.fullmatch(narrow, action) for action in actions), role


def test_people_come_in_through_the_firewall_and_by_their_names() -> None:
    (listener,) = of_type("ElasticLoadBalancingV2::Listener").values()
    assert [action["Type"] for action in listener["DefaultActions"]] == ["authenticate-oidc", "forward"]
    assert (
        listener["DefaultActions"][0]["AuthenticateOidcConfig"]["OnUnauthenticatedRequest"] == "authenticate"
    )
    assert "TLS13-1-3" in listener["SslPolicy"]
    (association,) = of_type("WAFv2::WebACLAssociation").values()
    assert association["ResourceArn"] == {"Ref": "Door"}
    for parameter in ("CertificateArn", "Issuer", "ClientId", "ClientSecretId"):
        assert "Default" not in DOOR["Parameters"][parameter], "nobody comes in unknown"


@pytest.mark.parametrize(("name", "template"), [("workload", WORKLOAD), ("door", DOOR)])
def test_another_template_is_given_what_it_asks_for(name: str, template: dict[str, Any]) -> None:
    given = {
        match[1]
        for output in PLATFORM["Outputs"].values()
        if (match := re.match(rf"(\w+) of {name}\.yaml\b", output["Description"]))
    }
    assert given <= template["Parameters"].keys()
    needed = {name for name, parameter in template["Parameters"].items() if "Default" not in parameter}
    people = {"CertificateArn", "Issuer", "ClientId", "ClientSecretId"}
    assert needed - people <= given


@pytest.mark.parametrize("name", ["platform", "door", "workload"])
def test_a_template_fits_into_one_request(name: str) -> None:
    assert (INFRA / f"{name}.yaml").stat().st_size <= TEMPLATE_BYTES


@pytest.mark.parametrize(
    ("template", "name"),
    [(template, name) for template in (PLATFORM, DOOR) for name in sorted(template["Parameters"])],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_every_parameter_is_used(template: dict[str, Any], name: str) -> None:
    text = json.dumps({key: template[key] for key in ("Resources", "Conditions", "Outputs")})
    assert f'"Ref": "{name}"' in text or f"${{{name}}}" in text


def test_the_overlay_s_policies_know_where_the_template_puts_things() -> None:
    """k8s/overlays/eks and k8s/kyverno have the addresses in them, as they are by default."""
    texts = "".join(
        (INFRA.parent / "k8s" / name).read_text()
        for name in ("overlays/eks/network.yaml", "overlays/eks/kustomization.yaml", "kyverno/network.yaml")
    )
    assert PLATFORM["Parameters"]["VpcCidr"]["Default"] == VPC
    blocks = {addresses(it["Value"]) for name, it in PLATFORM["Outputs"].items() if name.endswith("Cidr")}
    assert set(re.findall(r"10\.[0-9.]+/[0-9]+", texts)) == blocks
    (cluster,) = of_type("EKS::Cluster").values()
    service = ipaddress.ip_network(cluster["KubernetesNetworkConfig"]["ServiceIpv4Cidr"])
    assert f"{service[1]}/32" in texts


def test_names_of_others_are_not_resolved() -> None:
    """Where there is no way out, questions to name servers would be one."""
    (rules,) = of_type("Route53Resolver::FirewallRuleGroup").values()
    allowed, blocked = sorted(rules["FirewallRules"], key=lambda rule: rule["Priority"])
    assert (allowed["Action"], blocked["Action"], blocked["BlockResponse"]) == ("ALLOW", "BLOCK", "NXDOMAIN")
    lists = of_type("Route53Resolver::FirewallDomainList")
    assert lists[blocked["FirewallDomainListId"]["Ref"]]["Domains"] == ["*"]
    names = [str(each) for each in lists[allowed["FirewallDomainListId"]["Ref"]]["Domains"]]
    assert "*" not in names
    assert any("AWS::URLSuffix" in name for name in names)
    (association,) = of_type("Route53Resolver::FirewallRuleGroupAssociation").values()
    assert association["VpcId"] == {"Ref": "Network"}
    assert association["FirewallRuleGroupId"] == {"Ref": "NameRules"}
