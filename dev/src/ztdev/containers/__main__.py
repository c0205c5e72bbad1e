"""`python -m ztdev.containers PART`: one container each."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import psycopg
from botocore.exceptions import BotoCoreError, ClientError

from ztdev.aws.environment import ensure_environment
from ztdev.errors import StackError
from ztdev.functions import kept
from ztdev.options import DATABASE_SERVICES
from ztdev.state import default_tools_directory

from . import certificates, cloud, databases, registrar

_CERTIFICATES = {
    "database-certificate": certificates.database,
    "node-certificate": certificates.node,
    "issuer-certificate": certificates.issuer,
}

_RUN = {"registrar": registrar.run, "cloud": cloud.run, "databases": databases.run}

PARTS = ("tools", *_CERTIFICATES, *_RUN, "rotate")


def main() -> int:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(prog="python -m ztdev.containers", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("service", nargs="*", help="of `rotate`: whose logins (default: all)")
    arguments = parser.parse_args()
    part = arguments.part
    if unknown := set(arguments.service) - set(DATABASE_SERVICES):
        parser.error(f"{sorted(unknown)[0]!r} has no database: {' and '.join(DATABASE_SERVICES)} have")
    status = 0
    try:
        if part == "tools":
            _make_tools()
        elif part in _CERTIFICATES:
            _CERTIFICATES[part]()
        elif part == "rotate":
            cloud.rotate(arguments.service or DATABASE_SERVICES)
        else:
            asyncio.run(_until_terminated(_RUN[part]()))
    except* (
        StackError,
        OSError,
        psycopg.Error,
        BotoCoreError,
        ClientError,
    ) as faults:  # parts run tasks in groups
        print(f"{part}: {faults.exceptions[0]}", file=sys.stderr)
        status = 1
    return status


def _make_tools() -> None:
    """While the image is built: what needs the package index."""
    tools = default_tools_directory()
    asyncio.run(ensure_environment(tools / "aws-env", print))
    print(kept(tools / "packages").file)


async def _until_terminated(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    sys.exit(main())
