"""The lab of the containers: attackers in the place of a service that was broken into, or beside it.

An attacker is a container that is made for one try. It has what the service has, as the engine tells it: its
network, its image, its user, its volumes; and is held as the service is, but for what is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from tests.attacks.lab import Answer, LeftOut, Target
from tests.compose.project import TOOLS, Project

CONNECT = """
import errno, json, socket, sys
answer = {"reason": "NO_ADDRESS", "error": "nobody to call"}
for host, port in json.loads(sys.stdin.read())["targets"]:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        reason = errno.errorcode.get(error.errno, "TIMED_OUT") if error.errno else "TIMED_OUT"
        answer = {"reason": "no_route", "error": f"{host}: {reason} {error}"}
    else:
        answer = {"status": 200, "body": f"connected to {host}:{port}"}
        break
print(json.dumps(answer))
"""


Place = tuple[str, ...]
"""Where an attacker's container is, and how it is held: options of `docker run`."""


class ContainerLab:
    """The project that is up, and what attackers need of it."""

    def __init__(self, project: Project) -> None:
        self.project = project

    async def run(
        self, program: str, errand: Mapping[str, Any], *options: str, image: str = TOOLS, python: str = ""
    ) -> Answer:
        """Run `program`, a text, in a container of its own; what it prints as JSON is the answer."""
        process = await asyncio.create_subprocess_exec(
            *("docker", "run", "--rm", "--interactive", *options),
            *("--entrypoint", python or "/srv/zt/.venv/bin/python", image, "-c", program),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, fault = await process.communicate(json.dumps(errand).encode())
        if process.returncode != 0:
            raise RuntimeError(f"the attacker's container: {fault.decode(errors='replace')[-1000:]}")
        return Answer(**json.loads(output))

    async def container(self, service: str) -> dict[str, Any]:
        """What `docker inspect` says of the container of `service`."""
        return await asyncio.to_thread(self.project.container, service)

    async def held_as(
        self, service: str, *, read_only: bool = True, capless: bool = True, user: str = ""
    ) -> Place:
        """A place of its own, held as the container of `service` is, with its volumes and no network."""
        found = await self.container(service)
        host, config = found["HostConfig"], found["Config"]
        options = ["--network", "none", "--volumes-from", found["Id"], "--user", user or config["User"]]
        if host["ReadonlyRootfs"] and read_only:
            options += ["--read-only"]
        options += [word for name in (host["CapDrop"] or ()) if capless for word in ("--cap-drop", name)]
        options += [word for each in (host["SecurityOpt"] or ()) for word in ("--security-opt", each)]
        options += [word for path in (host["Tmpfs"] or ()) for word in ("--tmpfs", path)]
        return tuple(options)

    async def addresses(self, service: str) -> list[str]:
        """Its address on each of its networks."""
        networks = (await self.container(service))["NetworkSettings"]["Networks"]
        return [network["IPAddress"] for network in networks.values() if network["IPAddress"]]

    async def network_of(self, service: str) -> Place:
        """Where `service` is in the network."""
        return "--network", f"container:{(await self.container(service))['Id']}"

    async def connect(self, place: Place, service: str, port: int) -> Answer:
        """Somebody at `place` calls every address of `service`."""
        targets = [(address, port) for address in await self.addresses(service)]
        return await self.run(CONNECT, {"targets": targets}, *place)


def at(place: Place) -> Target:
    """An attacker at `place`, of whom nobody writes anything down."""
    return Target("attacker", 0, list, place=place)


@contextlib.asynccontextmanager
async def in_the_network_of(
    lab: ContainerLab, left_out: LeftOut, service: str, segment: str
) -> AsyncIterator[Target]:
    """In the place of `service`; with something left out, on the network `segment`, which that has not."""
    strange = "--network", f"{lab.project.name}_{segment}"
    yield at(strange if left_out else await lab.network_of(service))
