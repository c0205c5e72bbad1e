"""The stand-in for AWS on one machine: started empty each time, with infra/workload.yaml deployed into it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import string
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ztdev.errors import NotReady, PortInUse, StackError
from ztdev.processes import ProcessRef

from .environment import ensure_environment
from .gate import EX_PORT_IN_USE
from .issuer import AUDIENCE, Issuer, OidcIssuer
from .stacks import Stack, StackFailed

#: The account number of AWS's own examples.
ACCOUNT_ID = "111122223333"

REGION = "eu-central-1"

STACK_NAME = "zt-demo-workload"

#: `python -c`: the gate as a package of its own, so that nothing else of this tree is imported.
_LAUNCH = "import sys; sys.path.append(sys.argv.pop(1)); from gate.__main__ import main; sys.exit(main())"

#: Where CloudFormation is told that the packages of functions are.
_BUCKET = "packages"

_START_TIMEOUT, _DEPLOY_TIMEOUT, _STOP_GRACE = 30.0, 60.0, 5.0


@dataclass(frozen=True)
class DatabaseAddress:
    """Where a service's PostgreSQL server is, as the template's parameters want it."""

    host: str
    port: int = 5432


@dataclass(frozen=True)
class RotationFunction:
    """What the rotation function is deployed with.

    `package` is a zip file for this machine (see `ztdev.functions`), `ca_file` what it trusts databases by.
    """

    package: Path
    ca_file: Path


@dataclass(frozen=True)
class _Admin:
    key_id: str
    secret: str = field(repr=False)

    @classmethod
    def random(cls) -> _Admin:
        key_id = "AKIA" + "".join(secrets.choice(string.ascii_uppercase + "234567") for _ in range(16))
        return cls(key_id, secrets.token_urlsafe(36))


class LocalCloud:
    """Runs the gate (see `gate`) as a child process, and deploys the workload stack through its API.

    The administrator's key is random, made at each start, and kept in the memory of both processes. When this
    process ends in any way, the child sees it and ends too.

    Args:
        state_dir: where the child keeps temporary files; made when it is missing.
        port: where it listens, on `host`.
        issuer: its tokens are the ones that are accepted; an `OidcIssuer` has been started.
        spiffe_trust_domain: whose JWT-SVIDs these tokens are; empty for tokens of service accounts.
        log_file: the child's log, appended to; None when it writes where this process does.
        databases: service name (``orders``, ``payments``) to address.
        rotation: the function to deploy; None deploys none.
        template: the stack to deploy; by default infra/workload.yaml of the checkout.
        environment_dir: the child's Python environment; by default `aws-env` next to `state_dir`.
        names: other addresses (``host:port``) that clients know it by. (What a client signs holds the address
            that it knows.)
        on_process: told the child's process, so that a supervisor can record it.
    """

    region = REGION
    account_id = ACCOUNT_ID

    def __init__(
        self,
        state_dir: Path,
        *,
        port: int,
        issuer: OidcIssuer | Issuer,
        log_file: Path | None,
        databases: Mapping[str, DatabaseAddress],
        rotation: RotationFunction | None = None,
        template: Path | None = None,
        spiffe_trust_domain: str = "",
        environment_dir: Path | None = None,
        host: str = "127.0.0.1",
        names: Collection[str] = (),
        on_process: Callable[[ProcessRef], None] = lambda _: None,
    ) -> None:
        self._state_dir = state_dir.absolute()
        self._port = port
        self._issuer = issuer
        self._spiffe_trust_domain = spiffe_trust_domain
        self._log_file = log_file
        self._databases = dict(databases)
        self._rotation = rotation
        self._template = template or default_template()
        self._environment_dir = environment_dir or self._state_dir.with_name("aws-env")
        self._host = host
        self._names = names
        self._on_process = on_process
        self._admin = _Admin.random()
        self._clients: dict[str, Any] = {}
        self._clients_lock = threading.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._outputs: dict[str, str] = {}

    @property
    def endpoint_url(self) -> str:
        """What AWS_ENDPOINT_URL is set to."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id of the child while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def outputs(self) -> Mapping[str, str]:
        """The stack's outputs: ARNs of the roles, secrets and the key."""
        return dict(self._outputs)

    def role_arn(self, service_account: str) -> str:
        """The role of a service account: AWS_ROLE_ARN of its pods. Raises KeyError for one that has none."""
        name = "".join(word.capitalize() for word in service_account.split("-"))
        return self._outputs[f"{name}RoleArn"]

    async def start(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Start it and deploy the stack; afterwards the secrets exist.

        Raises:
            PortInUse, ProgramMissing, NotReady, StackFailed: each with what to do. Nothing is left
            running.
        """
        python = await ensure_environment(self._environment_dir, progress)
        try:
            progress("starting the local AWS")
            await self._spawn(python)
            progress("deploying infra/workload.yaml into it")
            await asyncio.to_thread(self._deploy)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL. All it held is gone."""
        process, self._process = self._process, None
        self._outputs = {}
        if process is None:
            return
        for number, patience in ((signal.SIGTERM, _STOP_GRACE), (signal.SIGKILL, None)):
            if process.returncode is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await process.wait()
        if process.stdin is not None:
            process.stdin.close()

    async def wait(self) -> int:
        """Wait until the child ends, by itself or by `stop`. The answer is its exit status."""
        if self._process is None:
            raise RuntimeError("the local AWS was not started")
        return await self._process.wait()

    async def __aenter__(self) -> LocalCloud:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # -- for the administrator

    def admin_client(self, service: str) -> Any:
        """A boto3 client (synchronous) of the stand-in's administrator: sts, iam, kms, secretsmanager, …

        Made once for each start, as that takes longer than most calls; it may be used in any thread.
        """
        with self._clients_lock:
            if service not in self._clients:
                self._clients[service] = self._make_client(service)
            return self._clients[service]

    def _make_client(self, service: str) -> Any:
        # A session of our own: the default one would read this user's ~/.aws and environment.
        session = boto3.session.Session(
            aws_access_key_id=self._admin.key_id,
            aws_secret_access_key=self._admin.secret,
            region_name=self.region,
        )
        config = Config(
            connect_timeout=3,
            read_timeout=10,
            retries={"mode": "standard", "total_max_attempts": 2},
            proxies={},
        )
        make: Any = session.client
        return make(service, endpoint_url=self.endpoint_url, config=config)

    async def secret_value(self, name: str) -> dict[str, Any]:
        """The current value of a secret, as the administrator reads it to set up the databases."""

        def read() -> dict[str, Any]:
            answer = self.admin_client("secretsmanager").get_secret_value(SecretId=name)
            value: dict[str, Any] = json.loads(answer["SecretString"])
            return value

        return await asyncio.to_thread(read)

    # -- the child

    async def _spawn(self, python: Path) -> None:
        self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._admin, self._clients = _Admin.random(), {}
        log = self._open_log()
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                python,
                *self._program(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=self._state_dir,
                env=self._child_environment(),
                # Ctrl-C at the terminal is for the supervisor, which ends its children in order.
                start_new_session=True,
            )
        finally:
            if log is not None:
                os.close(log)
        reference = ProcessRef.of(process.pid)
        if reference is not None:
            self._on_process(reference)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):  # it died at once: the wait below says why
            process.stdin.write(json.dumps(self._configuration()).encode() + b"\n")
            await process.stdin.drain()
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                line = await process.stdout.readline()
                if not line:
                    await process.wait()
        except TimeoutError:
            raise NotReady(self._story(f"did not serve within {_START_TIMEOUT:.0f} s")) from None
        if line:
            return
        if process.returncode == EX_PORT_IN_USE:
            raise PortInUse(
                f"Port {self._port} of 127.0.0.1, meant for the local AWS, is in use. "
                "End what uses it, or choose another port."
            )
        raise NotReady(self._story(f"ended with status {process.returncode} while it started"))

    def _program(self) -> tuple[str, ...]:
        return "-I", "-B", "-c", _LAUNCH, str(Path(__file__).parent)

    def _configuration(self) -> dict[str, Any]:
        return {
            "host": self._host,
            "port": self._port,
            "hosts": [
                f"127.0.0.1:{self._port}",
                f"localhost:{self._port}",
                *self._names,
            ],
            "account_id": self.account_id,
            "region": self.region,
            "admin": {"access_key_id": self._admin.key_id, "secret_access_key": self._admin.secret},
            "issuer": {
                "ca_file": str(self._issuer.ca_file.absolute()),
                "resolve": dict(self._issuer.resolve),
            },
            "packages": {
                f"{_BUCKET}/{package.name}": str(package.absolute()) for package in self._packages()
            },
            "scratch": str(self._state_dir),
        }

    def _packages(self) -> list[Path]:
        return [self._rotation.package] if self._rotation else []

    def _child_environment(self) -> dict[str, str]:
        environment = {
            name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ
        }
        return environment | {"HOME": str(self._state_dir), "PYTHONUNBUFFERED": "1"}

    def _open_log(self) -> int | None:
        if self._log_file is None:
            return None
        self._log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _story(self, what: str) -> str:
        if self._log_file is None:
            return f"The local AWS {what}. Its own lines stand before this one."
        try:
            lines = self._log_file.read_text(errors="replace").splitlines()[-15:]
        except OSError:
            lines = []
        shown = "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
        return f"The local AWS {what}.\n  The last lines of {self._log_file}:\n{shown}"

    # -- the stack

    def _deploy(self) -> None:
        try:
            # The platform template makes the provider on EKS; the emulator knows no such resource.
            self.admin_client("iam").create_open_id_connect_provider(
                Url=self._issuer.url, ClientIDList=[AUDIENCE], ThumbprintList=["0" * 40]
            )
            stack = Stack(self.admin_client("cloudformation"), STACK_NAME, every=0.05, within=_DEPLOY_TIMEOUT)
            self._outputs = stack.deploy(self._template, self._parameters(), {"project": "zt-demo"})
        except (ClientError, BotoCoreError) as error:
            raise StackFailed(f"{self._template} cannot be deployed: {error}") from error

    def _parameters(self) -> dict[str, str]:
        parameters = {"OidcIssuerHost": self._issuer.host, "SpiffeTrustDomain": self._spiffe_trust_domain}
        for service, address in self._databases.items():
            parameters[f"{service.capitalize()}DatabaseHost"] = address.host
            parameters[f"{service.capitalize()}DatabasePort"] = str(address.port)
        if self._rotation:
            parameters["RotationPackageBucket"] = _BUCKET
            parameters["RotationPackageKey"] = self._rotation.package.name
            parameters["RotationCaFile"] = str(self._rotation.ca_file.absolute())
        return parameters


def default_template() -> Path:
    """infra/workload.yaml of the checkout that this package is in.

    Raises:
        StackError: it is not in one.
    """
    for directory in Path(__file__).resolve().parents:
        candidate = directory / "infra" / "workload.yaml"
        if candidate.is_file():
            return candidate
    raise StackError("infra/workload.yaml is not found: run from the checkout.")
