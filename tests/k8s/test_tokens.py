"""Web identity with the cluster's own tokens: whose role a token opens, and which token opens none."""

from __future__ import annotations

import base64

import pytest

from tests.k8s.cluster import pods_of
from tests.waiting import until
from ztdev.kubernetes.kubectl import ClusterFault, apply, kubectl, python, read

#: In a pod: asks STS for a role by a token, and prints ``taken``, or AWS's code.
TAKE = """
import json, os, sys
import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
sts = boto3.client("sts", region_name=os.environ["AWS_REGION"], config=Config(signature_version=UNSIGNED))
role, token = json.load(sys.stdin)
try:
    sts.assume_role_with_web_identity(RoleArn=role, RoleSessionName="tried", WebIdentityToken=token)
except ClientError as error:
    print(json.dumps(error.response["Error"]["Code"]))
else:
    print(json.dumps("taken"))
"""

STS = ("--audience", "sts.amazonaws.com")


def take(token: str, role: str = "orders") -> str:
    told = python(
        "zt-demo", "deployment/orders", TAKE, [f"arn:aws:iam::111122223333:role/zt-demo-{role}", token]
    )
    return str(told)


def token(account: str, *options: str, namespace: str = "zt-demo") -> str:
    return kubectl("--namespace", namespace, "create", "token", account, *options).strip()


def test_a_pod_s_token_opens_the_role_of_its_account_and_no_other() -> None:
    pod = pods_of("orders")[0]["metadata"]
    bound = (
        "--bound-object-kind",
        "Pod",
        "--bound-object-name",
        pod["name"],
        "--bound-object-uid",
        pod["uid"],
    )
    assert take(token("orders", *STS, *bound)) == "taken"
    for role in ("orders-migrate", "payments", "payments-migrate"):
        assert take(token("orders", *STS, *bound), role) == "AccessDenied"


def test_somebody_else_s_token_does_not_open_it() -> None:
    assert take(token("orders", *STS)) == "taken"
    assert take(token("payments", *STS)) == "AccessDenied"
    assert take(token("data", *STS, namespace="zt-local")) == "AccessDenied"


@pytest.mark.parametrize("audience", [("--audience", "spire-server"), ()], ids=["SPIRE", "the API server"])
def test_a_token_for_another_reader_opens_nothing(audience: tuple[str, ...]) -> None:
    assert take(token("orders", *STS)) == "taken"
    assert take(token("orders", *audience)) == "InvalidIdentityToken"


def test_a_token_that_never_runs_out_opens_nothing() -> None:
    """As Secrets of old hold them. Admission lets no pod of ours mount one; whoever reads Secrets has it."""
    metadata = {
        "name": "orders-forever",
        "namespace": "zt-demo",
        "annotations": {"kubernetes.io/service-account.name": "orders"},
    }
    kind = "kubernetes.io/service-account-token"
    apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind})
    try:
        until(
            lambda: "token" in read("secret", "orders-forever", "--namespace", "zt-demo").get("data", {}),
            20,
            "it",
        )
        found = read("secret", "orders-forever", "--namespace", "zt-demo")["data"]["token"]
        assert take(base64.b64decode(found).decode()) == "InvalidIdentityToken"
    finally:
        kubectl("--namespace", "zt-demo", "delete", "secret", "orders-forever")


def test_nobody_of_ours_makes_tokens_or_reads_secrets() -> None:
    """AWS takes a token that is bound to no pod, too: so who can have one made matters."""

    def may(account: str, *what: str) -> bool:
        try:
            return kubectl("auth", "can-i", *what, "--all-namespaces", *account.split()).strip() == "yes"
        except ClusterFault:
            return False

    for what in (("create", "serviceaccounts/token"), ("get", "secrets"), ("create", "pods/exec")):
        assert may("", *what)
        for namespace in ("zt-demo", "spire-system"):
            for account in read("serviceaccounts", "--namespace", namespace)["items"]:
                name = account["metadata"]["name"]
                assert not may(f"--as system:serviceaccount:{namespace}:{name}", *what), (name, what)
