"""Attacks that search: files and processes of the running stack, for what should not be there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.attacks.lab import Answer, Lab, Target

_LARGEST = 64 << 20


def files_of(lab: Lab, target: Target) -> Iterator[Path]:
    """Every file below the state directory but the databases' own; of the logs of services with something
    left out, that of `target` alone."""
    state = lab.stack.state
    for folder, folders, names in os.walk(state.path):
        here = Path(folder)
        if here == state.path:
            folders[:] = [name for name in folders if name not in ("postgres", "oidc", "cloud", "run")]
        for name in names:
            other = "-without-" in name and name.partition(".")[0] != target.name
            if not other and (here / name).is_file():
                yield here / name


def shared_files() -> Iterator[Path]:
    """What stands openly where every process may write."""
    for folder in ("/tmp", "/dev/shm"):
        yield from (Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))


def processes_of(lab: Lab) -> Iterator[Path]:
    """What the kernel shows of the services to whoever may look: command lines and environments."""
    for service in ("frontend", "orders", "payments"):
        pid = lab.stack.process(service).pid
        yield from (Path(f"/proc/{pid}/cmdline"), Path(f"/proc/{pid}/environ"))


def search(places: Iterable[Path], needles: Iterable[bytes]) -> Answer:
    """Succeeds where one of `needles` is found; says how many places were looked at when none is."""
    wanted = [needle for needle in needles if needle]
    looked = 0
    for place in places:
        try:
            with place.open("rb") as file:
                content = file.read(_LARGEST)
        except (FileNotFoundError, PermissionError):  # gone since it was listed, or somebody else's
            continue
        looked += 1
        if any(needle in content for needle in wanted):
            return Answer(status=200, body=f"found in {place.name}")
    return Answer(reason="nothing_found", error=f"{looked} places, nothing of {len(wanted)} secrets")
