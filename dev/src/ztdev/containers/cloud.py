"""The local AWS beside containers: the gate, the logins of the databases, and their rotation.

In docker compose web identities are JWT-SVIDs: the issuer is SPIRE, and its keys are fetched from its OIDC
discovery provider. On a cluster they are tokens of service accounts, and the cluster is the issuer. When the
gate ends it is started again, empty, with new passwords; the databases are told, and the services read their
secrets anew.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

from ztdev.aws.cloud import DatabaseAddress, LocalCloud, RotationFunction
from ztdev.aws.issuer import Issuer
from ztdev.control import Control, Request, ask
from ztdev.functions import kept
from ztdev.logins import set_passwords
from ztdev.options import DATABASE_SERVICES, TRUST_DOMAIN
from ztdev.postgres import Administration
from ztdev.rotation import Rotation, Rotations
from ztdev.state import default_tools_directory

from .certificates import DATABASE, ISSUER, ISSUER_HOST
from .say import say

PORT = 4566
CA_FILE = DATABASE / "authority" / "ca.pem"
ISSUER_CA_FILE = ISSUER / "authority" / "ca.pem"
#: Whose tokens are taken, by default: SPIRE's.
SPIRE = Issuer(
    url=f"https://{ISSUER_HOST}",
    ca_file=ISSUER_CA_FILE,
    resolve={f"{ISSUER_HOST}:443": f"{ISSUER_HOST}:8443"},
)

#: There while the secrets can be read and the databases know them: the health check looks for it.
READY = Path("/tmp/ready")  # noqa: S108 - of this container alone

#: Where `rotate` asks; nobody else in this container, and nobody outside.
CONTROL = Path("/tmp/control")  # noqa: S108 - of this container alone

#: Seconds that a rotation may take, tried again and again.
_ROTATE_WITHIN = 120.0

#: Seconds between two tries of something that is not there yet.
AGAIN = 0.5


async def run() -> None:
    """Serve until cancelled."""
    _mark(ready=False)
    database = Administration(Path("/var/run/postgresql"), 5432, DATABASE / "administrator" / "password")
    package = await asyncio.to_thread(kept, default_tools_directory() / "packages")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        issuer, trust_domain = _issuer()
        name, address = os.environ.get("CLOUD_NAME", "cloud"), os.environ.get("DB_HOST", "postgres")
        cloud = LocalCloud(
            folder / "cloud",
            host="0.0.0.0",  # noqa: S104 - on the networks of those who have a role
            port=PORT,
            names=(f"{name}:{PORT}",),
            issuer=issuer,
            spiffe_trust_domain=trust_domain,
            log_file=None,
            databases={service: DatabaseAddress(address, 5432) for service in DATABASE_SERVICES},
            rotation=RotationFunction(package.file, CA_FILE),
            environment_dir=default_tools_directory() / "aws-env",
        )
        stack.push_async_callback(cloud.stop)
        every = float(os.environ.get("ROTATE_EVERY_SECONDS", "60"))
        rotations = Rotations(cloud, DATABASE_SERVICES, every, _record)
        _make(CONTROL)
        control = Control(CONTROL, {"rotate": _rotate(rotations)})
        await control.start()
        stack.push_async_callback(control.close)
        deployed = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(_keep_running(cloud, database, rotations, deployed))
            await deployed.wait()
            if every:
                group.create_task(rotations.run())


def _issuer() -> tuple[Issuer, str]:
    """Whose tokens are taken, and the trust domain when these are JWT-SVIDs: SPIRE's, or on a cluster, whose
    address is then ISSUER_URL and authority ISSUER_CA_FILE, its own."""
    url = os.environ.get("ISSUER_URL")
    if url is None:
        return SPIRE, TRUST_DOMAIN
    host = f"{urlsplit(url).hostname}:{urlsplit(url).port or 443}"
    return Issuer(url, Path(os.environ["ISSUER_CA_FILE"]), {host: host}), ""


async def _keep_running(
    cloud: LocalCloud, database: Administration, rotations: Rotations, deployed: asyncio.Event
) -> None:
    while True:
        async with rotations.held():
            await cloud.start(lambda text: say("cloud", "step", detail=text))
            await _tell(cloud, database)
        await rotations.schedule()
        _mark(ready=True)
        deployed.set()
        say("cloud", "ready")
        code = await cloud.wait()
        _mark(ready=False)
        say("cloud", "ended", status=code)
        await asyncio.sleep(AGAIN)


async def _tell(cloud: LocalCloud, database: Administration) -> None:
    """Tell the databases the passwords, as soon as there is a database."""
    said = ""
    while True:
        try:
            await database.close_shared_databases()
            await set_passwords(cloud, database, DATABASE_SERVICES)
            return
        except* (psycopg.OperationalError, OSError) as faults:
            text = str(faults.exceptions[0])
            if text != said:
                say("cloud", "waiting", detail=text)
            said = text
        await asyncio.sleep(AGAIN)


def rotate(services: Iterable[str]) -> None:
    """Rotate the logins of `services` now, and say what became of it; in the container that runs `cloud`."""
    for service in services:
        answer = ask(CONTROL, "rotate", timeout=_ROTATE_WITHIN, service=service, cut_off_at=None)
        print(f"{service}: {Rotation.from_dict(answer)}", flush=True)


def _make(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)


def _mark(*, ready: bool) -> None:
    if ready:
        READY.touch()
    else:
        READY.unlink(missing_ok=True)


def _record(event: str, **facts: Any) -> None:
    say("rotation", event, **facts)


def _rotate(rotations: Rotations) -> Any:
    async def rotate(request: Request) -> dict[str, Any]:
        rotation = await rotations.rotate(request["service"], cut_off_at=request["cut_off_at"])
        return rotation.as_dict()

    return rotate
