"""The stand-in for AWS: what a web identity gets, and everything that gets nothing.

Each group of refusals stands beside its positive control: the same call by the rightful workload succeeds.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import http.client
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import botocore.session
import pytest
import pytest_asyncio
from botocore import UNSIGNED
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc import jwt
from joserfc.jwk import RSAKey

from ztdev.aws import cloud as cloud_module
from ztdev.aws.cloud import DatabaseAddress, LocalCloud
from ztdev.aws.environment import ensure_environment
from ztdev.aws.gate import EX_UNAVAILABLE
from ztdev.aws.issuer import OidcIssuer, TokenFile
from ztdev.aws.stacks import StackFailed
from ztdev.errors import PortInUse, ProgramMissing, StackError
from ztdev.state import default_state_directory
from ztmtls.reasons import Reason
from ztmtls.secrets import CredentialsRefused, RotatingSecret, SecretError, WebIdentity

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

ENVIRONMENT = default_state_directory() / "aws-env"
DATABASES = {"orders": DatabaseAddress("127.0.0.1", 5433), "payments": DatabaseAddress("127.0.0.1", 5434)}
ACCOUNTS = ["orders", "orders-migrate", "payments", "payments-migrate"]


@dataclass
class Aws:
    """The running stand-in, its issuer, and the calls that the tests make."""

    cloud: Any  # LocalCloud, or another address to ask
    issuer: OidcIssuer
    log: Path
    port: int

    def client(self, service: str, credentials: Mapping[str, str] | None = None) -> Any:
        session = botocore.session.Session()
        keys = {}
        if credentials is not None:
            keys = {
                "aws_access_key_id": credentials["AccessKeyId"],
                "aws_secret_access_key": credentials["SecretAccessKey"],
                "aws_session_token": credentials.get("SessionToken"),
            }
        options: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},
            "proxies": {},
            "parameter_validation": False,  # the server is to refuse, not this library
        }
        if credentials is None:
            options["signature_version"] = UNSIGNED
        make: Any = session.create_client
        return make(
            service,
            region_name=self.cloud.region,
            endpoint_url=self.cloud.endpoint_url,
            config=Config(**options),
            **keys,
        )

    async def assume(self, token: str, account: str = "orders", **more: Any) -> dict[str, Any]:
        """AssumeRoleWithWebIdentity, unsigned as the SDKs send it."""

        def call() -> dict[str, Any]:
            answer: dict[str, Any] = self.client("sts").assume_role_with_web_identity(
                **{
                    "RoleArn": self.cloud.role_arn(account),
                    "RoleSessionName": "test",
                    "WebIdentityToken": token,
                }
                | more
            )
            return answer

        return await asyncio.to_thread(call)

    async def credentials(self, account: str) -> dict[str, str]:
        answer = await self.assume(self.issuer.token("zt-demo", account), account)
        credentials: dict[str, str] = answer["Credentials"]
        return credentials

    async def read(self, credentials: Mapping[str, str], name: str) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            answer: dict[str, Any] = self.client("secretsmanager", credentials).get_secret_value(
                SecretId=name
            )
            return answer

        return await asyncio.to_thread(call)

    async def raw(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: str = ""
    ) -> tuple[int, str]:
        """A request as anybody on this machine can make it."""

        def call() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            try:
                connection.request(method, path, body=body, headers=dict(headers or {}))
                answer = connection.getresponse()
                return answer.status, answer.read().decode(errors="replace")
            finally:
                connection.close()

        return await asyncio.to_thread(call)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """The claims of a good token of orders, with changes; None leaves one out."""
        now = int(time.time())
        good = {
            "iss": self.issuer.url,
            "sub": "system:serviceaccount:zt-demo:orders",
            "aud": ["sts.amazonaws.com"],
            "iat": now,
            "nbf": now,
            "exp": now + 600,
        }
        return {name: value for name, value in (good | changes).items() if value is not None}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def aws(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Aws]:
    state = tmp_path_factory.mktemp("aws")
    port = free_port()
    async with OidcIssuer(state / "issuer") as issuer:
        cloud = LocalCloud(
            state / "cloud",
            port=port,
            issuer=issuer,
            log_file=state / "aws.log",
            databases=DATABASES,
            environment_dir=ENVIRONMENT,
        )
        async with cloud:
            yield Aws(cloud, issuer, state / "aws.log", port)


def code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


# -- what a web identity gets


@pytest.mark.parametrize("account", ACCOUNTS)
async def test_a_service_account_gets_its_role_and_reads_its_secret(aws: Aws, account: str) -> None:
    answer = await aws.assume(aws.issuer.token("zt-demo", account), account)

    assert answer["SubjectFromWebIdentityToken"] == f"system:serviceaccount:zt-demo:{account}"
    assert answer["Audience"] == "sts.amazonaws.com"
    assert answer["Provider"].endswith(":oidc-provider/oidc.zt.example/local")
    assert answer["AssumedRoleUser"]["Arn"].endswith(f":assumed-role/zt-demo-{account}/test")
    service, _, migrate = account.partition("-")
    name = f"zt-demo/{service}/{'db-owner' if migrate else 'db'}"
    value = json.loads((await aws.read(answer["Credentials"], name))["SecretString"])
    password = value.pop("password")
    rotator = None if migrate else aws.cloud.outputs[f"{service.capitalize()}RotatorSecretArn"]
    assert value.pop("masterarn", None) == rotator
    assert re.fullmatch("[A-Za-z0-9]{40}", password)
    assert value == {
        "engine": "postgres",
        "host": DATABASES[service].host,
        "port": DATABASES[service].port,
        "dbname": service,
        "username": f"{service}_{'owner' if migrate else 'app'}",
    }
    assert (await aws.cloud.secret_value(name))["password"] == password


@pytest.mark.parametrize("account", ACCOUNTS)
async def test_no_role_reads_anything_else(aws: Aws, account: str) -> None:
    credentials = await aws.credentials(account)
    kinds = ("db", "db-owner", "db-rotator")
    names = [f"zt-demo/{service}/{name}" for service in DATABASES for name in kinds]
    service, _, migrate = account.partition("-")
    own = f"zt-demo/{service}/{'db-owner' if migrate else 'db'}"
    assert await aws.read(credentials, own)

    for name in set(names) - {own}:
        with pytest.raises(ClientError, match="AccessDeniedException"):
            await aws.read(credentials, name)


async def test_a_role_may_ask_about_its_own_secret_and_no_other(aws: Aws) -> None:
    """When it is rotated, for example: the status page shows that."""
    client = aws.client("secretsmanager", await aws.credentials("orders"))
    described = await asyncio.to_thread(client.describe_secret, SecretId="zt-demo/orders/db")
    assert described["Name"] == "zt-demo/orders/db"

    for name in ("zt-demo/orders/db-owner", "zt-demo/orders/db-rotator", "zt-demo/payments/db"):
        with pytest.raises(ClientError, match="AccessDenied"):
            await asyncio.to_thread(client.describe_secret, SecretId=name)


@pytest.mark.parametrize(
    ("service", "operation", "parameters"),
    [
        ("secretsmanager", "list_secrets", {}),
        ("secretsmanager", "batch_get_secret_value", {"SecretIdList": ["zt-demo/payments/db"]}),
        ("secretsmanager", "put_secret_value", {"SecretId": "zt-demo/orders/db", "SecretString": "{}"}),
        ("secretsmanager", "rotate_secret", {"SecretId": "zt-demo/orders/db"}),
        ("secretsmanager", "put_resource_policy", {"SecretId": "zt-demo/orders/db", "ResourcePolicy": "{}"}),
        ("secretsmanager", "delete_secret", {"SecretId": "zt-demo/orders/db"}),
        ("kms", "encrypt", {"KeyId": "alias/zt-demo-secrets", "Plaintext": b"x"}),
        ("kms", "generate_data_key", {"KeyId": "alias/zt-demo-secrets", "KeySpec": "AES_256"}),
        ("kms", "disable_key", {"KeyId": "alias/zt-demo-secrets"}),
        ("iam", "list_roles", {}),
        ("iam", "create_access_key", {"UserName": "stand-in-administrator"}),
        ("cloudformation", "delete_stack", {"StackName": cloud_module.STACK_NAME}),
        ("sts", "get_session_token", {}),
        ("s3", "list_buckets", {}),
        ("eks", "list_clusters", {}),
        ("lambda", "list_functions", {}),
        ("lambda", "invoke", {"FunctionName": "zt-demo-rotate-orders"}),
        ("lambda", "get_function", {"FunctionName": "zt-demo-rotate-orders"}),
    ],
)
async def test_a_role_may_do_nothing_but_read(
    aws: Aws, service: str, operation: str, parameters: dict[str, Any]
) -> None:
    credentials = await aws.credentials("orders")
    assert await aws.read(credentials, "zt-demo/orders/db")
    call = getattr(aws.client(service, credentials), operation)

    with pytest.raises(ClientError) as refused:
        await asyncio.to_thread(call, **parameters)

    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403)
    assert "AccessDenied" in code(refused.value)


async def test_a_secret_needs_its_key_too(aws: Aws) -> None:
    credentials = await aws.credentials("orders")
    iam = aws.cloud.admin_client("iam")
    role, policy = "zt-demo-orders", "read-own-database-secret"
    document = iam.get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
    reads, decrypts = document["Statement"]
    assert await aws.read(credentials, "zt-demo/orders/db")

    def allow(*statements: Any) -> None:
        text = json.dumps({"Version": "2012-10-17", "Statement": statements})
        iam.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=text)

    elsewhere = json.loads(json.dumps(decrypts))
    elsewhere["Condition"]["StringEquals"]["kms:ViaService"] = "s3.eu-central-1.amazonaws.com"
    another = json.loads(json.dumps(decrypts))
    another["Condition"]["StringEquals"]["kms:EncryptionContext:SecretARN"] = "arn:aws:other"
    try:
        for statements in ([reads], [reads, elsewhere], [reads, another]):
            allow(*statements)
            with pytest.raises(ClientError, match="Access to KMS is not allowed"):
                await aws.read(credentials, "zt-demo/orders/db")
    finally:
        allow(reads, decrypts)
    assert await aws.read(credentials, "zt-demo/orders/db")


async def test_a_disabled_key_closes_the_secrets(aws: Aws) -> None:
    credentials = await aws.credentials("orders")
    kms, key = aws.cloud.admin_client("kms"), aws.cloud.outputs["SecretsKeyArn"]
    kms.disable_key(KeyId=key)
    try:
        with pytest.raises(ClientError, match="DecryptionFailure"):
            await aws.read(credentials, "zt-demo/orders/db")
    finally:
        kms.enable_key(KeyId=key)
    assert await aws.read(credentials, "zt-demo/orders/db")


async def test_even_the_administrator_uses_the_key_only_through_secrets_manager(aws: Aws) -> None:
    kms = aws.cloud.admin_client("kms")
    assert kms.describe_key(KeyId=aws.cloud.outputs["SecretsKeyArn"])

    with pytest.raises(ClientError, match="AccessDenied"):
        kms.encrypt(KeyId=aws.cloud.outputs["SecretsKeyArn"], Plaintext=b"x")


# -- tokens that get nothing


def part(data: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")


def unsigned(claims: Mapping[str, Any]) -> str:
    return f"{part({'alg': 'none', 'kid': 'x'})}.{part(claims)}."


def forged(aws: Aws, claims: Mapping[str, Any]) -> str:
    """Signed by another key that claims the issuer's key ID."""
    header = aws.issuer.token("zt-demo", "orders").partition(".")[0]
    key_id = json.loads(base64.urlsafe_b64decode(header + "=="))["kid"]
    return jwt.encode({"alg": "RS256", "kid": key_id}, dict(claims), RSAKey.generate_key(2048))


