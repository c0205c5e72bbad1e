"""infra/workload.yaml: the rendered trust policies and permissions say what the design says, no more."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cfnlint.api import lint  # type: ignore[import-untyped,unused-ignore]
from cfnlint.config import ManualArgs  # type: ignore[import-untyped,unused-ignore]

from tests.unit.templates import read_template
from ztdev.functions import LAMBDA_PLATFORMS, LAMBDA_PYTHON

TEMPLATE = Path(__file__).resolve().parents[2] / "infra" / "workload.yaml"

ISSUERS = ["oidc.eks.eu-central-1.amazonaws.com/id/0123456789ABCDEF0123456789ABCDEF", "oidc.zt.example/local"]

SERVICE_ACCOUNTS = ["orders", "orders-migrate", "payments", "payments-migrate"]
DATABASES_ROLE = "zt-demo-databases"
ROTATION_ROLES = ["zt-demo-rotate-orders", "zt-demo-rotate-payments"]
STRANGERS = ["frontend", "default", "order", "orders-", "orders2", "payments-migrate-x"]


@functools.cache
def load() -> dict[str, Any]:
    template: dict[str, Any] = read_template(TEMPLATE)
    return template


def render(value: Any, values: Mapping[str, str]) -> Any:
    """Resolve the functions the template uses; anything else fails the test."""
    if isinstance(value, list):
        return [render(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"Ref"}:
        return values.get(value["Ref"], f"<{value['Ref']}>")
    if set(value) == {"Fn::GetAtt"}:
        return "<{}.{}>".format(*value["Fn::GetAtt"])
    if set(value) == {"Fn::Sub"}:
        text, more = value["Fn::Sub"], {}
        if not isinstance(text, str):
            text, more = text[0], {name: render(item, values) for name, item in text[1].items()}
        return re.sub(r"\$\{([^}]+)\}", lambda found: _named(found[1], {**values, **more}), text)
    if set(value) == {"Fn::If"}:
        condition, yes, no = value["Fn::If"]
        assert condition in load()["Conditions"]
        if condition == "SubjectsAreSpiffeIds":
            assert load()["Conditions"][condition] == {
                "Fn::Not": [{"Fn::Equals": [{"Ref": "SpiffeTrustDomain"}, ""]}]
            }
            return render(yes if values["SpiffeTrustDomain"] else no, values)
        return render(yes, values)
    assert not [key for key in value if key.startswith("Fn::")], value
    return {key: render(item, values) for key, item in value.items()}


def _named(name: str, values: Mapping[str, str]) -> str:
    return f"<{name}>" if name.partition(".")[0] in load()["Resources"] else values[name]


def values(issuer: str = ISSUERS[0]) -> dict[str, str]:
    parameters = {
        name: str(parameter["Default"])
        for name, parameter in load()["Parameters"].items()
        if "Default" in parameter
    }
    return {
        **parameters,
        "OidcIssuerHost": issuer,
        "OrdersDatabaseHost": "orders.db.example",
        "PaymentsDatabaseHost": "payments.db.example",
        "AWS::Partition": "aws",
        "AWS::AccountId": "111122223333",
        "AWS::Region": "eu-central-1",
    }


def resources(kind: str, issuer: str = ISSUERS[0]) -> dict[str, dict[str, Any]]:
    return {
        name: render(resource["Properties"], values(issuer))
        for name, resource in load()["Resources"].items()
        if resource["Type"] == kind
    }


def all_roles(issuer: str = ISSUERS[0]) -> dict[str, dict[str, Any]]:
    return {role["RoleName"]: role for role in resources("AWS::IAM::Role", issuer).values()}


def roles(issuer: str = ISSUERS[0]) -> dict[str, dict[str, Any]]:
    """Those of the service accounts; the others are the rotation functions'."""
    others = {*ROTATION_ROLES, DATABASES_ROLE}
    return {name: role for name, role in all_roles(issuer).items() if name not in others}


def trust(role: Mapping[str, Any]) -> dict[str, Any]:
    document = role["AssumeRolePolicyDocument"]
    parsed: dict[str, Any] = json.loads(document) if isinstance(document, str) else document
    return parsed


