"""The lab of the containers: attackers in the place of a service that was broken into, or beside it.

An attacker is a container that is made for one try. It has what the service has, as the engine tells it: its
network, its image, its user, its volumes; and is held as the service is, but for what is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from tests.attacks.lab import Answer, LeftOut, Target
from tests.compose.project import Project, probe, run_python

#: Around a function `deed` of the errand, which is what an attacker does: the reason is the name of an errno.
DEED = """
import errno, json, sys
{program}
try:
    answer = {{"status": 200, "body": deed(**json.load(sys.stdin))}}
except OSError as error:
    answer = {{"reason": errno.errorcode[error.errno], "error": str(error)}}
print(json.dumps(answer))
"""

Place = tuple[str, ...]
"""Where an attacker's container is, and how it is held: options of `docker run`."""


class ContainerLab:
    """The project that is up, and what attackers need of it."""

    def __init__(self, project: Project) -> None:
        self.project = project

    async def run(self, program: str, errand: Mapping[str, Any], place: Place, image: str) -> Answer:
        """Run `program`, a text, in a container at `place`; what it prints as JSON is the answer."""
        told = await asyncio.to_thread(
            run_python, program, options=place, image=image, given=json.dumps(errand)
        )
        return Answer(**json.loads(told))

    async def do(self, program: str, errand: Mapping[str, Any], place: Place, image: str) -> Answer:
        """The same for a `program` that is a function `deed` (see `DEED`)."""
        return await self.run(DEED.format(program=program), errand, place, image)

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

    async def network_of(self, service: str) -> Place:
        """Where `service` is in the network."""
        return await asyncio.to_thread(self.project.network_of, service)

    async def connect(self, place: Place, service: str, port: int) -> Answer:
        """Somebody at `place` calls every address of `service`."""
        addresses = await asyncio.to_thread(self.project.addresses, service)
        return await self.call(place, [(address, port) for address in addresses])

    async def call(self, place: Place, targets: Sequence[tuple[str, int]]) -> Answer:
        """Somebody at `place` calls all of `targets`; that nobody is there proves nothing."""
        outcomes = await asyncio.to_thread(probe, place, targets)
        told = ", ".join(f"{host} {outcome}" for (host, _), outcome in zip(targets, outcomes, strict=True))
        if "connected" in outcomes:
            return Answer(status=200, body=told)
        return Answer(reason="no_route" if set(outcomes) == {"unreachable"} else "nobody_there", error=told)


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
