"""What `make deploy` and `make undeploy` know, ask and refuse, with answers as AWS gives them."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest

from tests.deploy.edge import ADMINISTRATOR, Edge, Refused
from tests.unit.templates import read_template
from ztdev.eks import __main__ as eks
from ztdev.eks import cluster, preflight
from ztdev.eks.account import IMAGES
from ztdev.eks.costs import monthly
from ztdev.eks.preflight import NotReadyToDeploy
from ztdev.eks.registry import release
from ztdev.eks.settings import DOOR_MAY_HAVE, DOOR_NEEDS, PLATFORM_DEFAULTS, TAKEN, Misused, Settings
from ztdev.eks.undeploy import Removal, StillThere
from ztdev.errors import ExitStatus, ProgramMissing
from ztdev.events import Steps

ROOT = Path(__file__).parents[2]

IDENTITY = {
    "Account": "111122223333",
    "UserId": "AROA0123456789ABCDEF:here",
    "Arn": "arn:aws:sts::111122223333:assumed-role/you/here",
}


def who(_: Mapping[str, Any]) -> dict[str, Any]:
    return IDENTITY


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that nobody is shown: every call is answered at the edge."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What kubectl and docker say of themselves."""
    said = {"kubectl": '{"clientVersion": {"minor": "34+"}}', "docker": "arm64"}
    monkeypatch.setattr(preflight, "run", lambda program, *_, **__: said[program])
    monkeypatch.setattr(preflight, "tool", lambda name: f"/tools/{name}")
    return said


def account(**answers: Callable[[Mapping[str, Any]], dict[str, Any]]) -> boto3.Session:
    """A session in an account that is as it should be, but for these answers (``ec2_DescribeVpcs``)."""
    named = {name.replace("_", ".", 1): answer for name, answer in answers.items()}
    return Edge("registry", {"sts.GetCallerIdentity": who, **named}).session("eu-central-1")


def look(session: boto3.Session, **settings: Any) -> preflight.Ready:
    return preflight.preflight(session, Settings(api_cidrs="198.51.100.7/32", **settings), new=True)


# -- before anything costs -------------------------------------------------------------------------------


@pytest.mark.usefixtures("tools")
def test_an_account_that_has_what_is_needed_is_ready() -> None:
    """The role itself is named, with its path, and not its session."""
    ready = look(account())
    assert ready == preflight.Ready("111122223333", "eu-central-1", ADMINISTRATOR, "198.51.100.7/32", "arm64")


