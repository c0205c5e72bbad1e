"""The database's logins, as the secrets say them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from .aws.cloud import LocalCloud
from .options import NAME_PREFIX
from .postgres import Administration


def secret(service: str) -> str:
    """The name of a service's secret."""
    return f"{NAME_PREFIX}/{service}/db"


def owner_secret(service: str) -> str:
    """The name of the secret of its migrations."""
    return f"{NAME_PREFIX}/{service}/db-owner"


def rotator_secret(service: str) -> str:
    """The name of the secret of its rotation."""
    return f"{NAME_PREFIX}/{service}/db-rotator"


async def set_passwords(cloud: LocalCloud, database: Administration, services: Iterable[str]) -> None:
    """After a deployment the secrets say which passwords, and the database is told."""

    async def of(service: str) -> None:
        app, owner, rotator = await asyncio.gather(
            cloud.secret_value(secret(service)),
            cloud.secret_value(owner_secret(service)),
            cloud.secret_value(rotator_secret(service)),
        )
        await database.ensure_service(
            service,
            app_password=app["password"],
            owner_password=owner["password"],
            rotator_password=rotator["password"],
        )

    async with asyncio.TaskGroup() as group:
        for service in services:
            group.create_task(of(service))