def signed_with_public_key(aws: Aws, claims: Mapping[str, Any]) -> str:
    """HS256 with the issuer's public key as the shared secret (RFC 8725 §2.1)."""
    [published, *_] = aws.issuer._documents()["/local/keys"]["keys"]
    secret = RSAKey.import_key(published).as_pem(private=False)
    signed = f"{part({'alg': 'HS256', 'kid': published['kid']})}.{part(claims)}"
    signature = hmac.digest(secret, signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def signed_by_issuer(aws: Aws, claims: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """By the issuer's real key, over a header of our choice: a faulty issuer's, or a library's surprise."""
    key = aws.issuer._key
    assert key is not None
    fields = {"alg": "RS256", "kid": key.kid, **header}
    signed = f"{part({name: value for name, value in fields.items() if value is not None})}.{part(claims)}"
    private: Any = key.private_key
    signature = private.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def with_own_key(aws: Aws, claims: Mapping[str, Any], how: str) -> str:
    """A stranger's signature, with the stranger's key in the header (RFC 8725 §3.10)."""
    key = RSAKey.generate_key(2048)
    own = key.as_dict(private=False) if how == "jwk" else aws.issuer.url + "/own-keys"
    kid = json.loads(base64.urlsafe_b64decode(aws.issuer.token("zt-demo", "orders").partition(".")[0] + "=="))
    header = {"alg": "RS256", "kid": kid["kid"], how: own}
    signed = f"{part(header)}.{part(claims)}"
    private: Any = key.private_key
    signature = private.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def renamed_algorithm(aws: Aws, algorithm: str) -> str:
    head, claims, signature = aws.issuer.token("zt-demo", "orders").split(".")
    header = json.loads(base64.urlsafe_b64decode(head + "=="))
    return f"{part(header | {'alg': algorithm})}.{claims}.{signature}"


def nested() -> str:
    return base64.urlsafe_b64encode(b"[" * 12_000).decode().rstrip("=")


def tampered(aws: Aws) -> str:
    """The token of payments with the claims of orders."""
    head, _, signature = aws.issuer.token("zt-demo", "payments").split(".")
    return f"{head}.{aws.issuer.token('zt-demo', 'orders').split('.')[1]}.{signature}"


TOKENS: dict[str, tuple[Callable[[Aws], str], str]] = {
    "another service account": (lambda a: a.issuer.token("zt-demo", "payments"), "AccessDenied"),
    "another namespace": (lambda a: a.issuer.token("default", "orders"), "AccessDenied"),
    "its own migration": (lambda a: a.issuer.token("zt-demo", "orders-migrate"), "AccessDenied"),
    "subject as a prefix": (lambda a: a.issuer.token("zt-demo", "orders2"), "AccessDenied"),
    "audience of SPIRE": (
        lambda a: a.issuer.token("zt-demo", "orders", audience="spire-server"),
        "InvalidIdentityToken",
    ),
    "two audiences": (
        lambda a: a.issuer.sign(a.claims(aud=["sts.amazonaws.com", "spire-server"])),
        "InvalidIdentityToken",
    ),
    "no audience": (lambda a: a.issuer.sign(a.claims(aud=None)), "InvalidIdentityToken"),
    "empty audience": (lambda a: a.issuer.sign(a.claims(aud=[])), "InvalidIdentityToken"),
    "no subject": (lambda a: a.issuer.sign(a.claims(sub=None)), "InvalidIdentityToken"),
    "subject as a list": (
        lambda a: a.issuer.sign(a.claims(sub=["system:serviceaccount:zt-demo:orders"])),
        "InvalidIdentityToken",
    ),
    "expired": (lambda a: a.issuer.sign(a.claims(exp=int(time.time()) - 60)), "ExpiredTokenException"),
    "yesterday's": (
        lambda a: a.issuer.sign(
            a.claims(iat=int(time.time()) - 90000, nbf=None, exp=int(time.time()) - 86400)
        ),
        "ExpiredTokenException",
    ),
    "not yet valid": (lambda a: a.issuer.sign(a.claims(nbf=int(time.time()) + 300)), "InvalidIdentityToken"),
    "issued in the future": (
        lambda a: a.issuer.sign(a.claims(iat=int(time.time()) + 300, nbf=None)),
        "InvalidIdentityToken",
    ),
    "no expiry": (lambda a: a.issuer.sign(a.claims(exp=None)), "InvalidIdentityToken"),
    "expiry as a text": (lambda a: a.issuer.sign(a.claims(exp="9999999999")), "InvalidIdentityToken"),
    "no time of issue": (lambda a: a.issuer.sign(a.claims(iat=None)), "InvalidIdentityToken"),
    "forged with the same key ID": (lambda a: forged(a, a.claims()), "InvalidIdentityToken"),
    "tampered": (tampered, "InvalidIdentityToken"),
    "algorithm none": (lambda a: unsigned(a.claims()), "InvalidIdentityToken"),
    "algorithm none with a signature": (lambda a: unsigned(a.claims()) + "x", "InvalidIdentityToken"),
    "public key as shared secret": (lambda a: signed_with_public_key(a, a.claims()), "InvalidIdentityToken"),
    "garbage": (lambda _: "garbage", "InvalidIdentityToken"),
    "three parts of garbage": (lambda _: "a.b.c", "InvalidIdentityToken"),
    "oversized": (lambda _: "a" * 19000 + "." + "b" * 2000 + ".c", "InvalidIdentityToken"),
    "unregistered issuer": (
        lambda a: a.issuer.sign(a.claims(iss="https://oidc.evil.example/local")),
        "InvalidIdentityToken",
    ),
    "issuer by http": (
        lambda a: a.issuer.sign(a.claims(iss=a.issuer.url.replace("https", "http"))),
        "InvalidIdentityToken",
    ),
    "expiry that is no number": (lambda a: a.issuer.sign(a.claims(exp=float("nan"))), "InvalidIdentityToken"),
    "expiry that never comes": (lambda a: a.issuer.sign(a.claims(exp=float("inf"))), "InvalidIdentityToken"),
    "expiry as a truth": (lambda a: a.issuer.sign(a.claims(exp=True)), "InvalidIdentityToken"),
    "brings its own key": (lambda a: with_own_key(a, a.claims(), "jwk"), "InvalidIdentityToken"),
    "names a place of its own keys": (lambda a: with_own_key(a, a.claims(), "jku"), "InvalidIdentityToken"),
    "an unknown critical header": (
        lambda a: signed_by_issuer(a, a.claims(), {"crit": ["x"], "x": 1}),
        "InvalidIdentityToken",
    ),
    "a payload that is not encoded": (
        lambda a: signed_by_issuer(a, a.claims(), {"crit": ["b64"], "b64": False}),
        "InvalidIdentityToken",
    ),
    "an unknown key ID": (
        lambda a: signed_by_issuer(a, a.claims(), {"kid": "other"}),
        "InvalidIdentityToken",
    ),
    "no key ID": (lambda a: signed_by_issuer(a, a.claims(), {"kid": None}), "InvalidIdentityToken"),
    "another algorithm than was signed with": (
        lambda a: renamed_algorithm(a, "ES256"),
        "InvalidIdentityToken",
    ),
    "nested beyond reason": (lambda _: f"{part({})}.{nested()}.x", "InvalidIdentityToken"),
    "a second payload": (lambda a: a.issuer.token("zt-demo", "orders") + ".e30.x", "InvalidIdentityToken"),
    "issuer with a final slash": (
        lambda a: a.issuer.sign(a.claims(iss=a.issuer.url + "/")),
        "InvalidIdentityToken",
    ),
}


async def test_the_good_token_by_the_same_means_is_accepted(aws: Aws) -> None:
    assert (await aws.assume(signed_by_issuer(aws, aws.claims(), {})))["Credentials"]
    assert (await aws.assume(aws.issuer.sign(aws.claims())))["Credentials"]
    assert (await aws.assume(aws.issuer.sign(aws.claims(aud="sts.amazonaws.com"))))["Credentials"]


@pytest.mark.parametrize("name", TOKENS)
async def test_a_bad_token_gets_no_credentials(aws: Aws, name: str) -> None:
    make, expected = TOKENS[name]

    with pytest.raises(ClientError) as refused:
        await aws.assume(make(aws))

    assert code(refused.value) == expected


async def test_a_registered_issuer_whose_keys_cannot_be_fetched_gets_nothing(
    aws: Aws, tmp_path: Path
) -> None:
    url = "https://oidc.other.example"
    aws.cloud.admin_client("iam").create_open_id_connect_provider(
        Url=url, ClientIDList=["sts.amazonaws.com"], ThumbprintList=["0" * 40]
    )
    async with OidcIssuer(tmp_path, url=url) as other:
        token = other.token("zt-demo", "orders")

        with pytest.raises(ClientError) as refused:
            await aws.assume(token)

    assert code(refused.value) == "IDPCommunicationError"


@pytest.mark.parametrize(
    "role",
    [
        "arn:aws:iam::111122223333:role/zt-demo-ghost",
        "arn:aws:iam::111122223333:role/some/path/zt-demo-orders",
        "arn:aws:iam::444455556666:role/zt-demo-orders",
    ],
)
async def test_a_role_that_is_not_there_is_not_assumed(aws: Aws, role: str) -> None:
    assert await aws.credentials("orders")

    with pytest.raises(ClientError) as refused:
        await aws.assume(aws.issuer.token("zt-demo", "orders"), RoleArn=role)

    assert code(refused.value) in ("AccessDenied", "InvalidIdentityToken")


@pytest.mark.parametrize(
    "parameters",
    [
        {"DurationSeconds": 899},
        {"DurationSeconds": 3601},
        {"RoleSessionName": "two words"},
        {"ProviderId": "www.amazon.com"},
        {"Policy": "{}"},
        {"PolicyArns": [{"arn": "arn:aws:iam::aws:policy/ReadOnlyAccess"}]},
    ],
)
async def test_session_parameters_are_checked(aws: Aws, parameters: dict[str, Any]) -> None:
    token = aws.issuer.token("zt-demo", "orders")
    assert await aws.assume(token, DurationSeconds=900)

    with pytest.raises(ClientError, match="ValidationError"):
        await aws.assume(token, **parameters)


async def test_a_provider_decides_who_may_be_asked_for_and_by_whom(aws: Aws) -> None:
    """Audiences are the provider's; without the provider the issuer is a stranger."""
    iam = aws.cloud.admin_client("iam")
    arn = f"arn:aws:iam::{aws.cloud.account_id}:oidc-provider/{aws.issuer.host}"
    token = aws.issuer.token("zt-demo", "orders")
    assert await aws.assume(token)

    def register(audience: str) -> None:
        iam.create_open_id_connect_provider(
            Url=aws.issuer.url, ClientIDList=[audience], ThumbprintList=["0" * 40]
        )

    iam.delete_open_id_connect_provider(OpenIDConnectProviderArn=arn)
    try:
        with pytest.raises(ClientError, match="No OpenIDConnect provider"):
            await aws.assume(token)
        register("spire-server")
        with pytest.raises(ClientError, match="Incorrect token audience"):
            await aws.assume(token)
        # The trust policy is the second layer: this audience is the provider's, and not the role's.
        with pytest.raises(ClientError, match="AccessDenied"):
            await aws.assume(aws.issuer.token("zt-demo", "orders", audience="spire-server"))
    finally:
        with suppress(ClientError):
            iam.delete_open_id_connect_provider(OpenIDConnectProviderArn=arn)
        register("sts.amazonaws.com")
    assert await aws.assume(token)


# -- the issuer's keys


async def test_a_new_key_of_the_issuer_is_found_and_a_withdrawn_one_no_longer_signs(aws: Aws) -> None:
    old = aws.issuer.token("zt-demo", "orders")
    await aws.issuer.rotate_key()
    new = aws.issuer.token("zt-demo", "orders")
    await eventually_accepted(aws, new)
    assert await aws.assume(old)

    await aws.issuer.rotate_key(keep_old=False)
    await eventually_accepted(aws, aws.issuer.token("zt-demo", "orders"))

    for withdrawn in (old, new):
        with pytest.raises(ClientError, match="InvalidIdentityToken"):
            await aws.assume(withdrawn)


async def eventually_accepted(aws: Aws, token: str) -> None:
    """Unknown key IDs are looked up at most once a second."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with suppress(ClientError):
            await aws.assume(token)
            return
        await asyncio.sleep(0.1)
    pytest.fail("the new key was not found in time")


# -- other credentials, and other ways in


@pytest.mark.parametrize("key", ["test", "111122223333", "000000000000", "AKIAIOSFODNN7EXAMPLE"])
@pytest.mark.parametrize("service", ["sts", "secretsmanager"])
async def test_a_static_key_is_nobody(aws: Aws, key: str, service: str) -> None:
    credentials = await aws.credentials("orders")
    static = {"AccessKeyId": key, "SecretAccessKey": "test"}

    def call(keys: Mapping[str, str]) -> Any:
        client = aws.client(service, keys)
        return (
            client.get_caller_identity()
            if service == "sts"
            else client.get_secret_value(SecretId="zt-demo/orders/db")
        )

    assert await asyncio.to_thread(call, credentials)
    with pytest.raises(ClientError) as refused:
        await asyncio.to_thread(call, static)

    assert code(refused.value) in ("InvalidClientTokenId", "UnrecognizedClientException")


async def test_the_administrators_key_needs_its_secret(aws: Aws) -> None:
    admin = aws.cloud.admin_client("sts")
    assert admin.get_caller_identity()["Arn"].endswith(":user/stand-in-administrator")
    key = admin._request_signer._credentials.access_key

    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        await asyncio.to_thread(
            aws.client("sts", {"AccessKeyId": key, "SecretAccessKey": "x" * 40}).get_caller_identity
        )


@pytest.mark.parametrize("missing", ["SessionToken", "SecretAccessKey"])
async def test_session_credentials_work_only_whole(aws: Aws, missing: str) -> None:
    credentials = await aws.credentials("orders")
    assert await aws.read(credentials, "zt-demo/orders/db")

    broken = {**credentials, missing: "x" * 40}
    with pytest.raises(ClientError):
        await aws.read(broken, "zt-demo/orders/db")


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "body"),
    [
        ("POST", "/_ministack/reset", {}, ""),
        ("POST", "/_ministack/config", {"Content-Type": "application/json"}, "{}"),
        ("GET", "/_ministack/health", {}, ""),
        ("GET", "/_localstack/health", {}, ""),
        ("POST", "//_ministack/reset", {}, ""),
        ("POST", "/%5fministack/reset", {}, ""),
        ("GET", "/", {}, ""),
        ("GET", "/some-bucket", {}, ""),
        ("GET", "/clusters", {}, ""),
        ("GET", "/latest/meta-data/iam/security-credentials/", {}, ""),
        ("OPTIONS", "/", {}, ""),
        ("POST", "/?Action=GetCallerIdentity&Version=2011-06-15", FORM, ""),
        ("POST", "/", FORM, "Action=GetCallerIdentity&Version=2011-06-15"),
        ("POST", "/", FORM, "Action=AssumeRole&Version=2011-06-15"),
        ("POST", "/", FORM, "Action=ListRoles&Version=2010-05-08"),
        ("POST", "/", FORM, "Action=AssumeRoleWithWebIdentity&Action=ListRoles"),
        ("POST", "/", {**FORM, "Host": "evil.example"}, "Action=AssumeRoleWithWebIdentity"),
        ("POST", "/", {"X-Amz-Target": "secretsmanager.GetSecretValue"}, '{"SecretId":"zt-demo/orders/db"}'),
        (
            "POST",
            "/",
            {**FORM, "X-Amz-Target": "secretsmanager.GetSecretValue"},
            "Action=AssumeRoleWithWebIdentity",
        ),
        ("POST", "/", {**FORM, "Content-Encoding": "gzip"}, "Action=AssumeRoleWithWebIdentity"),
        ("POST", "/2015-03-31/functions", {}, "{}"),
        ("POST", "/2015-03-31/functions/zt-demo-rotate-orders/invocations", {}, "{}"),
        ("POST", "/2015-03-31/functions/zt-demo-rotate-orders/invocations", FORM, "Action=GetCallerIdentity"),
        (
            "POST",
            "/2015-03-31/functions/x/invocations",
            FORM,
            "Action=AssumeRoleWithWebIdentity&Version=2011-06-15",
        ),
        ("GET", "/_ministack/lambda-code/zt-demo-rotate-orders", {}, ""),
    ],
)
async def test_the_emulators_side_doors_are_shut(
    aws: Aws, method: str, path: str, headers: dict[str, str], body: str
) -> None:
    status, text = await aws.raw(method, path, headers, body)

    assert status in (400, 403), text
    assert aws.cloud.admin_client("secretsmanager").describe_secret(SecretId="zt-demo/orders/db")


async def test_an_action_cannot_be_authorized_as_one_and_done_as_another(aws: Aws) -> None:
    """The emulator would authorize the action in the query, and do the one in the target header."""
    credentials = await aws.credentials("orders")
    client = aws.client("secretsmanager", credentials)

    def describe_and_get(params: dict[str, Any], **_: Any) -> None:
        params["url"] += "?Action=DescribeSecret"

    assert await asyncio.to_thread(client.get_secret_value, SecretId="zt-demo/orders/db")
    client.meta.events.register("before-call.secretsmanager.GetSecretValue", describe_and_get)

    with pytest.raises(ClientError, match="AccessDenied"):
        await asyncio.to_thread(client.get_secret_value, SecretId="zt-demo/orders/db")


async def test_a_body_that_was_not_signed_is_refused(aws: Aws) -> None:
    credentials = await aws.credentials("orders")
    client = aws.client("secretsmanager", credentials)

    def swap(request: Any, **_: Any) -> None:
        request.body = request.body.replace(b"orders", b"orderz")

    client.meta.events.register("before-send.secretsmanager.GetSecretValue", swap)

    with pytest.raises(ClientError, match="InvalidSignatureException"):
        await asyncio.to_thread(client.get_secret_value, SecretId="zt-demo/orders/db")


def signed(
    aws: Aws,
    credentials: Mapping[str, str],
    service: str,
    body: str,
    headers: Mapping[str, str],
    at: datetime | None = None,
) -> dict[str, str]:
    """The headers of a request that is signed as one for `service`, at that time."""
    keys = Credentials(
        credentials["AccessKeyId"], credentials["SecretAccessKey"], credentials.get("SessionToken")
    )
    request = AWSRequest(
        "POST", f"http://127.0.0.1:{aws.port}/", headers=dict(headers), data=body.encode(), params={}
    )
    signer = SigV4Auth(keys, service, aws.cloud.region)
    request.context["timestamp"] = (at or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    signer._modify_request_before_signing(request)
    request.headers["Host"] = f"127.0.0.1:{aws.port}"
    canonical = signer.canonical_request(request)
    signature = signer.signature(signer.string_to_sign(request, canonical), request)
    signer._inject_signature_to_request(request, signature)
    return {name: str(value) for name, value in request.headers.items()}


JSON = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "secretsmanager.GetSecretValue"}
READ = '{"SecretId":"zt-demo/orders/db"}'


@pytest.mark.parametrize("minutes", [-20, 20, -60 * 24, 60 * 24])
async def test_a_signed_request_cannot_be_used_at_another_time(aws: Aws, minutes: int) -> None:
    """What somebody overhears on the way is worth nothing after a quarter of an hour."""
    credentials = await aws.credentials("orders")
    now, later = signed(aws, credentials, "secretsmanager", READ, JSON), datetime.now(UTC)
    assert (await aws.raw("POST", "/", now, READ))[0] == 200

    old = signed(aws, credentials, "secretsmanager", READ, JSON, later + timedelta(minutes=minutes))
    status, text = await aws.raw("POST", "/", old, READ)

    assert status in (400, 403)
    assert "SecretString" not in text
    assert "Signature" in text


@pytest.mark.parametrize("signed_for", ["sts", "iam", "cloudformation", "kms", "lambda", "s3", "rds"])
async def test_a_signature_for_one_service_is_good_for_no_other(aws: Aws, signed_for: str) -> None:
    credentials = await aws.credentials("orders")
    status, _ = await aws.raw("POST", "/", signed(aws, credentials, "secretsmanager", READ, JSON), READ)
    assert status == 200

    status, text = await aws.raw("POST", "/", signed(aws, credentials, signed_for, READ, JSON), READ)

    assert status in (400, 403)
    assert "SecretString" not in text


@pytest.mark.parametrize("signed_for", ["iam", "cloudformation", "kms", "secretsmanager"])
@pytest.mark.parametrize(
    "action", ["GetSessionToken", "AssumeRole", "AssumeRoleWithWebIdentity", "ListRoles"]
)
async def test_no_action_of_a_service_is_reached_through_another(
    aws: Aws, signed_for: str, action: str
) -> None:
    credentials = await aws.credentials("orders")
    body = urlencode(
        {
            "Action": action,
            "Version": "2011-06-15",
            "RoleArn": aws.cloud.role_arn("payments"),
            "RoleSessionName": "test",
            "WebIdentityToken": aws.issuer.token("zt-demo", "orders"),
        }
    )
    own = "Action=GetCallerIdentity&Version=2011-06-15"
    assert (await aws.raw("POST", "/", signed(aws, credentials, "sts", own, FORM), own))[0] == 200

    status, text = await aws.raw("POST", "/", signed(aws, credentials, signed_for, body, FORM), body)

    assert status in (400, 403), text
    assert "SecretAccessKey" not in text


async def gate_program(program: str, stderr: int) -> asyncio.subprocess.Process:
    """A gate that starts by `program`; it reads its configuration from standard input."""
    python = await ensure_environment(ENVIRONMENT, print)
    return await asyncio.create_subprocess_exec(
        python,
        "-I",
        "-B",
        "-c",
        program,
        str(Path(cloud_module.__file__).parent),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
    )


async def test_a_session_that_has_ended_reads_nothing(aws: Aws, tmp_path: Path) -> None:
    """In a gate of its own, that hands out sessions of two seconds."""
    program = (
        "import sys; sys.path.append(sys.argv.pop(1)); import gate.emulator; gate.emulator.MIN_DURATION = 1\n"
        "from gate.__main__ import main; sys.exit(main())"
    )
    port = free_port()
    configuration = aws.cloud._configuration() | {
        "port": port,
        "hosts": [f"127.0.0.1:{port}"],
        "scratch": str(tmp_path),
    }
    process = await gate_program(program, stderr=asyncio.subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(configuration).encode() + b"\n")
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 60)
        admin = {
            "AccessKeyId": configuration["admin"]["access_key_id"],
            "SecretAccessKey": configuration["admin"]["secret_access_key"],
        }
        role = f"arn:aws:iam::{aws.cloud.account_id}:role/orders"
        other = Aws(
            SimpleNamespace(
                endpoint_url=f"http://127.0.0.1:{port}",
                region=aws.cloud.region,
                role_arn=lambda _: role,
            ),
            aws.issuer,
            aws.log,
            port,
        )
        await asyncio.to_thread(make_role_and_secret, other, admin)
        answer = await other.assume(aws.issuer.token("zt-demo", "orders"), DurationSeconds=2)
        credentials = answer["Credentials"]
        assert await other.read(credentials, "it")

        async def outcome() -> str:
            try:
                await other.read(credentials, "it")
            except ClientError as refused:
                return code(refused)
            return "read"

        while (found := await outcome()) == "read":
            assert time.time() < credentials["Expiration"].timestamp() + 5, "the session did not end"
            await asyncio.sleep(0.05)

        assert found == "ExpiredTokenException"
    finally:
        process.terminate()
        await process.wait()


def make_role_and_secret(aws: Aws, admin: Mapping[str, str]) -> None:
    iam = aws.client("iam", admin)
    provider = iam.create_open_id_connect_provider(
        Url=aws.issuer.url, ClientIDList=["sts.amazonaws.com"], ThumbprintList=["0" * 40]
    )["OpenIDConnectProviderArn"]
    trust = {
        "Effect": "Allow",
        "Action": "sts:AssumeRoleWithWebIdentity",
        "Principal": {"Federated": provider},
        "Condition": {"StringEquals": {f"{aws.issuer.host}:sub": "system:serviceaccount:zt-demo:orders"}},
    }
    reads = {"Effect": "Allow", "Action": "secretsmanager:GetSecretValue", "Resource": "*"}
    iam.create_role(
        RoleName="orders",
        AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [trust]}),
    )
    iam.put_role_policy(
        RoleName="orders",
        PolicyName="reads",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [reads]}),
    )
    aws.client("secretsmanager", admin).create_secret(Name="it", SecretString="{}")


async def test_it_listens_on_the_loopback_address_only_and_on_one_port(aws: Aws) -> None:
    assert aws.cloud.pid is not None
    sockets = {
        os.readlink(entry) for entry in Path(f"/proc/{aws.cloud.pid}/fd").iterdir() if entry.is_symlink()
    }
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in sockets and fields[3] in ("0A", "07"):
                listening.append(fields[1])

    assert listening == [f"0100007F:{aws.port:04X}"]


# -- what it keeps to itself


async def test_no_secret_is_on_its_command_line_in_its_environment_or_log(aws: Aws) -> None:
    credentials = await aws.credentials("orders")
    password = json.loads((await aws.read(credentials, "zt-demo/orders/db"))["SecretString"])["password"]
    with pytest.raises(ClientError):
        await aws.assume(forged(aws, aws.claims()))
    admin = aws.cloud.admin_client("sts")._request_signer._credentials
    process = Path(f"/proc/{aws.cloud.pid}")
    shown = (process / "cmdline").read_text() + (process / "environ").read_text() + aws.log.read_text()

    for hidden in (password, credentials["SecretAccessKey"], admin.access_key, admin.secret_key, "eyJ"):
        assert hidden not in shown


async def test_the_log_is_private(aws: Aws) -> None:
    assert aws.log.stat().st_mode & 0o077 == 0


# -- with the library


@pytest_asyncio.fixture(loop_scope="module")
async def token_file(aws: Aws, tmp_path: Path) -> AsyncIterator[TokenFile]:
    async with TokenFile(tmp_path / "orders", aws.issuer, service_account="orders") as file:
        yield file


def identity(aws: Aws, file: TokenFile, account: str = "orders") -> WebIdentity:
    return WebIdentity.from_env(
        {
            "AWS_ROLE_ARN": aws.cloud.role_arn(account),
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(file.path),
            "AWS_REGION": aws.cloud.region,
            "AWS_ENDPOINT_URL": aws.cloud.endpoint_url,
        }
    )


@pytest.fixture
def secret(aws: Aws, token_file: TokenFile) -> Iterator[RotatingSecret]:
    secret = RotatingSecret(
        "zt-demo/orders/db", identity(aws, token_file), endpoint_url=aws.cloud.endpoint_url, max_age=3600
    )
    yield secret
    secret.close()


async def test_a_rotating_secret_follows_the_version_in_use(aws: Aws, secret: RotatingSecret) -> None:
    first = await secret.get()
    value = await aws.cloud.secret_value("zt-demo/orders/db")
    assert dict(first.fields) == {name: str(item) for name, item in value.items()}
    admin = aws.cloud.admin_client("secretsmanager")
    admin.put_secret_value(
        SecretId="zt-demo/orders/db",
        SecretString=json.dumps(value | {"password": "pending"}),
        ClientRequestToken="0" * 32,
        VersionStages=["AWSPENDING"],
    )
    assert (await secret.refresh()).version_id == first.version_id

    admin.update_secret_version_stage(
        SecretId="zt-demo/orders/db",
        VersionStage="AWSCURRENT",
        MoveToVersionId="0" * 32,
        RemoveFromVersionId=first.version_id,
    )

    second = await secret.refresh()
    assert second.version_id == "0" * 32
    assert second["password"] == "pending"


async def test_the_library_says_which_trust_was_missing(aws: Aws, token_file: TokenFile) -> None:
    wrong = RotatingSecret(
        "zt-demo/payments/db", identity(aws, token_file, "payments"), endpoint_url=aws.cloud.endpoint_url
    )

    with pytest.raises(CredentialsRefused) as refused:
        await wrong.get()
    wrong.close()

    assert refused.value.reason is Reason.WEB_IDENTITY_REFUSED
    assert "role/zt-demo-payments" in refused.value.detail
    assert "system:serviceaccount:zt-demo:orders" in refused.value.detail
    assert "eyJ" not in refused.value.detail


async def test_the_library_says_which_secret_was_denied(aws: Aws, token_file: TokenFile) -> None:
    other = RotatingSecret(
        "zt-demo/payments/db", identity(aws, token_file), endpoint_url=aws.cloud.endpoint_url
    )

    with pytest.raises(SecretError) as refused:
        await other.get()
    other.close()

    assert refused.value.reason is Reason.SECRET_DENIED


async def test_a_token_file_is_exchanged_as_the_kubelet_does_it(token_file: TokenFile) -> None:
    before, directory = token_file.path.read_text(), os.readlink(token_file.directory / "..data")
    token_file.write()

    assert token_file.path.read_text() != before
    assert os.readlink(token_file.directory / "..data") != directory
    assert not (token_file.directory / directory).exists()
    assert token_file.path.stat().st_mode & 0o777 == 0o600
    assert token_file.directory.stat().st_mode & 0o777 == 0o700
    assert sorted(entry.name for entry in token_file.directory.iterdir())[-1] == "token"


async def test_a_token_is_replaced_before_it_expires_and_removed_in_the_end(aws: Aws, tmp_path: Path) -> None:
    async with TokenFile(tmp_path / "quick", aws.issuer, service_account="orders", lifetime=4.0) as file:
        before, began = file.path.read_text(), time.monotonic()
        while file.path.read_text() == before:
            assert time.monotonic() - began < 4.0, "the token expired"
            await asyncio.sleep(0.02)

    assert list(file.directory.iterdir()) == []


# -- starting and ending


async def test_a_port_in_use_is_said(aws: Aws, tmp_path: Path) -> None:
    second = LocalCloud(
        tmp_path / "cloud",
        port=aws.port,
        issuer=aws.issuer,
        log_file=tmp_path / "aws.log",
        databases=DATABASES,
        environment_dir=ENVIRONMENT,
    )

    with pytest.raises(PortInUse, match=str(aws.port)):
        await second.start()

    assert second.pid is None


async def test_a_stack_that_fails_tells_the_reasons(aws: Aws, tmp_path: Path) -> None:
    template = tmp_path / "broken.yaml"
    template.write_text(
        cloud_module.default_template().read_text().replace("AWS::KMS::Alias", "AWS::No::SuchThing")
    )
    broken = LocalCloud(
        tmp_path / "cloud",
        port=free_port(),
        issuer=aws.issuer,
        log_file=tmp_path / "aws.log",
        databases=DATABASES,
        environment_dir=ENVIRONMENT,
        template=template,
    )

    with pytest.raises(StackFailed, match="AWS::No::SuchThing"):
        await broken.start()

    assert broken.pid is None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("services.sts", "_web_identity_trust_denied"),
        ("core.lambda_runtime", "execution_credentials"),
        ("services.lambda_svc", "_fetch_code_from_s3"),
        ("core.iam_evaluator", "is_root_access_key"),
        ("services.cloudformation.provisioners", "_sm_secret_string"),
    ],
)
async def test_the_gate_does_not_start_when_a_name_it_leans_on_is_gone(
    aws: Aws, tmp_path: Path, module: str, name: str
) -> None:
    program = (
        "import os, sys; os.environ['AUTH'] = 'true'; os.environ['SERVICES'] = "
        "'sts,iam,cloudformation,kms,secretsmanager,lambda'\n"
        f"import ministack.app, ministack.{module} as module; del module.{name}\n"
        "sys.path.append(sys.argv.pop(1)); from gate.__main__ import main; sys.exit(main())"
    )
    configuration = aws.cloud._configuration() | {"port": free_port(), "scratch": str(tmp_path)}
    process = await gate_program(program, stderr=asyncio.subprocess.PIPE)
    output, errors = await asyncio.wait_for(
        process.communicate(json.dumps(configuration).encode() + b"\n"), 60
    )

    assert output == b""
    assert process.returncode == EX_UNAVAILABLE, errors
    assert name.encode() in errors


async def test_it_starts_empty_each_time_and_leaves_nothing_running(aws: Aws, tmp_path: Path) -> None:
    cloud = LocalCloud(
        tmp_path / "cloud",
        port=free_port(),
        issuer=aws.issuer,
        log_file=tmp_path / "aws.log",
        databases=DATABASES,
        environment_dir=ENVIRONMENT,
    )
    passwords, pids = [], []
    for _ in range(2):
        async with cloud:
            passwords.append((await cloud.secret_value("zt-demo/orders/db"))["password"])
            pids.append(cloud.pid)
        assert not Path(f"/proc/{pids[-1]}").exists()

    assert passwords[0] != passwords[1]
    assert list((tmp_path / "cloud").iterdir()) == []


async def test_it_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from ztdev.aws.cloud import DatabaseAddress, LocalCloud
from ztdev.aws.issuer import OidcIssuer

async def main():
    state = Path({str(tmp_path)!r})
    databases = {{name: DatabaseAddress("127.0.0.1") for name in ("orders", "payments")}}
    async with OidcIssuer(state / "issuer") as issuer:
        cloud = LocalCloud(state / "cloud", port={free_port()}, issuer=issuer, log_file=state / "aws.log",
                           databases=databases, environment_dir=Path({str(ENVIRONMENT)!r}))
        async with cloud:
            print(cloud.pid, flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    child = int(await asyncio.wait_for(supervisor.stdout.readline(), 60))
    assert Path(f"/proc/{child}").exists()

    supervisor.send_signal(signal.SIGKILL)
    await supervisor.wait()

    deadline = time.monotonic() + 10
    while running(child):
        assert time.monotonic() < deadline, "the gate outlived its supervisor"
        await asyncio.sleep(0.05)


def running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


# -- without the gate


async def test_without_the_gate_a_forged_token_and_a_static_key_are_let_in(aws: Aws, tmp_path: Path) -> None:
    """What the gate is for: the emulator alone takes what the tests above see refused."""
    python, port = await ensure_environment(ENVIRONMENT, print), free_port()
    process = await asyncio.create_subprocess_exec(
        python,
        "-I",
        "-B",
        "-m",
        "ministack.app",
        env={
            "AUTH": "true",
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "IOT_MTLS_ENABLED": "0",
            "DOCKER_HOST": f"unix://{tmp_path}/none",
            "TMPDIR": str(tmp_path),
            "LOG_LEVEL": "ERROR",
        },
        cwd=tmp_path,
    )
    alone = Aws(
        SimpleNamespace(endpoint_url=f"http://127.0.0.1:{port}", region="eu-central-1", role_arn=str),
        aws.issuer,
        aws.log,
        port,
    )
    try:
        await answers(port)
        iam = alone.client("iam", {"AccessKeyId": "test", "SecretAccessKey": "anything"})
        document = {
            "Version": "2012-10-17",
            "Statement": {
                "Effect": "Allow",
                "Action": "sts:AssumeRoleWithWebIdentity",
                "Principal": {"Federated": f"arn:aws:iam::000000000000:oidc-provider/{aws.issuer.host}"},
                "Condition": {
                    "StringEquals": {f"{aws.issuer.host}:sub": "system:serviceaccount:zt-demo:orders"}
                },
            },
        }
        role = await asyncio.to_thread(
            iam.create_role, RoleName="orders", AssumeRolePolicyDocument=json.dumps(document)
        )
        answer = await alone.assume(
            forged(aws, aws.claims(aud="sts.amazonaws.com", exp=1)), RoleArn=role["Role"]["Arn"]
        )
    finally:
        process.terminate()
        await process.wait()

    assert answer["Credentials"]


async def answers(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        else:
            return


# -- the environment it runs in


def fake_uv(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def test_an_environment_that_cannot_be_downloaded_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = fake_uv(
        tmp_path / "uv", 'if [ "$1" = venv ]; then exit 0; fi; echo "error: no route to host" >&2; exit 2'
    )
    monkeypatch.setenv("UV", str(uv))
    steps: list[str] = []

    with pytest.raises(StackError, match=r"(?s)network.*HTTPS_PROXY.*no route to host"):
        await ensure_environment(tmp_path / "env", steps.append)

    assert steps


async def test_a_missing_uv_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", str(tmp_path / "no-such-uv"))

    with pytest.raises(ProgramMissing, match="no-such-uv"):
        await ensure_environment(tmp_path / "env", print)


async def test_a_directory_that_is_no_environment_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV", str(fake_uv(tmp_path / "uv", "exit 0")))
    precious = tmp_path / "env" / "file"
    precious.parent.mkdir()
    precious.write_text("x")

    with pytest.raises(StackError, match="in the way"):
        await ensure_environment(precious.parent, print)

    assert precious.exists()