def test_what_is_missing_is_named_all_at_once(tools: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise ProgramMissing(f"{name} is not built yet")

    monkeypatch.setattr(preflight, "tool", absent)
    tools["docker"] = "riscv64"
    session = account(
        ec2_DescribeVpcs=lambda _: {"Vpcs": [{"VpcId": f"vpc-{number}"} for number in range(32)]},
        ec2_DescribeAvailabilityZones=lambda _: {"AvailabilityZones": [{"ZoneName": "eu-central-1a"}]},
    )
    with pytest.raises(NotReadyToDeploy) as refused:
        look(session)
    for text in (
        "cosign is not built",
        "syft is not built",
        "riscv64",
        "1 zones",
        "32 networks, 32 are in use",
    ):
        assert text in str(refused.value)
    assert "--service-code vpc --quota-code L-F678F1CE --desired-value 33" in str(refused.value)


@pytest.mark.usefixtures("tools")
def test_only_standard_instances_count_against_the_limit_of_cpus() -> None:
    def instances(kind: str, number: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        one = {"InstanceType": kind, "CpuOptions": {"CoreCount": 1, "ThreadsPerCore": 2}}
        return lambda _: {"Reservations": [{"Instances": [one] * number}]}

    assert look(account(ec2_DescribeInstances=instances("g5.large", 100)))
    assert look(account(ec2_DescribeInstances=instances("m7i.large", 13)))  # 26 of 32, and 6 are needed
    with pytest.raises(NotReadyToDeploy, match="32 CPUs of instances, 28 are in use, 6 are needed"):
        look(account(ec2_DescribeInstances=instances("m7i.large", 14)))


@pytest.mark.usefixtures("tools")
def test_a_kind_of_instance_that_a_zone_does_not_have_is_refused() -> None:
    offers = [{"InstanceType": "t4g.large", "Location": f"eu-central-1{zone}"} for zone in "ab"]
    session = account(ec2_DescribeInstanceTypeOfferings=lambda _: {"InstanceTypeOfferings": offers})
    with pytest.raises(NotReadyToDeploy, match=r"no t4g\.large in eu-central-1c"):
        look(session, parameters={"NodeSize": "large"})


@pytest.mark.usefixtures("tools")
def test_a_limit_that_may_not_be_looked_at_is_a_warning() -> None:
    def refused(_: Mapping[str, Any]) -> dict[str, Any]:
        raise Refused("AccessDeniedException")

    ready = look(account(**{"service-quotas_GetServiceQuota": refused}))
    assert [text.partition(" is ")[0] for text in ready.warnings] == [
        "The account's limit of CPUs of instances",
        "The account's limit of networks",
        "The account's limit of clusters",
        "The account's limit of databases",
    ]


def test_an_old_kubectl_is_a_warning(tools: dict[str, str]) -> None:
    tools["kubectl"] = '{"clientVersion": {"minor": "32"}}'
    assert any("kubectl is of 1.32" in text for text in look(account()).warnings)


@pytest.mark.usefixtures("tools")
def test_what_is_ours_already_does_not_count_against_a_limit() -> None:
    full = {"Vpcs": [{"VpcId": f"vpc-{number}"} for number in range(32)]}
    session = account(ec2_DescribeVpcs=lambda _: full)
    assert preflight.preflight(session, Settings(api_cidrs=""), new=False)


def test_the_root_of_an_account_deploys_nothing() -> None:
    root = {**IDENTITY, "Arn": "arn:aws:iam::111122223333:root"}
    with pytest.raises(NotReadyToDeploy, match="root"):
        preflight.caller(account(sts_GetCallerIdentity=lambda _: root))
    user = {**IDENTITY, "Arn": "arn:aws:iam::111122223333:user/people/me"}
    assert preflight.caller(account(sts_GetCallerIdentity=lambda _: user))[1] == user["Arn"]


# -- what is typed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "status", "said"),
    [
        (["deploy"], ExitStatus.FAILED, "No region is chosen"),
        (["deploy", "--parameter", "NodeCount"], ExitStatus.USAGE, "NAME=VALUE"),
        (["deploy", "--parameter", "ApiCidrs=0.0.0.0/0"], ExitStatus.USAGE, "not set by hand"),
        (["deploy", "--door", "Issuer"], ExitStatus.USAGE, "--door Issuer: write it as NAME=VALUE"),
        (
            ["deploy", "--door", "DoorCidr=10.0.0.0/24"],
            ExitStatus.USAGE,
            "There are CertificateArn, ClientId",
        ),
        (
            ["deploy", "--door", "ClientId=page"],
            ExitStatus.USAGE,
            "CertificateArn, ClientSecretId, Issuer must",
        ),
        (["check"], ExitStatus.FAILED, "No region is chosen"),
        (["check", "--door", "Issuer"], ExitStatus.USAGE, "--door Issuer: write it as NAME=VALUE"),
        (["undeploy", "--region", "eu-central-1"], ExitStatus.USAGE, "--yes"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    typed: list[str],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edge = Edge("registry", {"sts.GetCallerIdentity": who})
    monkeypatch.setattr(eks, "boto3", SimpleNamespace(Session=edge.session))
    assert eks.main(typed) == status
    assert said in capsys.readouterr().err


def test_options_that_this_program_fills_in_are_parameters_of_the_platform() -> None:
    parameters = read_template(ROOT / "infra" / "platform.yaml")["Parameters"]
    assert parameters.keys() >= TAKEN
    assert {name: str(parameters[name]["Default"]) for name in PLATFORM_DEFAULTS} == PLATFORM_DEFAULTS
    with pytest.raises(Misused):
        Settings(parameters={"NamePrefix": "other"})


def test_all_of_the_door_that_this_program_cannot_know_is_an_option() -> None:
    parameters = read_template(ROOT / "infra" / "door.yaml")["Parameters"]
    known = {"NamePrefix", "NetworkId", "DoorCidr", "NodesCidr", "RoleBoundaryArn"}
    known |= {"EndpointSubnetIds", "EndpointsGroupId", "ClusterGroupId"}
    asked = parameters.keys() - known
    assert {name for name in asked if "Default" not in parameters[name]} == DOOR_NEEDS
    assert {name for name in asked if "Default" in parameters[name]} == DOOR_MAY_HAVE


# -- what it costs ---------------------------------------------------------------------------------------


def test_costs_are_those_of_the_document() -> None:
    lines = (ROOT / "docs" / "eks.md").read_text().partition("| what | parameter |")[2].splitlines()[2:]
    told = [line.split("|")[-2].strip() for line in lines if line.startswith("|")][:8]
    costs = [str(cost) for _, cost in monthly(Settings())]
    exact = [text for text in told if text.isdecimal()]
    assert exact == [cost for text, cost in zip(told, costs, strict=True) if text.isdecimal()]
    assert [text for text in told if not text.isdecimal()] == ["5 to 20", "less than 1"]
    (door,) = (line.split("|")[-2].strip() for line in lines if line.startswith("| the door:"))
    with_a_door = monthly(Settings(door=dict.fromkeys(DOOR_NEEDS, "given")))
    assert str(sum(cost for _, cost in with_a_door) - sum(int(cost) for cost in costs)) == door


def test_what_is_chosen_changes_what_it_costs() -> None:
    def cost(number: int, **parameters: str) -> int:
        return monthly(Settings(parameters=parameters))[number][1]

    assert cost(1, NodeCount="6") == 2 * cost(1)
    assert cost(1, NodeSize="xlarge") == 4 * cost(1)
    assert cost(2, EndpointsInEveryZone="true") == 3 * cost(2)
    assert cost(3, DatabaseStandby="true") == 2 * cost(3)


# -- images and the way in -------------------------------------------------------------------------------


def test_every_image_has_a_release() -> None:
    for name in IMAGES:
        assert re.fullmatch(rf"{re.escape(name)}:(local|v?\d+\.\d+\.\d+)", release(name))


def test_kyverno_s_kinds_are_those_of_the_release_that_runs() -> None:
    """They are taken from its module, and the image is named elsewhere."""
    pinned = re.search(r"github.com/kyverno/kyverno (v\S+)", (ROOT / "dev/tools/kyverno/go.mod").read_text())
    assert pinned is not None
    assert release("ghcr.io/kyverno/kyverno").rpartition(":")[2] == pinned[1]


def test_a_token_names_the_cluster_and_lasts_a_minute() -> None:
    """EKS takes it for a quarter of an hour; the question itself is signed for a minute."""
    told = cluster.token(boto3.Session(region_name="eu-central-1"), "zt-demo")
    assert told["kind"] == "ExecCredential"
    left = datetime.fromisoformat(told["status"]["expirationTimestamp"]) - datetime.now(UTC)
    assert 13 * 60 < left.total_seconds() < 15 * 60
    kind, _, text = told["status"]["token"].partition(".")
    assert kind == "k8s-aws-v1"
    url = urlsplit(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode())
    asked = parse_qs(url.query)
    assert url.hostname == "sts.eu-central-1.amazonaws.com"
    assert asked["Action"] == ["GetCallerIdentity"]
    assert asked["X-Amz-Expires"] == ["60"]
    assert asked["X-Amz-SignedHeaders"] == ["host;x-k8s-aws-id"]


def test_how_the_cluster_is_reached_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "BUILD", tmp_path)
    described = {"endpoint": "https://cluster.example", "certificateAuthority": {"data": "Q0E="}}
    monkeypatch.setenv("KUBECONFIG", "another")
    session = account(eks_DescribeCluster=lambda _: {"cluster": described})
    file = cluster.choose(session, "zt-demo", None)
    assert os.environ["KUBECONFIG"] == str(file)
    assert file.stat().st_mode & 0o077 == 0
    text = file.read_text()
    assert "https://cluster.example" in text
    assert "ztdev.eks" in text
    assert not re.search("client-key|password|token:", text)


# -- what is left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resource", "answers", "costs"),
    [
        ("ec2:eu-central-1:111122223333:vpc/vpc-1", {}, False),
        ("ec2:eu-central-1:111122223333:natgateway/nat-1", {}, True),
        ("ec2:eu-central-1:111122223333:instance/i-1", {}, False),
        ("rds:eu-central-1:111122223333:snapshot:last", {}, True),
        (
            "kms:eu-central-1:111122223333:key/1",
            {"kms_DescribeKey": lambda _: {"KeyMetadata": {"KeyId": "1", "KeyState": "PendingDeletion"}}},
            False,
        ),
        (
            "kms:eu-central-1:111122223333:key/1",
            {"kms_DescribeKey": lambda _: {"KeyMetadata": {"KeyId": "1", "KeyState": "Enabled"}}},
            True,
        ),
        (
            "secretsmanager:eu-central-1:111122223333:secret:one",
            {"secretsmanager_DescribeSecret": lambda _: {"DeletedDate": datetime.now(UTC)}},
            False,
        ),
        (
            "secretsmanager:eu-central-1:111122223333:secret:one",
            {"secretsmanager_DescribeSecret": lambda _: {}},
            True,
        ),
    ],
)
def test_what_costs_is_told_from_what_does_not(
    resource: str, answers: dict[str, Any], costs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arn = f"arn:aws:{resource}"
    marked = {"ResourceTagMappingList": [{"ResourceARN": arn}]}
    session = account(resourcegroupstaggingapi_GetResources=lambda _: marked, **answers)
    monkeypatch.setattr("ztdev.eks.undeploy.WITHIN", 0.0)
    monkeypatch.setattr("ztdev.eks.undeploy.EVERY", 0.01)
    removal = Removal(session, None, Steps())
    if costs:
        with pytest.raises(StillThere, match=re.escape(arn)):
            removal.proof()
    else:
        assert [left.arn for left in removal.proof()] == [arn]
