"""What the tests of the rotation share: a database, the stand-in for AWS, and the function deployed in it."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from ztdev.aws.cloud import DatabaseAddress, LocalCloud, RotationFunction
from ztdev.aws.issuer import OidcIssuer
from ztdev.functions import build
from ztdev.ports import choose_free_ports
from ztdev.postgres import PostgresServer
from ztdev.state import default_state_directory

STEPS = ("createSecret", "setSecret", "testSecret", "finishSecret")
SERVICES = ("orders", "payments")


@dataclass
class Invocation:
    """How a step ended: `error` is the text of the function's exception, None when it did its work."""

    error: str | None
    log: str

    @property
    def reason(self) -> str | None:
        return self.error.partition(":")[0] if self.error else None


@dataclass
class Rotated:
    """A service's secret, its database, and the function, called as Secrets Manager calls it."""

    service: str
    cloud: LocalCloud
    postgres: PostgresServer
    logs: list[str] = field(default_factory=list)
    passwords: set[str] = field(default_factory=set)
    clients: dict[str, Any] = field(default_factory=dict)

    @property
    def secret_id(self) -> str:
        return self.cloud.outputs[f"{self.service.capitalize()}DatabaseSecretArn"]

    @property
    def rotator_id(self) -> str:
        return self.cloud.outputs[f"{self.service.capitalize()}RotatorSecretArn"]

    @property
    def function(self) -> str:
        return self.cloud.outputs[f"{self.service.capitalize()}RotationFunctionArn"]

    def client(self, service: str) -> Any:
        """The administrator's; made once, since that takes longer than most calls."""
        if service not in self.clients:
            self.clients[service] = self.cloud.admin_client(service)
        return self.clients[service]

    async def secrets_manager(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """A call as the administrator, on this secret unless another is named."""
        call = getattr(self.client("secretsmanager"), operation)
        answer: dict[str, Any] = await asyncio.to_thread(call, **{"SecretId": self.secret_id} | parameters)
        return answer

    async def begin(self) -> str:
        """RotateSecret: an empty version that is AWSPENDING. The answer is its ID."""
        answer = await self.secrets_manager(
            "rotate_secret",
            ClientRequestToken=secrets.token_hex(16),
            RotationLambdaARN=self.function,
            RotationRules={"ScheduleExpression": "rate(1 day)"},
        )
        version: str = answer["VersionId"]
        return version

    async def give_up(self, token: str) -> None:
        """Take AWSPENDING away, as CancelRotateSecret's documentation says for a rotation that is stuck."""
        if "AWSPENDING" in (await self.stages()).get(token, []):
            await self.secrets_manager(
                "update_secret_version_stage", VersionStage="AWSPENDING", RemoveFromVersionId=token
            )

    async def invoke(self, step: str, token: str, **changes: Any) -> Invocation:
        event = {"Step": step, "SecretId": self.secret_id, "ClientRequestToken": token} | changes
        client = self.client("lambda")

        def call() -> Invocation:
            answer = client.invoke(
                FunctionName=self.function.rpartition(":")[2],
                Payload=json.dumps(event).encode(),
                LogType="Tail",
            )
            body = json.loads(answer["Payload"].read() or b"null")
            log = base64.b64decode(answer.get("LogResult", "")).decode()
            error = body["errorMessage"] if answer.get("FunctionError") else None
            return Invocation(error, log)

        done = await asyncio.to_thread(call)
        self.logs.append(f"{done.log}\n{done.error}")
        return done

    async def step(self, step: str, token: str) -> Invocation:
        """One that must succeed."""
        done = await self.invoke(step, token)
        assert done.error is None, done
        return done

    async def rotate(self, token: str | None = None, steps: tuple[str, ...] = STEPS) -> str:
        token = token or await self.begin()
        for step in steps:
            await self.step(step, token)
        return token

    async def stages(self) -> dict[str, list[str]]:
        """Labels by version; versions without one are left out, as on AWS."""
        answer = await self.secrets_manager("describe_secret")
        return {version: sorted(labels) for version, labels in answer["VersionIdsToStages"].items() if labels}

    async def value(self, stage: str = "AWSCURRENT") -> dict[str, Any]:
        answer = await self.secrets_manager("get_secret_value", VersionStage=stage)
        value: dict[str, Any] = json.loads(answer["SecretString"])
        if isinstance(value, dict) and isinstance(value.get("password"), str):
            self.passwords.add(value["password"])
        return value

    async def put(self, value: Mapping[str, Any] | str, stage: str, token: str) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        await self.secrets_manager(
            "put_secret_value", ClientRequestToken=token, SecretString=text, VersionStages=[stage]
        )

    async def login(self, value: Mapping[str, Any]) -> str:
        """Log in with a version of the secret and use a table. The answer is the user's name."""

        def call() -> str:
            with self.connect(value["username"], value["password"]) as connection:
                connection.execute("INSERT INTO things DEFAULT VALUES")
                row = connection.execute("SELECT current_user").fetchone()
                assert row is not None
                return str(row[0])

        return await asyncio.to_thread(call)

    def connect(self, user: str, password: str, **changes: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(
            **{
                "host": self.postgres.host,
                "port": self.postgres.port,
                "dbname": self.service,
                "user": user,
                "password": password,
                "sslmode": "verify-full",
                "sslrootcert": str(self.postgres.ca_file),
                "autocommit": True,
                **changes,
            }
        )

    async def begin_anew(self) -> None:
        """The state that a deployment ends in: the database has the passwords that the secrets say."""
        value = await self.value()
        for name in (f"{self.service}_app", f"{self.service}_app_clone"):
            other = secrets.token_hex(20)
            await self.postgres.set_password(name, value["password"] if name == value["username"] else other)
        for token, labels in (await self.stages()).items():
            if labels == ["AWSPENDING"]:
                await self.give_up(token)


@asynccontextmanager
async def rotations(state: Path, names: Collection[str] = ()) -> AsyncIterator[dict[str, Rotated]]:
    """Both services' rotations, each with a table `things` in its database. `names`: see `LocalCloud`."""
    database_port, cloud_port = choose_free_ports(2)
    package = await asyncio.to_thread(build, state / "package")
    postgres = PostgresServer(state / "postgres", database_port, log_file=state / "postgres.log")
    async with postgres, OidcIssuer(state / "issuer") as issuer:
        cloud = LocalCloud(
            state / "cloud",
            port=cloud_port,
            issuer=issuer,
            log_file=state / "aws.log",
            databases={name: DatabaseAddress("127.0.0.1", database_port) for name in SERVICES},
            rotation=RotationFunction(package.file, postgres.ca_file),
            environment_dir=default_state_directory() / "aws-env",
            names=names,
        )
        async with cloud:
            for service in SERVICES:
                app, owner, rotator = [
                    (await cloud.secret_value(f"zt-demo/{service}/{name}"))["password"]
                    for name in ("db", "db-owner", "db-rotator")
                ]
                await postgres.ensure_service(
                    service, app_password=app, owner_password=owner, rotator_password=rotator
                )
                rotated = Rotated(service, cloud, postgres)
                with rotated.connect(f"{service}_owner", owner) as connection:
                    connection.execute("CREATE TABLE things (id int GENERATED ALWAYS AS IDENTITY)")
            yield {service: Rotated(service, cloud, postgres) for service in SERVICES}