def trusts(document: Mapping[str, Any], issuer: str, subject: str, audience: str) -> bool:
    """What STS decides: the conditions against the token's claims (keys without regard to case)."""
    claims = {f"{issuer}:sub".lower(): subject, f"{issuer}:aud".lower(): audience}
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        principal = f"arn:aws:iam::111122223333:oidc-provider/{issuer}"
        if statement["Principal"] != {"Federated": principal}:
            continue
        for operator, condition in statement["Condition"].items():
            assert operator == "StringEquals"
            if not all(claims.get(key.lower()) == expected for key, expected in condition.items()):
                break
        else:
            return True
    return False


def faults_in_conditions(document: Mapping[str, Any]) -> list[str]:
    """Condition keys that CloudFormation would deploy as they stand, never resolved."""
    return [
        key
        for statement in document["Statement"]
        for condition in statement.get("Condition", {}).values()
        for key in condition
        if "${" in key or "Fn::" in key or "<" in key
    ]


# -- trust


@pytest.mark.parametrize("issuer", ISSUERS)
def test_each_role_trusts_exactly_its_service_account(issuer: str) -> None:
    namespaces = ["zt-demo", "default", "zt-demo2", "zt-dem"]
    audiences = ["sts.amazonaws.com", "spire-server", "sts.amazonaws.com.evil.example"]
    accepted = {
        (role.removeprefix("zt-demo-"), namespace, account, audience)
        for role, properties in roles(issuer).items()
        for namespace, account, audience in itertools.product(
            namespaces, SERVICE_ACCOUNTS + STRANGERS, audiences
        )
        if trusts(trust(properties), issuer, f"system:serviceaccount:{namespace}:{account}", audience)
    }

    assert accepted == {(account, "zt-demo", account, "sts.amazonaws.com") for account in SERVICE_ACCOUNTS}


def test_with_a_trust_domain_each_role_trusts_exactly_its_spiffe_id() -> None:
    subjects = [
        *(
            f"spiffe://{domain}/ns/{namespace}/sa/{account}"
            for domain, namespace, account in itertools.product(
                ["zt.example", "zt.example.evil"], ["zt-demo", "default"], SERVICE_ACCOUNTS + STRANGERS
            )
        ),
        *(f"system:serviceaccount:zt-demo:{account}" for account in SERVICE_ACCOUNTS),
    ]
    by_spiffe_id = {
        role["RoleName"]: role
        for resource in load()["Resources"].values()
        if resource["Type"] == "AWS::IAM::Role"
        and (role := render(resource["Properties"], {**values(), "SpiffeTrustDomain": "zt.example"}))
    }
    accepted = {
        (account, subject)
        for account, subject in itertools.product(SERVICE_ACCOUNTS, subjects)
        if trusts(trust(by_spiffe_id[f"zt-demo-{account}"]), ISSUERS[0], subject, "sts.amazonaws.com")
    }

    assert accepted == {
        (account, f"spiffe://zt.example/ns/zt-demo/sa/{account}") for account in SERVICE_ACCOUNTS
    }


@pytest.mark.parametrize("role", [f"zt-demo-{account}" for account in SERVICE_ACCOUNTS])
def test_another_issuer_is_not_trusted(role: str) -> None:
    subject = f"system:serviceaccount:zt-demo:{role.removeprefix('zt-demo-')}"
    document = trust(roles(ISSUERS[0])[role])

    assert trusts(document, ISSUERS[0], subject, "sts.amazonaws.com")
    assert not trusts(document, ISSUERS[1], subject, "sts.amazonaws.com")


@pytest.mark.parametrize("role", [f"zt-demo-{account}" for account in SERVICE_ACCOUNTS])
def test_sub_and_aud_are_pinned_by_string_equals(role: str) -> None:
    [statement] = trust(roles()[role])["Statement"]

    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    assert set(statement["Condition"]) == {"StringEquals"}
    assert set(statement["Condition"]["StringEquals"]) == {f"{ISSUERS[0]}:sub", f"{ISSUERS[0]}:aud"}
    assert "*" not in json.dumps(statement)


def test_no_condition_key_is_left_unresolved() -> None:
    documents = [trust(role) for role in all_roles().values()]
    documents += [policy["PolicyDocument"] for role in all_roles().values() for policy in role["Policies"]]
    documents += [key["KeyPolicy"] for key in resources("AWS::KMS::Key").values()]

    assert documents
    assert [fault for document in documents for fault in faults_in_conditions(document)] == []


