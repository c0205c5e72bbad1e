"""Keeps SPIRE's registration entries as they should be, for as long as it runs.

A script that registers once is of no use to a server that has lost its state, and one that registers twice
fails. This one looks every few seconds: an entry that is missing is made, one that differs is put right, and
one that nobody named is removed. It also keeps the bundle by which an agent that starts knows the server.

It asks over the server's private socket, with SPIRE's own program.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ztdev.errors import StackError
from ztdev.files import replace_file
from ztdev.options import TRUST_DOMAIN, spiffe_id

from .certificates import NODE_NAME
from .say import say

SOCKET = Path("/srv/spire/socket/api.sock")
BUNDLE = Path("/srv/spire/bundle/bundle.pem")
PROGRAM = "/opt/spire/bin/spire-server"

#: Written after each look that found everything right, or put it right: the health check reads its age.
LOOKED = Path("/tmp/looked")  # noqa: S108 - of this container alone

#: Seconds between two looks.
EVERY = 2.0

NODE_ID = f"spiffe://{TRUST_DOMAIN}/node"


class SpireFault(StackError):
    """The server does not answer, or refuses. The text is what it said."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A registration entry: who gets `spiffe_id`. Selectors are ``type:value``; all of them must hold."""

    id: str
    spiffe_id: str
    parent_id: str
    selectors: frozenset[str]

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> Entry:
        """As `spire-server entry show` writes it."""

        def name(member: Mapping[str, str]) -> str:
            return f"spiffe://{member['trust_domain']}{member['path']}"

        return cls(
            members["id"],
            name(members["spiffe_id"]),
            name(members["parent_id"]),
            frozenset(f"{each['type']}:{each['value']}" for each in members["selectors"]),
        )


def wanted(project: str, images: Mapping[str, str]) -> list[Entry]:
    """The entries of the compose project `project`: of each service in `images`, which runs that image.

    A container is known by what the engine says of it: its project, its service, and its image. An image
    that compose has built carries the first two as labels of its own, which every container of it inherits;
    that it is no one-off is said of the service's own containers alone.
    """
    node = Entry(
        "node",
        NODE_ID,
        f"spiffe://{TRUST_DOMAIN}/spire/server",
        frozenset({f"x509pop:subject:cn:{NODE_NAME}"}),
    )
    services = [
        Entry(
            service,
            spiffe_id(service),
            NODE_ID,
            frozenset(
                {
                    f"docker:label:com.docker.compose.project:{project}",
                    f"docker:label:com.docker.compose.service:{service}",
                    "docker:label:com.docker.compose.oneoff:False",
                    f"docker:image_id:{image}",
                }
            ),
        )
        for service, image in images.items()
    ]
    return [node, *services]


async def run() -> None:
    """Look, put right, and look again, until cancelled."""
    project = os.environ["COMPOSE_PROJECT_NAME"]
    entries = wanted(project, dict(line.split() for line in os.environ["WORKLOADS"].splitlines()))
    fault = ""
    while True:
        try:
            await _look(entries)
            fault = ""
            _mark(LOOKED)
        except SpireFault as error:
            if str(error) != fault:
                say("registrar", "waiting", detail=str(error))
            fault = str(error)
        await asyncio.sleep(EVERY)


async def _look(entries: Iterable[Entry]) -> None:
    _keep(await _ask("bundle", "show", "-format", "pem"))
    answer = json.loads(await _ask("entry", "show", "-output", "json"))
    found = {entry.id: entry for entry in map(Entry.from_json, answer["entries"])}
    named = {entry.id: entry for entry in entries}
    for entry in named.values():
        if found.get(entry.id) != entry:
            await _register(entry, "update" if entry.id in found else "create")
    for unknown in found.keys() - named.keys():
        await _ask("entry", "delete", "-entryID", unknown)
        say("registrar", "removed", id=found[unknown].spiffe_id)


async def _register(entry: Entry, verb: str) -> None:
    selectors = [word for selector in sorted(entry.selectors) for word in ("-selector", selector)]
    parent = ["-node"] if verb == "create" and entry.spiffe_id == NODE_ID else ["-parentID", entry.parent_id]
    await _ask("entry", verb, "-entryID", entry.id, "-spiffeID", entry.spiffe_id, *parent, *selectors)
    say("registrar", f"{verb}d", id=entry.spiffe_id, selectors=sorted(entry.selectors))


def _mark(file: Path) -> None:
    file.touch()


def _keep(bundle: str) -> None:
    if BUNDLE.exists() and BUNDLE.read_text() == bundle:
        return
    replace_file(BUNDLE, bundle.encode(), 0o644)
    say("registrar", "bundle", authorities=bundle.count("BEGIN CERTIFICATE"))


async def _ask(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *command,
        "-socketPath",
        str(SOCKET),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, fault = await process.communicate()
    if process.returncode != 0:
        raise SpireFault(f"{' '.join(command[:2])}: {(output + fault).decode(errors='replace').strip()}")
    return output.decode()
