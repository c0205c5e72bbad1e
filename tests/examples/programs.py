"""Programs of the examples, as their reader runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ztmtls.listen import bind
from ztmtls.testing import BackgroundWorkloadApi, CertificateAuthority, Workload

EXAMPLES = Path(__file__).parents[2] / "libs" / "ztmtls" / "examples"


@dataclass
class Program:
    """A program that runs, and all that it has said so far."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str | Callable[[], str], timeout: float = 60) -> None:
        """Wait until it says `text`."""
        deadline = time.monotonic() + timeout
        while (wanted := text if isinstance(text, str) else text()) not in self.said:
            assert time.monotonic() < deadline, f"never said {wanted!r}, but: {self.said}"
            ended = self.process.poll()
            assert ended is None or wanted in self.said, f"ended with {ended}: {self.said}"
            time.sleep(0.05)

    def wait_for_end(self, timeout: float = 60) -> int:
        return self.process.wait(timeout)


@dataclass
class Programs:
    """All programs of a test; `stop` ends them."""

    directory: Path
    started: list[Program] = field(default_factory=list)

    def run(self, *command: str, endpoint: str | None = None) -> Program:
        """Start Python with `command`, in an environment that holds nothing but the Workload API."""
        output = self.directory / f"{len(self.started)}.txt"
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
        if endpoint is not None:
            environment["SPIFFE_ENDPOINT_SOCKET"] = endpoint
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.started.append(Program(process, output))
        return self.started[-1]

    def stop(self) -> None:
        for program in self.started:
            program.process.terminate()
        for program in self.started:
            try:
                program.process.wait(10)
            except subprocess.TimeoutExpired:
                program.process.kill()
                program.process.wait()


@dataclass
class Machine:
    """A Workload API and the programs on it."""

    programs: Programs
    background: BackgroundWorkloadApi
    ca: CertificateAuthority = field(default_factory=lambda: CertificateAuthority("example.org"))

    def workload(self, name: str) -> Workload:
        return self.background.api.workloads[name]

    def add(self, name: str) -> None:
        async def add() -> None:
            added = await self.background.api.add_workload(name, f"spiffe://example.org/{name}", ca=self.ca)
            added.allow(uid=os.getuid())

        self.background.run(add)

    def run(self, identity: str, *command: str) -> Program:
        return self.programs.run(*command, endpoint=self.workload(identity).endpoint)


def free_port() -> int:
    with bind("127.0.0.1", 0, "PORT") as sock:
        return int(sock.getsockname()[1])


def example(command: list[str]) -> list[str]:
    return [str(EXAMPLES / command[0]), *command[1:]]