@pytest.mark.parametrize("key", ["${OidcIssuerHost}:sub", "Fn::Sub:sub", "<Ref>:sub"])
def test_a_condition_key_written_as_a_mapping_key_would_be_found(key: str) -> None:
    document = {"Statement": [{"Condition": {"StringEquals": {key: "x"}}}]}

    assert faults_in_conditions(document) == [key]


# -- permissions


def statements(account: str) -> Iterator[dict[str, Any]]:
    for policy in roles()[f"zt-demo-{account}"]["Policies"]:
        yield from policy["PolicyDocument"]["Statement"]


def secret_of(account: str) -> str:
    """The logical name of the secret a service account reads."""
    service, _, migrate = account.partition("-")
    return f"{service.capitalize()}{'Owner' if migrate else 'Database'}Secret"


@pytest.mark.parametrize("account", SERVICE_ACCOUNTS)
def test_each_role_reads_its_own_secret_only(account: str) -> None:
    reads, decrypts = statements(account)

    assert reads["Effect"] == "Allow"
    assert set(reads["Action"]) == {"secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"}
    assert reads["Resource"] == f"<{secret_of(account)}.Id>"
    assert decrypts["Effect"] == "Allow"
    assert decrypts["Action"] == "kms:Decrypt"


@pytest.mark.parametrize("account", SERVICE_ACCOUNTS)
def test_each_role_decrypts_its_own_secret_only_and_only_through_secrets_manager(account: str) -> None:
    _, decrypts = statements(account)

    assert decrypts["Resource"] == "<SecretsKey.Arn>"
    assert decrypts["Condition"] == {
        "StringEquals": {
            "kms:ViaService": "secretsmanager.eu-central-1.amazonaws.com",
            "kms:EncryptionContext:SecretARN": f"<{secret_of(account)}.Id>",
        }
    }


def test_roles_have_nothing_else() -> None:
    assert set(roles()) == {f"zt-demo-{account}" for account in SERVICE_ACCOUNTS}
    assert set(all_roles()) == {*roles(), *ROTATION_ROLES, DATABASES_ROLE}
    for role in all_roles().values():
        assert "ManagedPolicyArns" not in role
    kinds = {resource["Type"] for resource in load()["Resources"].values()}
    assert not kinds & {
        "AWS::IAM::Policy",
        "AWS::IAM::ManagedPolicy",
        "AWS::IAM::RolePolicy",
        "AWS::IAM::User",
    }


def test_who_makes_the_databases_roles_is_one_account_for_as_long_as_it_is_asked_for() -> None:
    resource = load()["Resources"]["DatabasesRole"]
    assert resource["Condition"] == "AdministrationIsPossible"
    for parameter in (
        "OrdersAdministratorSecretArn",
        "PaymentsAdministratorSecretArn",
        "AdministratorKeyArn",
    ):
        assert load()["Parameters"][parameter]["Default"] == ""
        assert parameter in json.dumps(load()["Conditions"]["AdministrationIsPossible"])

    role = all_roles()[DATABASES_ROLE]
    subjects = [
        f"system:serviceaccount:{ns}:{account}"
        for ns in ("zt-demo", "zt-demo-databases")
        for account in ("databases", "orders", "default")
    ]
    accepted = {
        subject for subject in subjects if trusts(trust(role), ISSUERS[0], subject, "sts.amazonaws.com")
    }
    assert accepted == {"system:serviceaccount:zt-demo-databases:databases"}
    [policy] = role["Policies"]
    reads, decrypts = policy["PolicyDocument"]["Statement"]
    assert reads["Action"] == "secretsmanager:GetSecretValue"
    assert len(reads["Resource"]) == 8
    assert "*" not in json.dumps(reads)
    via = {"StringEquals": {"kms:ViaService": "secretsmanager.eu-central-1.amazonaws.com"}}
    assert decrypts["Condition"] == via


# -- rotation


SERVICES = ("orders", "payments")


