"""The stand-in for AWS by itself: no database stands behind its secrets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ztdev.aws.cloud import DatabaseAddress, LocalCloud
from ztdev.aws.issuer import OidcIssuer
from ztdev.ports import choose_free_ports
from ztdev.state import default_tools_directory


@asynccontextmanager
async def cloud_alone(state: Path) -> AsyncIterator[LocalCloud]:
    """It runs, with what it writes in `state`."""
    async with OidcIssuer(state / "issuer") as issuer:
        cloud = LocalCloud(
            state / "cloud",
            port=choose_free_ports(1)[0],
            issuer=issuer,
            log_file=state / "aws.log",
            databases={name: DatabaseAddress("127.0.0.1", 5432) for name in ("orders", "payments")},
            environment_dir=default_tools_directory() / "aws-env",
        )
        async with cloud:
            yield cloud
