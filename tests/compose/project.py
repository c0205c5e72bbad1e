"""The compose project under a name and a port of its own, on whatever Docker engine runs here.

One that a person has up is left alone; this one is taken down with its volumes at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ztdev.errors import StackError
from ztdev.inside import CONNECT, PYTHON
from ztdev.ports import choose_free_ports

ROOT = Path(__file__).parents[2]

#: Short lives, so that everything is renewed, or runs out, while somebody waits for it.
LIVES = {"SVID_TTL": "20s", "AGENT_TTL": "60s", "CA_TTL": "150s", "ROTATE_EVERY_SECONDS": "15"}

#: Where the page asks the lab, and where spans are sent, once somebody listens there (profiles `lab` and
#: `observe`); and what stands for the images of the latter where no registry is reached: the same programs,
#: made from their own sources.
PROFILES = {
    "LAB_SOCKET": "/run/lab/lab.sock",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://jaeger:4318",
    "PROMETHEUS_IMAGE": "zt-demo/prometheus:local",
    "JAEGER_IMAGE": "zt-demo/jaeger:local",
}

#: What the containers wrote, for whoever looks for the reason of a failure.
LOG = ROOT / "build" / "compose.log"

#: An image with Python in it, for what is tried from inside.
TOOLS = "zt-demo/dev:local"


class EngineFault(StackError):
    """The engine, or what it was asked for, failed. The text is what docker said."""


def docker(*arguments: str, timeout: float = 120, **more: Any) -> str:
    """What a docker command prints. Raises with what it said when it fails."""
    try:
        done = subprocess.run(
            ["docker", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **more,
        )
    except FileNotFoundError:
        raise EngineFault("There is no `docker` here: an engine with its compose plugin is needed.") from None
    if done.returncode != 0:
        said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}".strip()
        raise EngineFault(f"docker {' '.join(arguments[:4])}: {said}")
    return str(done.stdout)


def python_of(image: str) -> str:
    """The Python in an image of ours."""
    return "/srv/zt/.venv/bin/python" if image == TOOLS else PYTHON


def run_python(
    program: str, *arguments: str, options: Sequence[str] = (), image: str = TOOLS, given: str = ""
) -> str:
    """What a program prints in a container of its own; `options` are those of `docker run`, `given` is its
    standard input."""
    command = ("--entrypoint", python_of(image), image, "-c", program, *arguments)
    return docker("run", "--rm", "--interactive", *options, *command, input=given)


def probe(place: Sequence[str], targets: Sequence[tuple[str, int]]) -> list[str]:
    """What becomes of connections to `targets` (host, port), from a container with the options `place`."""
    outcomes: list[str] = json.loads(run_python(CONNECT, options=place, given=json.dumps(targets)))
    return outcomes


@dataclass
class Project:
    """A project that is up, or will be; `settings` are variables of docker-compose.yml."""

    name: str
    port: int
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        own = {"COMPOSE_PROJECT_NAME": self.name, "PAGE_PORT": str(self.port)}
        return {**os.environ, **LIVES, **PROFILES, **own, **self.settings}

    def compose(self, *arguments: str, timeout: float = 300) -> str:
        return docker("compose", *arguments, timeout=timeout, env=self.environment)

    def up(self) -> None:
        """Start it, or bring it back to what it should be, and wait until it is healthy."""
        try:
            self.compose("up", "--detach", "--wait", "--wait-timeout", "240", timeout=900)
        except EngineFault as error:
            raise EngineFault(f"{error}\n{self.logs()}") from None

    def logs(self, *services: str, lines: int = 15) -> str:
        return self.compose("logs", "--no-color", "--tail", str(lines), *services)

    @cached_property
    def services(self) -> list[str]:
        return self.compose("config", "--services").split()

    def container(self, service: str) -> dict[str, Any]:
        """What `docker inspect` says of the container of `service`, which may have ended."""
        name = self.compose("ps", "--all", "--quiet", service).strip()
        found: dict[str, Any] = json.loads(docker("inspect", name))[0]
        return found

    def addresses(self, service: str) -> list[str]:
        """Its address on each of its networks."""
        networks = self.container(service)["NetworkSettings"]["Networks"].values()
        return [network["IPAddress"] for network in networks if network["IPAddress"]]

    def network_of(self, service: str) -> tuple[str, ...]:
        """The options of a container that is where `service` is in the network."""
        return "--network", f"container:{self.container(service)['Id']}"

    def python(self, service: str, program: str, *arguments: str) -> str:
        """Run a program in the container of `service`, as its user."""
        python = self.container(service)["Config"]["Entrypoint"][0]
        return self.compose("exec", "-T", service, python, "-c", program, *arguments)


def gateways(project: str) -> list[str]:
    """This machine's own addresses towards containers: on the engine's network, and on the page's."""
    networks = json.loads(docker("network", "inspect", "bridge", f"{project}_edge"))
    return [config["Gateway"] for network in networks for config in network["IPAM"]["Config"]]


@contextmanager
def beside(project: Project, name: str, settings: Mapping[str, str]) -> Iterator[Project]:
    """Another project, of the images that `project` has built, with settings of its own."""
    (port,) = choose_free_ports(1)
    other = Project(f"{project.name}-{name}", port, settings)
    try:
        other.up()
        yield other
    finally:
        other.compose("down", "--volumes", "--timeout", "10")


@contextmanager
def running() -> Iterator[Project]:
    """Build the images, start it, and take it down."""
    (port,) = choose_free_ports(1)
    project = Project(f"zt-test-{os.getpid()}", port)
    docker("compose", "build", "--quiet", timeout=1200, env=project.environment)
    try:
        project.up()
        yield project
    finally:
        try:
            LOG.parent.mkdir(exist_ok=True)
            LOG.write_text(project.logs(lines=2000))
        finally:
            project.compose("--profile", "*", "down", "--volumes", "--timeout", "20")