def rotation_role(service: str) -> dict[str, Any]:
    return all_roles()[f"zt-demo-rotate-{service}"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_rotation_role_is_assumed_by_lambda_only(service: str) -> None:
    [statement] = trust(rotation_role(service))["Statement"]

    assert statement["Principal"] == {"Service": "lambda.amazonaws.com"}
    assert statement["Action"] == "sts:AssumeRole"


@pytest.mark.parametrize("service", SERVICES)
def test_a_rotation_role_touches_its_two_secrets_only(service: str) -> None:
    name = service.capitalize()
    secret, rotator = f"<{name}DatabaseSecret.Id>", f"<{name}RotatorSecret.Id>"
    [policy, interfaces] = rotation_role(service)["Policies"]

    allowed = set()
    for statement in policy["PolicyDocument"]["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        context = statement.get("Condition", {}).get("StringEquals", {})
        for action in [actions] if isinstance(actions, str) else actions:
            allowed.add((action, statement["Resource"], context.get("kms:EncryptionContext:SecretARN")))
            if action.startswith("kms:"):
                assert context["kms:ViaService"] == "secretsmanager.eu-central-1.amazonaws.com"
    log = f"arn:aws:logs:eu-central-1:111122223333:log-group:/aws/lambda/zt-demo-rotate-{service}:*"
    assert allowed == {
        ("secretsmanager:DescribeSecret", secret, None),
        ("secretsmanager:GetSecretValue", secret, None),
        ("secretsmanager:PutSecretValue", secret, None),
        ("secretsmanager:UpdateSecretVersionStage", secret, None),
        ("secretsmanager:GetSecretValue", rotator, None),
        ("secretsmanager:GetRandomPassword", "*", None),
        ("kms:Decrypt", "<SecretsKey.Arn>", secret),
        ("kms:GenerateDataKey", "<SecretsKey.Arn>", secret),
        ("kms:Decrypt", "<SecretsKey.Arn>", rotator),
        ("logs:CreateLogStream", log, None),
        ("logs:PutLogEvents", log, None),
    }
    lambda_may, code_may_not = interfaces["PolicyDocument"]["Statement"]
    assert all(action.startswith("ec2:") for action in lambda_may["Action"])
    assert (code_may_not["Effect"], code_may_not["Action"]) == ("Deny", "ec2:*")
    function = f"arn:aws:lambda:eu-central-1:111122223333:function:zt-demo-rotate-{service}"
    assert code_may_not["Condition"] == {"ArnEquals": {"lambda:SourceFunctionArn": function}}


def test_only_secrets_manager_of_this_account_calls_a_function_and_for_its_secret_only() -> None:
    permissions = resources("AWS::Lambda::Permission")

    assert permissions == {
        f"{service}RotationPermission": {
            "FunctionName": f"<{service}RotationFunction>",
            "Action": "lambda:InvokeFunction",
            "Principal": "secretsmanager.amazonaws.com",
            "SourceAccount": "111122223333",
            "SourceArn": f"<{service}DatabaseSecret.Id>",
        }
        for service in ("Orders", "Payments")
    }


def test_each_secret_of_a_service_is_rotated_by_its_function() -> None:
    schedules = resources("AWS::SecretsManager::RotationSchedule")

    assert {(s["SecretId"], s["RotationLambdaARN"]) for s in schedules.values()} == {
        (f"<{service}DatabaseSecret.Id>", f"<{service}RotationFunction.Arn>")
        for service in ("Orders", "Payments")
    }
    for schedule in schedules.values():
        assert schedule["RotateImmediatelyOnUpdate"] is False  # the database may not know the passwords yet


def test_the_functions_are_what_is_packaged() -> None:
    functions = resources("AWS::Lambda::Function")

    assert set(functions) == {"OrdersRotationFunction", "PaymentsRotationFunction"}
    for function in functions.values():
        assert function["Runtime"] == f"python{LAMBDA_PYTHON}"
        module, _, name = function["Handler"].rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    parameter = load()["Parameters"]["RotationArchitecture"]
    assert set(parameter["AllowedValues"]) == set(LAMBDA_PLATFORMS)


def test_nothing_of_the_rotation_is_deployed_without_a_package_nor_scheduled_without_a_schedule() -> None:
    conditions = {
        name: resource.get("Condition")
        for name, resource in load()["Resources"].items()
        if "Rotation" in name
    }

    for service, what in itertools.product(("Orders", "Payments"), ("Log", "Role", "Function", "Permission")):
        assert conditions.pop(f"{service}Rotation{what}") == "RotationIsDeployed"
    assert set(conditions.values()) == {"RotationIsScheduled"}


@pytest.mark.parametrize(
    ("schedule", "valid"),
    [
        ("", True),
        ("rate(4 hours)", True),
        ("rate(1 day)", True),
        ("cron(0 4 * * ? *)", True),
        ("rate(0 days)", False),
        ("1 day", False),
        ("rate(1 day", False),
    ],
)
def test_the_schedule_is_an_expression_of_secrets_manager(schedule: str, valid: bool) -> None:
    pattern = load()["Parameters"]["RotationSchedule"]["AllowedPattern"]

    assert bool(re.fullmatch(pattern, schedule)) is valid


# -- key and secrets


def test_the_key_can_always_be_administered_and_is_used_in_secrets_manager_only() -> None:
    [key] = resources("AWS::KMS::Key").values()
    administers, uses = key["KeyPolicy"]["Statement"]

    assert key["EnableKeyRotation"] is True
    assert key["PendingWindowInDays"] == 30
    for statement in (administers, uses):
        assert statement["Principal"] == {"AWS": "arn:aws:iam::111122223333:root"}
    assert "kms:PutKeyPolicy" in administers["Action"]
    assert "Condition" not in administers
    cryptographic = [
        "kms:Decrypt",
        "kms:Encrypt",
        "kms:GenerateDataKey",
        "kms:ReEncryptFrom",
        "kms:CreateGrant",
    ]
    for action, pattern in itertools.product(cryptographic, administers["Action"]):
        assert not fnmatch.fnmatchcase(action, pattern)
    assert uses["Condition"]["StringEquals"] == {
        "kms:ViaService": "secretsmanager.eu-central-1.amazonaws.com",
        "kms:CallerAccount": "111122223333",
    }


def test_secrets_are_generated_and_encrypted_with_the_key() -> None:
    found = {}
    for secret in resources("AWS::SecretsManager::Secret").values():
        assert secret["KmsKeyId"] == "<SecretsKey.Arn>"
        assert "SecretString" not in secret
        rules = secret["GenerateSecretString"]
        assert rules["GenerateStringKey"] == "password"
        assert rules["PasswordLength"] >= 32
        found[secret["Name"]] = json.loads(rules["SecretStringTemplate"])

    assert found == {
        f"zt-demo/{service}/{name}": {
            "engine": "postgres",
            "host": f"{service}.db.example",
            "port": 5432,
            "dbname": service,
            "username": f"{service}_{user}",
            **({"masterarn": f"<{service.capitalize()}RotatorSecret.Id>"} if user == "app" else {}),
        }
        for service in ("orders", "payments")
        for name, user in (("db", "app"), ("db-owner", "owner"), ("db-rotator", "rotator"))
    }


def test_the_outputs_hold_what_the_service_accounts_and_services_need() -> None:
    outputs = {name: output["Value"] for name, output in load()["Outputs"].items()}

    expected = {"SecretsKeyArn": ["SecretsKey", "Arn"], "DatabasesRoleArn": ["DatabasesRole", "Arn"]}
    for service, which in itertools.product(("Orders", "Payments"), ("", "Migrate")):
        expected[f"{service}{which}RoleArn"] = [f"{service}{which}Role", "Arn"]
    for service, which in itertools.product(("Orders", "Payments"), ("Database", "Owner", "Rotator")):
        expected[f"{service}{which}SecretArn"] = [f"{service}{which}Secret", "Id"]
    for service in ("Orders", "Payments"):
        expected[f"{service}RotationFunctionArn"] = [f"{service}RotationFunction", "Arn"]
    assert outputs == {name: {"Fn::GetAtt": attribute} for name, attribute in expected.items()}


@pytest.mark.parametrize(
    ("host", "valid"),
    [
        ("oidc.eks.eu-central-1.amazonaws.com/id/0123456789ABCDEF", True),
        ("oidc.zt.example/local", True),
        ("oidc.zt.example", True),
        ("https://oidc.zt.example", False),
        ("oidc.zt.example/", False),
        ('oidc.zt.example":"', False),
        ("*", False),
    ],
)
def test_the_issuer_host_is_written_without_scheme(host: str, valid: bool) -> None:
    pattern = load()["Parameters"]["OidcIssuerHost"]["AllowedPattern"]

    assert bool(re.fullmatch(pattern, host)) is valid


def test_cfn_lint_finds_nothing() -> None:
    found = lint(TEMPLATE.read_text(), config=ManualArgs(regions=["eu-central-1", "us-east-1"]))

    assert [str(match) for match in found] == []
