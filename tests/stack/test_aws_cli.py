"""infra/workload.yaml by the real AWS CLI: deployed, left alone, updated and deleted, as on AWS."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ztdev.aws.cloud import default_template
from ztdev.aws.environment import find_uv
from ztdev.state import default_tools_directory

from .rotation import Rotated, rotations

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

REQUIREMENTS = Path(__file__).with_name("awscli") / "requirements.txt"


@pytest.fixture(scope="module")
def aws_cli() -> Path:
    """Installed once, pinned by hash; in an environment of its own, as it pins botocore."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    directory = default_tools_directory() / f"awscli-{key}"
    program = directory / "bin" / "aws"
    if not (directory / "complete").exists():
        uv = str(find_uv())
        python = ["--python", str(directory / "bin" / "python")]
        for arguments in (
            ["venv", "--clear", "--no-project", "--python", sys.executable, str(directory)],
            ["pip", "install", *python, "--require-hashes", "--requirements", str(REQUIREMENTS)],
        ):
            subprocess.run([uv, "--quiet", *arguments], check=True, timeout=240)
        (directory / "complete").touch()
    return program


class Cli:
    """The program, as the stand-in's administrator."""

    def __init__(self, program: Path, rotated: Rotated, home: Path) -> None:
        self._program = program
        credentials = rotated.cloud.admin_client("sts")._request_signer._credentials
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "AWS_ACCESS_KEY_ID": credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
            "AWS_DEFAULT_REGION": rotated.cloud.region,
            "AWS_ENDPOINT_URL": rotated.cloud.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._second = 0
        self._parameters = rotated.cloud._parameters() | {"NamePrefix": "cli"}

    async def run(self, *arguments: str, status: int = 0) -> str:
        def call() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [self._program, *arguments],
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )

        done = await asyncio.to_thread(call)
        assert done.returncode == status, done
        return done.stdout + done.stderr

    async def deploy(self, *, status: int = 0, **changes: str) -> str:
        # The program names change sets after the second, and one name serves once.
        while int(time.time()) <= self._second:
            await asyncio.sleep(0.02)
        parameters = [f"{name}={value}" for name, value in (self._parameters | changes).items()]
        output = await self.run(
            *("cloudformation", "deploy", "--template-file", str(default_template()), "--stack-name", "cli"),
            *("--capabilities", "CAPABILITY_NAMED_IAM", "--parameter-overrides", *parameters),
            status=status,
        )
        self._second = int(time.time())  # the change set was made in this one, or before
        return output

    async def resources(self) -> set[str]:
        answer = await self.run("cloudformation", "list-stack-resources", "--stack-name", "cli")
        return {entry["LogicalResourceId"] for entry in json.loads(answer)["StackResourceSummaries"]}

    async def secret(self) -> dict[str, Any]:
        answer = await self.run("secretsmanager", "get-secret-value", "--secret-id", "cli/orders/db")
        value: dict[str, Any] = json.loads(json.loads(answer)["SecretString"])
        return value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cli(aws_cli: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cli]:
    state = tmp_path_factory.mktemp("cli")
    async with rotations(state) as running:
        yield Cli(aws_cli, running["orders"], state)


async def test_the_stack_is_deployed_updated_and_deleted_by_the_aws_cli(cli: Cli, tmp_path: Path) -> None:
    await cli.deploy(RotationPackageKey="")
    without = await cli.resources()
    assert not [name for name in without if name.startswith("OrdersRotation")]
    secret = await cli.secret()

    await cli.deploy()
    added = await cli.resources() - without
    assert added == {
        f"{service}Rotation{what}"
        for service in ("Orders", "Payments")
        for what in ("Log", "Role", "Function", "Permission")
    }
    assert await cli.secret() == secret

    assert "No changes to deploy" in await cli.deploy(status=255)

    await cli.deploy(RotationCaFile="/opt/database-ca.pem")
    called = tmp_path / "answer.json"
    await cli.run("lambda", "invoke", "--function-name", "cli-rotate-orders", "--payload", "{}", str(called))
    assert "event_malformed" in called.read_text()
    assert await cli.secret() == secret

    await cli.run("cloudformation", "delete-stack", "--stack-name", "cli")
    await cli.run("cloudformation", "wait", "stack-delete-complete", "--stack-name", "cli")
    assert "ResourceNotFoundException" in await cli.run(
        "lambda", "invoke", "--function-name", "cli-rotate-orders", str(called), status=255
    )
    assert "ResourceNotFoundException" in await cli.run(
        "secretsmanager", "get-secret-value", "--secret-id", "cli/orders/db", status=255
    )
