"""`ztmtls.secrets` against a small stand-in for AWS that can be slow, throttle, deny and count."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from prometheus_client import CollectorRegistry

from tests.processes import environment as own_environment
from ztmtls import aws_clients, aws_credentials, secrets
from ztmtls.audit import AuditLog
from ztmtls.metrics import Collector
from ztmtls.reasons import Reason
from ztmtls.secrets import (
    CredentialsRefused,
    JwtSvidIdentity,
    PodIdentity,
    RotatingSecret,
    SecretError,
    WebIdentity,
    identity_from_env,
)
from ztmtls.testing import CertificateAuthority, WorkloadApi

ROLE = "arn:aws:iam::111122223333:role/zt-demo-orders"
SECRET_ID = "zt-demo/orders/db"
PASSWORD = "Zz-CANARY-%40/:#"
SESSION_TOKEN = "session-CANARY-token"
SECRET_KEY = "secret-CANARY-key"
CREATED = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def token(subject: str = "system:serviceaccount:zt-demo:orders", number: int = 0) -> str:
    """A web identity token as far as the stand-in looks at it. Its signature is the canary."""

    def part(data: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")

    claims = {
        "iss": "https://oidc.zt.example/local",
        "sub": subject,
        "aud": ["sts.amazonaws.com"],
        "n": number,
    }
    return f"{part({'alg': 'RS256'})}.{part(claims)}.CANARYsignature"


class Fault(Exception):
    """The stand-in answers this error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


def nothing() -> None:
    pass


