"""Once: the roles in databases that somebody else runs, with the passwords of the secrets.

On EKS the databases are RDS's, reachable from inside the network alone, and their administrators' logins are
in Secrets Manager. So a job inside makes the roles (`ztdev.postgres.roles`), before the first rotation:
afterwards a secret tells of one of the twins only.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import boto3
import psycopg

from ztdev.errors import StackError
from ztdev.logins import owner_secret, rotator_secret, secret
from ztdev.options import DATABASE_SERVICES
from ztdev.postgres import roles

from .say import say

#: Reads a secret: its name or ARN to its fields.
Read = Callable[[str], Mapping[str, Any]]


class RotationBegan(StackError):
    """The secret of a service names the other twin: its passwords are the rotation's to set."""


async def make_roles(service: str, administrator: str, read: Read, ca_file: Path) -> None:
    """Make the roles of `service` in its database, or bring them back to what they should be, as the
    administrator whose secret is `administrator` (``username``, ``password``: what RDS keeps there).

    Raises:
        RotationBegan: nothing was changed.
        psycopg.Error: the database cannot be reached, does not prove its name, or refuses.
    """
    app, owner, rotator = (read(name(service)) for name in (secret, owner_secret, rotator_secret))
    if app["username"] != roles.ServiceRoles(service).app:
        raise RotationBegan(f"rotation_began: {secret(service)} is of {app['username']}: nothing was changed")
    login = read(administrator)

    @asynccontextmanager
    async def connect(_: str) -> AsyncIterator[roles.Connection]:
        """To the service's database, whichever is asked for: it is there, and has no neighbour."""
        connection = await psycopg.AsyncConnection.connect(
            host=app["host"],
            port=app["port"],
            dbname=app["dbname"],
            user=login["username"],
            password=login["password"],
            sslmode="verify-full",
            sslrootcert=str(ca_file),
            ssl_min_protocol_version="TLSv1.3",
            sslcertmode="disable",
            gssencmode="disable",
            require_auth="scram-sha-256",
            channel_binding="require",
            connect_timeout=10,
            application_name="ztdev",
            autocommit=True,
        )
        async with connection:
            yield connection

    await roles.ensure_service(
        connect,
        service,
        app_password=app["password"],
        owner_password=owner["password"],
        rotator_password=rotator["password"],
    )
    async with connect(app["dbname"]) as connection:
        await roles.close_shared_databases(connection)


async def run() -> None:
    """Make those of every service. Settings: ``SERVICE_ADMINISTRATOR_SECRET`` for each, ``DB_CA_FILE``,
    ``AWS_REGION``, and a role by web identity."""
    client = boto3.client("secretsmanager", region_name=os.environ["AWS_REGION"])

    def read(name: str) -> Mapping[str, Any]:
        fields: Mapping[str, Any] = json.loads(client.get_secret_value(SecretId=name)["SecretString"])
        return fields

    for service in DATABASE_SERVICES:
        administrator = os.environ[f"{service.upper()}_ADMINISTRATOR_SECRET"]
        await make_roles(service, administrator, read, Path(os.environ["DB_CA_FILE"]))
        say("databases", "made", service=service)
