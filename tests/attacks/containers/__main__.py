"""`python -m tests.attacks.containers SOCKET`: the attack lab of the containers, for their page.

Profile `lab` of docker-compose.yml runs it. It needs the Docker engine, with which it makes its attackers,
and the machine's own network, on which one of them looks for somebody to talk to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
from pathlib import Path

from tests.attacks.catalogue import load_container_attacks
from tests.attacks.containers.container_lab import ContainerLab
from tests.attacks.serve import serve_lab
from tests.compose.project import Project


async def serve(socket: Path) -> None:
    """Serve until SIGTERM."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    with contextlib.suppress(FileNotFoundError):
        socket.unlink()  # of one that was killed
    lab = ContainerLab(Project(os.environ["COMPOSE_PROJECT_NAME"], int(os.environ["PAGE_PORT"])))
    os.umask(0)  # frontend has another user; nobody else has the volume
    async with serve_lab(lab, load_container_attacks(), socket):
        print(f"the attack lab is at {socket}", flush=True)
        await stopped.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.containers", description=__doc__)
    parser.add_argument("socket", type=Path, help="where it is asked")
    asyncio.run(serve(parser.parse_args().socket))


if __name__ == "__main__":
    main()