@dataclass
class Aws:
    """STS, Secrets Manager, the EKS Pod Identity Agent and an instance's metadata service, with knobs and
    counters."""

    version: str = "v1"
    text: str | None = field(
        default_factory=lambda: json.dumps({"username": "orders_app", "password": PASSWORD, "port": 5432})
    )
    stages: tuple[str, ...] = ("AWSCURRENT",)
    lifetime: float = 3600.0
    before_sts: Callable[[], object] = nothing
    before_agent: Callable[[], object] = nothing
    before_secret: Callable[[], object] = nothing
    before_describe: Callable[[], object] = nothing
    rotation: dict[str, Any] = field(default_factory=dict)
    descriptions: int = 0
    tokens: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    agent_tokens: list[str] = field(default_factory=list)
    metadata_calls: int = 0
    url: str = ""

    def post(self, headers: Any, body: bytes) -> tuple[str, str]:
        if "X-Amz-Target" in headers:
            act = {
                "secretsmanager.GetSecretValue": self._get_secret_value,
                "secretsmanager.DescribeSecret": self._describe_secret,
            }[headers["X-Amz-Target"]]
            return "application/x-amz-json-1.1", act(headers, json.loads(body))
        return "text/xml", self._assume(parse_qs(body.decode()))

    def _assume(self, form: dict[str, list[str]]) -> str:
        assert form["Action"] == ["AssumeRoleWithWebIdentity"]
        assert form["RoleArn"] == [ROLE]
        self.tokens.append(form["WebIdentityToken"][0])
        self.before_sts()
        expires = (datetime.now(UTC) + timedelta(seconds=self.lifetime)).isoformat()
        return (
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>ASIAISSUED{len(self.tokens):06}</AccessKeyId>"
            f"<SecretAccessKey>{SECRET_KEY}</SecretAccessKey><SessionToken>{SESSION_TOKEN}</SessionToken>"
            f"<Expiration>{expires}</Expiration></Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )

    def agent(self, headers: Any) -> str:
        """What the agent answers, as its API says: no role in it."""
        self.agent_tokens.append(headers["Authorization"])
        self.before_agent()
        return json.dumps(
            {
                "AccessKeyId": f"ASIAAGENT{len(self.agent_tokens):06}",
                "SecretAccessKey": SECRET_KEY,
                "Token": SESSION_TOKEN,
                "AccountId": "111122223333",
                "Expiration": (datetime.now(UTC) + timedelta(seconds=self.lifetime))
                .isoformat()
                .replace("+00:00", "Z"),
            }
        )

    def _get_secret_value(self, headers: Any, request: dict[str, Any]) -> str:
        found = re.search(r"Credential=([^/]+)/", headers["Authorization"])
        assert found is not None
        assert headers["X-Amz-Security-Token"] == SESSION_TOKEN
        assert request == {"SecretId": SECRET_ID, "VersionStage": "AWSCURRENT"}
        self.keys.append(found[1])
        self.times.append(time.monotonic())
        answer: dict[str, Any] = {
            "Name": SECRET_ID,
            "VersionId": self.version,
            "VersionStages": self.stages,
            "CreatedDate": CREATED.timestamp(),
        }
        if self.text is None:
            answer["SecretBinary"] = base64.b64encode(b"\x00\x01").decode()
        else:
            answer["SecretString"] = self.text
        self.before_secret()
        return json.dumps(answer)

    def _describe_secret(self, headers: Any, request: dict[str, Any]) -> str:
        assert request == {"SecretId": SECRET_ID}
        self.descriptions += 1
        self.before_describe()
        return json.dumps({"Name": SECRET_ID} | self.rotation)

    def password_is(self, password: str, version: str) -> None:
        self.text = json.dumps({"username": "orders_app", "password": password})
        self.version = version


@pytest.fixture
def aws() -> Iterator[Aws]:
    state = Aws()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status = 200
            try:
                kind, text = state.post(self.headers, body)
            except Fault as fault:
                status = fault.status
                if "X-Amz-Target" in self.headers:
                    kind, text = (
                        "application/x-amz-json-1.1",
                        json.dumps({"__type": fault.code, "message": "no"}),
                    )
                else:
                    kind = "text/xml"
                    text = f"<ErrorResponse><Error><Code>{fault.code}</Code></Error></ErrorResponse>"
            self._send(status, kind, text)

        def do_GET(self) -> None:
            if self.path == "/v1/credentials":
                try:
                    self._send(200, "application/json", state.agent(self.headers))
                except Fault as fault:
                    self._send(fault.status, "text/plain", fault.code)
                return
            state.metadata_calls += 1
            self._send(200, "text/plain", "a-broad-role")

        def do_PUT(self) -> None:
            self.do_GET()

        def _send(self, status: int, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(status)
            if status == 307:
                self.send_header("Location", text)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client that gave up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's pauses, shortened; and no variable of this machine that speaks to an AWS SDK."""
    monkeypatch.setattr(secrets, "MIN_INTERVAL", 0.0)
    monkeypatch.setattr(secrets, "FIRST_RETRY", 0.05)
    monkeypatch.setattr(secrets, "LAST_RETRY", 0.1)
    monkeypatch.setattr(aws_clients, "ATTEMPTS", 1)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(token())
    return path


@pytest.fixture
def identity(aws: Aws, token_file: Path) -> WebIdentity:
    return WebIdentity(ROLE, token_file, "eu-central-1", "orders-pod", aws.url)


@pytest.fixture
def pod(aws: Aws, token_file: Path) -> PodIdentity:
    return PodIdentity(
        "127.0.0.1", urlsplit(aws.url).port or 0, "/v1/credentials", token_file, "eu-central-1"
    )


@pytest.fixture
def make(aws: Aws, identity: WebIdentity) -> Iterator[Callable[..., RotatingSecret]]:
    made: list[RotatingSecret] = []

    def factory(who: Any = identity, **options: Any) -> RotatingSecret:
        made.append(RotatingSecret(SECRET_ID, who, endpoint_url=aws.url, **options))
        return made[-1]

    yield factory
    for secret in made:
        secret.close()


async def eventually(condition: Callable[[], bool], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)


def raises(fault: Fault) -> Callable[[], None]:
    def act() -> None:
        raise fault

    return act


# -- who we are (C13, C45, C51, C52)


def irsa(token_file: Path, **more: str) -> dict[str, str]:
    return {
        "AWS_ROLE_ARN": ROLE,
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token_file),
        "AWS_REGION": "eu-central-1",
        **more,
    }


def test_web_identity_comes_from_the_variables_of_irsa(token_file: Path) -> None:
    identity = WebIdentity.from_env(
        irsa(token_file, AWS_ENDPOINT_URL="http://127.0.0.1:1", HOSTNAME="orders-7d4")
    )

    assert identity == WebIdentity(ROLE, token_file, "eu-central-1", "orders-7d4", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    "name",
    [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    ],
)
@pytest.mark.parametrize("offered", ["IRSA", "EKS Pod Identity"])
def test_other_credentials_beside_the_identity_are_refused(token_file: Path, name: str, offered: str) -> None:
    environment = irsa(token_file) if offered == "IRSA" else pod_identity(token_file)
    assert identity_from_env(environment)

    with pytest.raises(CredentialsRefused, match=f"{name} is set.*Unset it") as refused:
        identity_from_env(environment | {name: "CANARY"})

    assert refused.value.reason is Reason.WEB_IDENTITY_CONFLICT
    assert "CANARY" not in str(refused.value)


# -- JWT-SVID


SPIFFE_ID = "spiffe://zt.example/ns/zt-demo/sa/orders"


def jwt_svid(endpoint: str, **more: str) -> dict[str, str]:
    return {
        "AWS_ROLE_ARN": ROLE,
        "AWS_WEB_IDENTITY_TOKEN_FROM": "workload-api",
        "SPIFFE_ENDPOINT_SOCKET": endpoint,
        "AWS_REGION": "eu-central-1",
        **more,
    }


def test_a_jwt_svid_is_taken_when_it_is_asked_for() -> None:
    identity = identity_from_env(
        jwt_svid(
            "unix:/run/agent.sock", SPIFFE_ID=SPIFFE_ID, AWS_ENDPOINT_URL="http://127.0.0.1:1", HOSTNAME="pod"
        )
    )

    assert identity == JwtSvidIdentity(
        ROLE, "unix:/run/agent.sock", SPIFFE_ID, "eu-central-1", "pod", "http://127.0.0.1:1"
    )


@pytest.mark.parametrize(
    ("more", "reason", "names"),
    [
        ({"AWS_WEB_IDENTITY_TOKEN_FROM": "file"}, Reason.WEB_IDENTITY_MISSING, "TOKEN_FROM is file"),
        ({"AWS_ROLE_ARN": ""}, Reason.WEB_IDENTITY_MISSING, "AWS_ROLE_ARN"),
        ({"AWS_ROLE_ARN": "orders"}, Reason.WEB_IDENTITY_MISSING, "not the ARN"),
        ({"SPIFFE_ENDPOINT_SOCKET": ""}, Reason.WEB_IDENTITY_MISSING, "SPIFFE_ENDPOINT_SOCKET"),
        ({"SPIFFE_ENDPOINT_SOCKET": "/run/x"}, Reason.WEB_IDENTITY_MISSING, "must begin with"),
        (
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/t"},
            Reason.WEB_IDENTITY_CONFLICT,
            "AWS_WEB_IDENTITY_TOKEN_FILE is set",
        ),
        ({"AWS_ACCESS_KEY_ID": "CANARY"}, Reason.WEB_IDENTITY_CONFLICT, "AWS_ACCESS_KEY_ID is set"),
    ],
)
def test_a_jwt_svid_half_asked_for_is_refused(more: dict[str, str], reason: Reason, names: str) -> None:
    assert identity_from_env(jwt_svid("unix:/run/agent.sock"))

    with pytest.raises(CredentialsRefused, match=names) as refused:
        identity_from_env(jwt_svid("unix:/run/agent.sock", **more))

    assert refused.value.reason is reason
    assert "CANARY" not in str(refused.value)


async def test_a_jwt_svid_for_sts_reads_the_secret(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    async with WorkloadApi() as api:
        workload = await api.add_workload("orders", SPIFFE_ID, ca=CertificateAuthority("zt.example"))
        workload.allow(pid=os.getpid())
        identity = identity_from_env(
            jwt_svid(workload.endpoint, SPIFFE_ID=SPIFFE_ID, AWS_ENDPOINT_URL=aws.url)
        )
        secret = make(identity)
        assert (await secret.get()).version_id == "v1"

        claims = jwt.decode(aws.tokens[-1], options={"verify_signature": False})
        assert claims["sub"] == SPIFFE_ID
        assert claims["aud"] in ("sts.amazonaws.com", ["sts.amazonaws.com"])
        assert secret.status()["source"] == "JWT-SVID"

        await workload.disallow(pid=os.getpid())
        with pytest.raises(SecretError) as refused:
            await make(identity).get()
        assert refused.value.reason is Reason.WEB_IDENTITY_MISSING

    with pytest.raises(SecretError, match="no JWT-SVID") as refused:
        await make(identity).get()
    assert refused.value.reason is Reason.SECRET_UNAVAILABLE


async def test_sts_that_refuses_a_jwt_svid_says_whose_it_is(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    aws.before_sts = raises(Fault(400, "InvalidIdentityToken"))
    async with WorkloadApi() as api:
        workload = await api.add_workload("orders", SPIFFE_ID, ca=CertificateAuthority("zt.example"))
        workload.allow(pid=os.getpid())
        secret = make(identity_from_env(jwt_svid(workload.endpoint, AWS_ENDPOINT_URL=aws.url)))
        with pytest.raises(CredentialsRefused, match=f"Workload API at .*sub={SPIFFE_ID}") as refused:
            await secret.get()
    assert refused.value.reason is Reason.WEB_IDENTITY_REFUSED


# -- EKS Pod Identity


AGENT = "http://169.254.170.23/v1/credentials"


def pod_identity(token_file: Path, **more: str) -> dict[str, str]:
    return {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": AGENT,
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token_file),
        "AWS_REGION": "eu-central-1",
        **more,
    }


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        (AGENT, ("169.254.170.23", 80, "/v1/credentials")),
        ("http://[fd00:ec2::23]/v1/credentials", ("fd00:ec2::23", 80, "/v1/credentials")),
        ("http://127.0.0.1:8080", ("127.0.0.1", 8080, "/")),
        ("http://[::1]:8080/a?b=c", ("::1", 8080, "/a?b=c")),
    ],
)
def test_pod_identity_comes_from_the_variables_of_eks(
    token_file: Path, uri: str, address: tuple[str, int, str]
) -> None:
    identity = identity_from_env(pod_identity(token_file, AWS_CONTAINER_CREDENTIALS_FULL_URI=uri))

    assert identity == PodIdentity(*address, token_file, "eu-central-1")


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.170.2/v2/credentials",  # an ECS task's role
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/node",  # the node's role
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://10.0.0.7/v1/credentials",
        "http://agent.example/v1/credentials",
        "http://localhost/v1/credentials",  # a name: whoever answers for it
        "http://169.254.170.23.agent.example/v1/credentials",
        "http://169.254.170.23@agent.example/v1/credentials",
        "http://user@169.254.170.23/v1/credentials",
        "https://169.254.170.23/v1/credentials",
        "ftp://169.254.170.23/v1/credentials",
        "http://169.254.170.23:0x50/v1/credentials",
        "http://169.254.170.23/v1\r\nX-Header: y",
        "http://[::1/v1",
        "http://0.0.0.0/v1",
        "//169.254.170.23/v1",
        "169.254.170.23",
    ],
)
@pytest.mark.parametrize("offered", ["alone", "beside IRSA"])
def test_no_token_is_shown_to_anybody_but_the_agent_of_eks(token_file: Path, uri: str, offered: str) -> None:
    beside = irsa(token_file) if offered == "beside IRSA" else {}
    assert identity_from_env(pod_identity(token_file, **beside))

    with pytest.raises(CredentialsRefused, match="AWS_CONTAINER_CREDENTIALS_FULL_URI") as refused:
        identity_from_env(pod_identity(token_file, **beside, AWS_CONTAINER_CREDENTIALS_FULL_URI=uri))

    assert refused.value.reason is Reason.WEB_IDENTITY_CONFLICT


def test_web_identity_comes_first_when_both_are_offered_and_the_log_names_it(
    token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    assert isinstance(identity_from_env(pod_identity(token_file)), PodIdentity)
    assert "AWS credentials by pod identity" in caplog.text
    assert isinstance(identity_from_env(irsa(token_file)), WebIdentity)
    assert f"AWS credentials by web identity: {ROLE}\n" in caplog.text
    assert isinstance(identity_from_env(irsa(token_file, **pod_identity(token_file))), WebIdentity)
    assert f"{ROLE}; EKS Pod Identity is offered too, and not used" in caplog.text


def test_half_of_irsa_does_not_fall_through_to_pod_identity(token_file: Path) -> None:
    assert identity_from_env(pod_identity(token_file))

    with pytest.raises(CredentialsRefused, match="AWS_WEB_IDENTITY_TOKEN_FILE not set"):
        identity_from_env(pod_identity(token_file, AWS_ROLE_ARN=ROLE))


@pytest.mark.parametrize(
    "absent", ["AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_REGION"]
)
def test_half_of_pod_identity_is_refused_and_the_variable_named(token_file: Path, absent: str) -> None:
    environment = {name: value for name, value in pod_identity(token_file).items() if name != absent}

    with pytest.raises(CredentialsRefused, match=absent) as refused:
        identity_from_env(environment)

    assert refused.value.reason is Reason.WEB_IDENTITY_MISSING


async def test_a_pod_identity_reads_the_secret_with_the_agents_credentials(
    aws: Aws, make: Callable[..., RotatingSecret], pod: PodIdentity
) -> None:
    stream = io.StringIO()
    secret = make(pod, audit=AuditLog("orders", stream))

    assert (await secret.get())["password"] == PASSWORD

    assert aws.keys == ["ASIAAGENT000001"]
    assert aws.agent_tokens == [token()]
    assert aws.tokens == []
    assert aws.metadata_calls == 0
    status = secret.status()
    assert (status["source"], status["role_arn"]) == ("pod identity", None)
    assert json.loads(stream.getvalue())["source"] == "pod identity"


async def test_the_token_for_the_agent_is_read_again_at_each_renewal(
    aws: Aws, make: Callable[..., RotatingSecret], pod: PodIdentity, token_file: Path
) -> None:
    aws.lifetime = 0.05
    secret = make(pod)
    await secret.refresh()
    token_file.write_text(token(number=1))

    deadline = time.monotonic() + 5
    while aws.agent_tokens[-1] != token(number=1):
        assert time.monotonic() < deadline, "the credentials expired"
        await secret.refresh()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_an_agent_that_refuses_says_what_to_check_and_not_the_token(
    aws: Aws, make: Callable[..., RotatingSecret], pod: PodIdentity, status: int
) -> None:
    assert await make(pod).get()
    aws.before_agent = raises(Fault(status, "CANARY, not found"))

    with pytest.raises(CredentialsRefused, match=r"association.*system:serviceaccount") as refused:
        await make(pod).get()

    assert refused.value.reason is Reason.WEB_IDENTITY_REFUSED
    assert "CANARY" not in str(refused.value)
    assert aws.metadata_calls == 0


@pytest.mark.parametrize("fault", [Fault(429, "slow down"), Fault(500, "CANARY"), Fault(307, "/elsewhere")])
async def test_an_agent_in_trouble_is_waited_for_and_nobody_else_is_asked(
    aws: Aws, make: Callable[..., RotatingSecret], pod: PodIdentity, fault: Fault
) -> None:
    aws.before_agent = raises(fault)
    async with make(pod) as secret:
        await eventually(lambda: secret.status()["last_error"] == "secret_unavailable")
        assert "CANARY" not in str(secret.status())
        assert (aws.metadata_calls, aws.tokens, aws.keys) == (0, [], [])
        aws.before_agent = nothing

        await eventually(lambda: secret.status()["state"] == "serving")


@pytest.mark.parametrize(
    "answer", ["", "CANARY", "[]", '{"AccessKeyId": "CANARY"}', "[" * 60_000, "x" * 100_000]
)
async def test_an_answer_of_the_agent_without_credentials_is_refused(
    aws: Aws,
    make: Callable[..., RotatingSecret],
    pod: PodIdentity,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await make(pod).get()
    monkeypatch.setattr(aws, "agent", lambda _: answer)

    with pytest.raises(SecretError, match="EKS Pod Identity Agent") as refused:
        await make(pod).get()

    assert refused.value.reason is Reason.SECRET_UNAVAILABLE
    assert "CANARY" not in str(refused.value)


async def test_an_agent_that_is_not_there_is_said(
    make: Callable[..., RotatingSecret], pod: PodIdentity
) -> None:
    assert await make(pod).get()

    with pytest.raises(SecretError, match="ConnectionRefusedError"):
        await make(replace(pod, port=1)).get()


async def test_an_agent_that_hangs_is_given_up(
    aws: Aws, make: Callable[..., RotatingSecret], pod: PodIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_clients, "READ_TIMEOUT", 0.2)
    assert await make(pod).get()
    release = threading.Event()
    aws.before_agent = lambda: release.wait(10)

    with pytest.raises(SecretError, match="TimeoutError"):
        await make(pod).get()
    release.set()


async def test_the_token_goes_through_no_proxy(
    aws: Aws, make: Callable[..., RotatingSecret], pod: PodIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    assert (await make(pod).get())["password"] == PASSWORD
    assert (await make().get())["password"] == PASSWORD


@pytest.mark.parametrize("absent", [{"AWS_ROLE_ARN"}, {"AWS_WEB_IDENTITY_TOKEN_FILE"}, {"AWS_REGION"}])
def test_a_missing_variable_is_named(token_file: Path, absent: set[str]) -> None:
    environment = {name: value for name, value in irsa(token_file).items() if name not in absent}

    with pytest.raises(CredentialsRefused, match=next(iter(absent))) as refused:
        WebIdentity.from_env(environment)

    assert refused.value.reason is Reason.WEB_IDENTITY_MISSING


def test_without_an_identity_the_start_is_refused_with_what_to_do() -> None:
    with pytest.raises(CredentialsRefused, match=r"IRSA was not injected.*role-arn.*delete the pod"):
        identity_from_env({"AWS_REGION": "eu-central-1"})


def test_a_role_that_is_no_role_is_refused(token_file: Path) -> None:
    with pytest.raises(CredentialsRefused, match="AWS_ROLE_ARN"):
        WebIdentity.from_env(irsa(token_file, AWS_ROLE_ARN="zt-demo-orders"))


def test_a_token_file_that_is_missing_or_empty_is_refused(token_file: Path) -> None:
    with pytest.raises(CredentialsRefused, match="does not exist"):
        WebIdentity.from_env(irsa(token_file.with_name("none")))
    for text, why in (("\n", "empty"), ("x" * 30_000, "too large"), ("a\r\nb: c", "more than a token")):
        token_file.write_text(text)
        with pytest.raises(CredentialsRefused, match=why):
            WebIdentity.from_env(irsa(token_file))


def test_a_newline_after_the_token_does_no_harm(token_file: Path) -> None:
    token_file.write_text(token() + "\n")

    assert WebIdentity.from_env(irsa(token_file)).read_token() == token()


@contextmanager
def somebody_else() -> Iterator[int]:
    """Become a user without rights, when we are one that may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield os.geteuid()
    finally:
        os.seteuid(before)


def test_an_unreadable_token_names_the_file_and_the_user(token_file: Path) -> None:
    token_file.chmod(0)
    with somebody_else() as user, pytest.raises(CredentialsRefused) as refused:
        WebIdentity.from_env(irsa(token_file))

    assert f"user {user} may not read it" in refused.value.detail
    assert str(token_file) in refused.value.detail


async def test_only_the_key_that_sts_issued_reaches_secrets_manager(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = tmp_path / "credentials"
    shared.write_text("[default]\naws_access_key_id=AKIASHAREDFILE\naws_secret_access_key=x\n")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIASTATICKEY",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_PROFILE": "no-such-profile",
        "AWS_SHARED_CREDENTIALS_FILE": str(shared),
        "AWS_CONFIG_FILE": str(shared),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": aws.url,
    }.items():
        monkeypatch.setenv(name, value)

    read = await make().get()

    assert read["password"] == PASSWORD
    assert aws.keys == ["ASIAISSUED000001"]
    assert aws.metadata_calls == 0


@pytest.mark.parametrize(
    "fault", [Fault(400, "InvalidIdentityToken"), Fault(400, "Throttling"), Fault(503, "Busy")]
)
async def test_when_sts_fails_nobody_else_is_asked_for_credentials(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", aws.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASTATICKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    aws.before_sts = raises(fault)

    with pytest.raises(SecretError):
        await make().get()

    assert aws.tokens
    assert aws.keys == []
    assert aws.metadata_calls == 0


async def test_sts_denial_says_what_the_trust_policy_must_match_and_not_the_token(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    aws.before_sts = raises(Fault(403, "AccessDenied"))

    with pytest.raises(CredentialsRefused) as refused:
        await make().get()

    assert refused.value.reason is Reason.WEB_IDENTITY_REFUSED
    for part in (
        ROLE,
        "system:serviceaccount:zt-demo:orders",
        "sts.amazonaws.com",
        "https://oidc.zt.example/local",
    ):
        assert part in refused.value.detail
    assert "CANARY" not in str(refused.value)


async def test_secrets_manager_denial_names_role_and_secret(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    aws.before_secret = raises(Fault(400, "AccessDeniedException"))

    with pytest.raises(SecretError, match="kms:Decrypt") as refused:
        await make().get()

    assert refused.value.reason is Reason.SECRET_DENIED
    assert ROLE in refused.value.detail
    assert SECRET_ID in refused.value.detail


@pytest.mark.parametrize("region", ["eu-central-1", "us-east-1"])
async def test_clients_are_made_for_a_service(monkeypatch: pytest.MonkeyPatch, region: str) -> None:
    """Regional, given up within seconds, signing with what they are given; whatever the environment says."""
    monkeypatch.setattr(aws_clients, "ATTEMPTS", 2)
    for name, value in {
        "AWS_STS_REGIONAL_ENDPOINTS": "legacy",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL_SECRETS_MANAGER": "http://127.0.0.1:1",
        "AWS_MAX_ATTEMPTS": "50",
        "AWS_RETRY_MODE": "legacy",
        "AWS_ACCESS_KEY_ID": "AKIASTATICKEY",
        "AWS_SECRET_ACCESS_KEY": "x",
    }.items():
        monkeypatch.setenv(name, value)
    make = aws_clients.Clients(region).make

    sts = await asyncio.to_thread(make, "sts", None)
    manager = await asyncio.to_thread(
        make, "secretsmanager", None, aws_access_key_id="ASIA", aws_secret_access_key="y"
    )

    assert sts.meta.endpoint_url == f"https://sts.{region}.amazonaws.com"
    assert manager.meta.endpoint_url == f"https://secretsmanager.{region}.amazonaws.com"
    for client in (sts, manager):
        config = client.meta.config
        assert (config.connect_timeout, config.read_timeout) == (3.0, 5.0)
        assert (config.retries["mode"], config.retries["total_max_attempts"]) == ("standard", 2)
    assert sts._request_signer._credentials is None
    assert manager._request_signer._credentials.access_key == "ASIA"


# -- the token and the temporary credentials (C45)


async def test_the_token_is_read_again_at_each_renewal(
    aws: Aws, make: Callable[..., RotatingSecret], token_file: Path
) -> None:
    aws.lifetime = 0.2
    secret = make()
    seen: list[str] = []
    for number in range(1, 4):
        seen.append(token(number=number))
        token_file.with_name("next").write_text(seen[-1])
        token_file.with_name("next").replace(token_file)
        deadline = time.monotonic() + 5
        while aws.tokens[-1:] != seen[-1:]:
            assert time.monotonic() < deadline
            await secret.refresh()

    assert [t for i, t in enumerate(aws.tokens) if t not in aws.tokens[:i]] == seen
    assert aws.keys[-1] == f"ASIAISSUED{len(aws.tokens):06}"


async def test_credentials_are_renewed_before_they_expire(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    aws.lifetime = 2.0
    secret = make()
    await secret.refresh()
    deadline = time.monotonic() + 2.0

    while len(aws.tokens) < 2:
        assert time.monotonic() < deadline, "the credentials expired"
        await secret.refresh()
        await asyncio.sleep(0.02)

    assert aws.keys[-1] == "ASIAISSUED000002"


async def test_credentials_of_before_work_through_an_outage_of_sts(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_credentials, "RENEW_AT", -1.0)
    secret = make()
    await secret.refresh()
    await eventually(lambda: aws.descriptions == 1)
    issued = len(aws.tokens)
    aws.before_sts = raises(Fault(503, "ServiceUnavailable"))

    for _ in range(3):
        await secret.refresh()

    assert aws.keys[-3:] == [f"ASIAISSUED{issued:06}"] * 3
    assert len(aws.tokens) == issued + 1  # STS is not asked again at once


@pytest.mark.parametrize(
    "code", ["UnrecognizedClientException", "ExpiredTokenException", "InvalidClientTokenId"]
)
async def test_credentials_that_aws_forgot_are_replaced_at_once(
    aws: Aws, make: Callable[..., RotatingSecret], code: str
) -> None:
    secret = make()
    await secret.refresh()
    forgotten = aws.keys[-1]

    def forget() -> None:
        if aws.keys[-1] == forgotten:
            raise Fault(400, code)

    aws.before_secret = forget

    assert (await secret.refresh())["password"] == PASSWORD
    assert len(aws.tokens) == 2


async def test_the_role_is_assumed_again_only_once_for_one_read(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    aws.before_secret = raises(Fault(400, "UnrecognizedClientException"))

    with pytest.raises(CredentialsRefused) as refused:
        await make().get()

    assert refused.value.reason is Reason.WEB_IDENTITY_REFUSED
    assert len(aws.tokens) == len(aws.keys) == 2


async def test_recovers_without_a_restart_when_a_good_token_follows_an_expired_one(
    aws: Aws, make: Callable[..., RotatingSecret], token_file: Path
) -> None:
    aws.lifetime = 0.05
    secret = make(max_age=0.05)
    before = await secret.get()
    good = token(number=7)

    def check() -> None:
        if aws.tokens[-1] != good:
            raise Fault(400, "ExpiredTokenException")

    aws.before_sts = check
    async with secret:
        await eventually(lambda: secret.status()["last_error"] == "web_identity_refused")
        assert await secret.get() == before
        token_file.write_text(good)
        await eventually(lambda: secret.status()["state"] == "serving")


# -- keeping it fresh (C37, C43)


async def test_a_fresh_value_is_not_asked_for_again(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    secret = make(max_age=60)
    first = await secret.get()

    assert await secret.get() is first
    assert secret.current is first
    assert await secret.refresh(force=False) is first
    assert len(aws.keys) == 1


async def test_a_forced_refresh_finds_the_new_version(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    secret = make(max_age=3600)
    assert (await secret.get()).version_id == "v1"
    aws.password_is("new", "v2")

    assert (await secret.refresh()).version_id == "v2"
    assert (await secret.get())["password"] == "new"


async def test_a_stale_value_is_asked_for_again(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    secret = make(max_age=0.05)
    await secret.get()
    aws.password_is("new", "v2")
    await asyncio.sleep(0.06)

    assert (await secret.get()).version_id == "v2"


async def test_in_the_background_no_caller_waits(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    async with make(max_age=0.05) as secret:
        await eventually(lambda: secret.current is not None)
        aws.password_is("new", "v2")
        await eventually(lambda: secret.current is not None and secret.current.version_id == "v2")
        answering = threading.Event()
        aws.before_secret = lambda: answering.wait(10)
        slow = len(aws.keys)
        await eventually(lambda: len(aws.keys) > slow)
        try:
            assert (await asyncio.wait_for(secret.get(), 5)).version_id == "v2"
            assert not answering.is_set()
        finally:
            answering.set()


async def test_tasks_and_threads_share_one_call(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    aws.before_secret = lambda: time.sleep(0.1)
    secret = make()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(50) as threads:
        values = await asyncio.gather(
            *(secret.get() for _ in range(50)),
            *(loop.run_in_executor(threads, secret.sync_get) for _ in range(50)),
        )

    assert {value.version_id for value in values} == {"v1"}
    assert len(aws.keys) == len(aws.tokens) == 1


FIRST_USE = """
import asyncio, sys, threading
from pathlib import Path
from ztmtls.secrets import RotatingSecret, WebIdentity

async def main() -> None:
    url, file, role, secret_id = sys.argv[1:]
    identity = WebIdentity(role, Path(file), "eu-central-1", "orders-pod", url)
    secret = RotatingSecret(secret_id, identity, endpoint_url=url)
    threads = [asyncio.to_thread(secret.sync_get) for _ in range(50)]
    values = await asyncio.gather(*(secret.get() for _ in range(50)), *threads)
    print(len({id(value) for value in values}))

asyncio.run(main())
"""


@pytest.mark.parametrize("number", range(3))
def test_the_first_use_in_a_fresh_process_may_come_from_everywhere_at_once(
    aws: Aws, token_file: Path, number: int
) -> None:
    """boto3 is not yet imported, and no client made: neither is safe in several threads."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, aws.url, str(token_file), ROLE, SECRET_ID],
        capture_output=True,
        text=True,
        timeout=60,
        env=own_environment(),
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    assert len(aws.keys) == len(aws.tokens) == 1


async def test_a_forced_refresh_does_not_take_an_answer_from_before_it_was_asked(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    reached, release = threading.Event(), threading.Event()
    secret = make()
    await secret.refresh()

    def hold() -> None:  # the answer was made before the rotation, and arrives after it
        reached.set()
        release.wait(5)

    aws.before_secret = hold
    slow = asyncio.create_task(secret.refresh())
    await asyncio.to_thread(reached.wait, 5)
    aws.before_secret = nothing
    aws.password_is("new", "v2")
    forced = [asyncio.create_task(secret.refresh()) for _ in range(20)]
    await asyncio.sleep(0)
    release.set()

    assert (await slow).version_id == "v1"
    assert {value.version_id for value in await asyncio.gather(*forced)} == {"v2"}
    assert len(aws.keys) == 3


async def test_forced_refreshes_keep_their_distance(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "MIN_INTERVAL", 0.1)
    secret = make()
    await secret.refresh()  # the first one also makes the clients
    for _ in range(4):  # in turn: of callers at once, those after the call's start need another one
        await secret.refresh()

    gaps = [later - earlier for earlier, later in pairwise(aws.times[1:])]
    assert len(gaps) == 3
    assert min(gaps) > 0.08


async def test_a_cancelled_waiter_does_not_cancel_the_others(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    release = threading.Event()
    aws.before_secret = lambda: release.wait(5)
    secret = make()
    impatient, patient = asyncio.create_task(secret.get()), asyncio.create_task(secret.get())
    await eventually(lambda: len(aws.keys) == 1)
    impatient.cancel()
    await asyncio.wait({impatient})
    release.set()

    assert (await patient).version_id == "v1"


async def test_an_outage_is_lived_through_on_the_last_good_value(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    secret = make(max_age=0.02)
    before = await secret.get()
    aws.before_secret = raises(Fault(500, "InternalServiceError"))
    await asyncio.sleep(0.03)

    assert await secret.get() is before
    status = secret.status()
    assert status["state"] == "degraded"
    assert status["last_error"] == "secret_unavailable"
    assert await secret.check() is None
    with pytest.raises(SecretError):
        await secret.refresh()

    aws.before_secret = nothing
    await until_serving(secret)


async def until_serving(secret: RotatingSecret) -> None:
    deadline = time.monotonic() + 5
    while secret.status()["state"] != "serving":
        assert time.monotonic() < deadline
        await secret.get()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "reason"),
    [("AccessDeniedException", "secret_denied"), ("ResourceNotFoundException", "secret_unavailable")],
)
async def test_a_secret_that_is_gone_or_denied_serves_on_and_says_so(
    aws: Aws, make: Callable[..., RotatingSecret], code: str, reason: str
) -> None:
    secret = make(max_age=0.02)
    before = await secret.get()
    aws.before_secret = raises(Fault(400, code))
    await asyncio.sleep(0.03)

    assert await secret.get() is before
    assert secret.status()["last_error"] == reason


async def test_callers_in_a_loop_do_not_hammer_aws(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "FIRST_RETRY", 10.0)
    monkeypatch.setattr(secrets, "LAST_RETRY", 10.0)
    aws.before_secret = raises(Fault(400, "AccessDeniedException"))
    secret = make()
    for _ in range(50):
        with pytest.raises(SecretError) as refused:
            await secret.get()
        assert refused.value.reason is Reason.SECRET_DENIED

    assert len(aws.keys) == 1
    assert "secret_denied" in str(await secret.check())


async def test_throttling_is_retried(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_clients, "ATTEMPTS", 2)

    def throttle_first() -> None:
        if len(aws.keys) == 1:
            raise Fault(400, "ThrottlingException")

    aws.before_secret = throttle_first

    assert (await make().get()).version_id == "v1"
    assert len(aws.keys) == 2


async def test_an_aws_that_does_not_answer_is_given_up_and_never_blocks_the_loop(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_clients, "READ_TIMEOUT", 1.0)
    asked, release = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        release.wait(30)

    aws.before_secret = hang
    getting = asyncio.create_task(make().get())
    while not asked.is_set():
        await asyncio.sleep(0.001)
    turns = 0
    while not getting.done():  # none, if the call had the loop's thread
        turns += 1
        await asyncio.sleep(0.001)
    release.set()

    with pytest.raises(SecretError) as refused:
        await getting
    assert refused.value.reason is Reason.SECRET_UNAVAILABLE
    assert turns > 10


def test_sync_get_works_without_a_loop(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    secret = make()

    assert secret.sync_get()["username"] == "orders_app"
    assert secret.sync_get() is secret.current


def test_sync_get_gives_up_in_time(aws: Aws, make: Callable[..., RotatingSecret]) -> None:
    release = threading.Event()
    aws.before_secret = lambda: release.wait(5)

    with pytest.raises(SecretError, match="no answer"):
        make().sync_get(timeout=0.1)
    release.set()


async def test_closing_answers_those_who_wait_and_forgets_the_value(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    release = threading.Event()
    aws.before_secret = lambda: release.wait(5)
    async with make() as secret:
        waiting = asyncio.create_task(secret.get())
        await eventually(lambda: len(aws.keys) == 1)
    release.set()

    with pytest.raises(SecretError, match="closed"):
        await waiting
    with pytest.raises(SecretError, match="closed"):
        await secret.get()
    assert secret.current is None
    assert secret.status()["state"] == "closed"


# -- what it holds (C44)


async def test_the_members_are_texts_and_more_than_required_is_kept(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    aws.stages = ("AWSCURRENT", "AWSPENDING")
    aws.text = json.dumps(
        {"username": "u", "password": "p", "port": 5432, "dbname": "x", "n": None, "l": [1]}
    )

    value = await make().get()

    assert dict(value.fields) == {"username": "u", "password": "p", "port": "5432", "dbname": "x"}
    with pytest.raises(TypeError):
        value.fields["password"] = "other"  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "CANARY, not JSON",
        '["CANARY"]',
        '{"username": "CANARY"}',
        '{"username": "CANARY", "password": null}',
        '{"username": "CANARY", "password": ""}',
        '{"username": "CANARY", "password": 12345}',
    ],
)
async def test_a_malformed_version_is_refused_and_the_last_good_one_kept(
    aws: Aws, make: Callable[..., RotatingSecret], text: str | None
) -> None:
    secret = make(max_age=0.02)
    good = await secret.get()
    aws.text, aws.version = text, "v2"

    with pytest.raises(SecretError) as refused:
        await secret.refresh()

    assert refused.value.reason is Reason.SECRET_MALFORMED
    assert "CANARY" not in str(refused.value)
    assert await secret.get() is good


@pytest.mark.parametrize("answer", ["{}", "{", "", "<html>CANARY</html>", '{"VersionId": "v2"}'])
async def test_an_answer_without_a_secret_is_an_outage_and_no_malformed_secret(
    aws: Aws, make: Callable[..., RotatingSecret], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = make()
    good = await secret.get()
    with monkeypatch.context() as changed:
        changed.setattr(aws, "_get_secret_value", lambda *_: answer)

        with pytest.raises(SecretError) as refused:
            await secret.refresh()

    assert refused.value.reason is Reason.SECRET_UNAVAILABLE
    assert "CANARY" not in str(refused.value)
    assert secret.current is good
    assert (await secret.refresh()).version_id == "v1"


@pytest.mark.parametrize("answer", ["", "<html>CANARY", "<AssumeRoleWithWebIdentityResponse/>", "{"])
async def test_an_answer_of_sts_without_credentials_is_an_outage(
    aws: Aws, make: Callable[..., RotatingSecret], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await make().get()
    monkeypatch.setattr(aws, "_assume", lambda _: answer)

    with pytest.raises(SecretError, match="STS gave no answer") as refused:
        await make().get()

    assert refused.value.reason is Reason.SECRET_UNAVAILABLE
    assert "CANARY" not in str(refused.value)


# -- what it tells (C18)


async def test_nothing_secret_is_ever_told(
    aws: Aws, make: Callable[..., RotatingSecret], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("botocore", "urllib3", "botocore.endpoint", "botocore.parsers", "botocore.auth"):
        caplog.set_level(logging.DEBUG, name)
    audit = io.StringIO()
    told: list[str] = []
    secret = make(audit=AuditLog("orders", audit))
    async with secret:
        value = await secret.get()
        told += [
            repr(value),
            str(value),
            repr(secret),
            str(secret.status()),
            repr(secret.identity),
            f"{value!r}",
        ]
        for fault in ("AccessDeniedException", "ExpiredTokenException", "InternalServiceError"):
            aws.before_secret = raises(Fault(400, fault))
            with pytest.raises(SecretError) as refused:
                await secret.refresh()
            told += [str(refused.value), repr(refused.value), repr(refused.value.__cause__)]
        aws.before_secret, aws.text = nothing, '"CANARY'
        with pytest.raises(SecretError) as refused:
            await secret.refresh()
        told.append(repr(refused.value))
    with pytest.raises(TypeError):
        pickle.dumps(value)

    everything = "\n".join([*told, audit.getvalue(), caplog.text])
    assert "secret_denied" in everything
    assert "CANARY" not in everything


@pytest.mark.parametrize("by", ["web identity", "pod identity"])
async def test_no_frame_of_a_refusal_holds_a_secret(
    aws: Aws, make: Callable[..., RotatingSecret], pod: PodIdentity, identity: WebIdentity, by: str
) -> None:
    """Reporters of errors show the variables of each frame."""
    secret = make(identity if by == "web identity" else pod)
    await secret.get()
    shown: list[str] = []

    async def provoke() -> None:
        with pytest.raises(SecretError) as refused:
            await secret.refresh()
        assert refused.value.__cause__ is refused.value.__context__ is None
        report = traceback.TracebackException.from_exception(refused.value, capture_locals=True)
        shown.extend(report.format())

    for text in ('{"username": "CANARY"}', '"CANARY', '{"username": "u", "password": ["CANARY"]}'):
        aws.text = text
        await provoke()
    aws.before_secret = raises(Fault(400, "AccessDeniedException"))
    await provoke()
    aws.before_secret = raises(Fault(400, "ExpiredTokenException"))
    aws.before_sts = aws.before_agent = raises(Fault(403, "AccessDenied"))
    await provoke()

    everything = "".join(shown)
    assert "secret_malformed" in everything
    assert "web_identity_refused" in everything
    assert "CANARY" not in everything


async def test_the_audit_log_tells_versions_and_refusals_once(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    stream = io.StringIO()
    secret = make(audit=AuditLog("orders", stream))
    await secret.refresh()
    await secret.refresh()
    aws.password_is("new", "v2")
    await secret.refresh()
    aws.before_secret = raises(Fault(400, "AccessDeniedException"))
    for _ in range(3):
        with pytest.raises(SecretError):
            await secret.refresh()

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["decision"], line["reason"]) for line in lines] == [
        ("credentials", "allow", None),
        ("credentials", "allow", None),
        ("credentials", "deny", "secret_denied"),
    ]
    assert [line.get("version") for line in lines] == ["v1", "v2", None]
    assert lines[1]["previous_version"] == "v1"
    assert {line["role_arn"] for line in lines} == {ROLE}


async def test_the_status_page_shows_version_age_and_source(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    secret = make(max_age=60)
    assert secret.status()["state"] == "starting"
    assert await secret.check() == "no secret has been fetched yet"
    before = datetime.now(UTC)
    await secret.get()

    status = secret.status()

    assert status["age_seconds"] < 5
    fetched, refresh = (datetime.fromisoformat(status[name]) for name in ("fetched_at", "next_refresh_at"))
    assert before - timedelta(milliseconds=1) <= fetched <= datetime.now(UTC)
    assert timedelta(seconds=47) < refresh - fetched < timedelta(seconds=61)
    assert {
        name: status[name]
        for name in ("state", "secret_id", "version", "created_at", "last_error", "role_arn", "source")
    } == {
        "state": "serving",
        "secret_id": SECRET_ID,
        "version": "v1",
        "created_at": "2026-03-01T12:30:00.000+00:00",
        "last_error": None,
        "role_arn": ROLE,
        "source": "web identity",
    }


def rotation(status: dict[str, Any]) -> list[Any]:
    return [status[name] for name in ("rotation_enabled", "last_rotated_at", "next_rotation_at")]


async def test_the_status_page_shows_when_the_secret_is_rotated(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    aws.rotation = {
        "RotationEnabled": True,
        "LastRotatedDate": CREATED.timestamp(),
        "NextRotationDate": tomorrow.timestamp(),
    }
    secret = make()
    assert rotation(secret.status()) == [None, None, None]
    await secret.get()

    await eventually(lambda: secret.status()["rotation_enabled"] is True)
    assert rotation(secret.status()) == [
        True,
        "2026-03-01T12:30:00.000+00:00",
        tomorrow.isoformat(timespec="milliseconds"),
    ]
    for _ in range(3):
        await secret.refresh()
    assert aws.descriptions == 1  # it changes with the version, and otherwise hardly ever

    aws.password_is("new", "v2")
    aws.rotation = {"RotationEnabled": False}
    await secret.refresh()
    await eventually(lambda: rotation(secret.status()) == [False, None, None])


async def test_a_rotation_that_should_have_been_is_asked_about_again(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    """It failed or was cut off: the same version, and another date."""
    aws.rotation = {"RotationEnabled": True, "NextRotationDate": CREATED.timestamp()}
    secret = make()
    await secret.get()
    await eventually(lambda: secret.status()["next_rotation_at"] is not None)
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    aws.rotation["NextRotationDate"] = tomorrow.timestamp()

    await secret.refresh()

    expected = tomorrow.isoformat(timespec="milliseconds")
    await eventually(lambda: secret.status()["next_rotation_at"] == expected)
    assert secret.status()["version"] == "v1"


async def test_a_role_that_may_not_ask_for_the_schedule_reads_the_secret_all_the_same(
    aws: Aws, make: Callable[..., RotatingSecret], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "SCHEDULE_AGE", 0.0)
    aws.rotation = {"RotationEnabled": True}
    secret = make()
    await secret.get()
    await eventually(lambda: secret.status()["rotation_enabled"] is True)
    asked = aws.descriptions
    aws.before_describe = raises(Fault(500, "InternalServiceError"))
    await secret.refresh()
    await eventually(lambda: aws.descriptions > asked)
    assert secret.status()["rotation_enabled"] is True  # as far as is known

    aws.before_describe = raises(Fault(400, "AccessDeniedException"))
    await secret.refresh()

    await eventually(lambda: secret.status()["rotation_enabled"] is None)
    status = secret.status()
    assert (status["state"], status["last_error"]) == ("serving", None)


async def test_the_metrics_tell_state_version_age_and_the_last_error(
    aws: Aws, make: Callable[..., RotatingSecret]
) -> None:
    aws.rotation = {"RotationEnabled": True, "NextRotationDate": (CREATED + timedelta(days=1)).timestamp()}
    secret = make()
    registry = CollectorRegistry()
    registry.register(Collector(None, None, secret))

    def told(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"ztmtls_secret_{name}", {"secret_id": SECRET_ID, **labels})

    assert told("state", state="starting") == 1
    assert told("fetched_timestamp_seconds") is None
    await secret.get()
    await eventually(lambda: told("next_rotation_timestamp_seconds") is not None)

    assert (told("state", state="starting"), told("state", state="serving")) == (0, 1)
    assert told("version", version="v1") == 1
    assert told("fetched_timestamp_seconds") == pytest.approx(time.time(), abs=5)
    assert told("created_timestamp_seconds") == CREATED.timestamp()
    assert told("next_rotation_timestamp_seconds") == (CREATED + timedelta(days=1)).timestamp()
    assert told("last_error", reason="secret_denied") is None

    aws.before_secret = raises(Fault(400, "AccessDeniedException"))
    with pytest.raises(SecretError):
        await secret.refresh()

    assert told("state", state="degraded") == 1
    assert told("last_error", reason="secret_denied") == 1
    assert (told("reads_total", outcome="ok"), told("reads_total", outcome="secret_denied")) == (1, 1)
