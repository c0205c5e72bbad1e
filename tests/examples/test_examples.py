"""Each example runs as its reader runs it: two programs, each with a Workload API socket of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.examples.programs import EXAMPLES, Machine, Program, Programs, example, free_port
from ztmtls.testing import BackgroundWorkloadApi

PAIRS = {
    "asyncio streams": (["asyncio_streams.py", "server"], ["asyncio_streams.py", "client"]),
    "blocking sockets": (["blocking_sockets.py", "server"], ["blocking_sockets.py", "client"]),
    "gRPC": (["grpc_server.py"], ["grpc_client.py"]),
    "aiohttp to aiohttp": (["aiohttp_server.py"], ["aiohttp_client.py"]),
    "requests to aiohttp": (["aiohttp_server.py"], ["requests_client.py"]),
    "httpx to Starlette": (["starlette_server.py"], ["httpx_client.py"]),
}
CLIENT, SERVER, STRANGER = (f"spiffe://example.org/{name}" for name in ("client", "server", "stranger"))


@dataclass
class Pair:
    """A server of one example that is serving, and the way to start its client."""

    machine: Machine
    server: Program
    client: list[str]
    port: int

    def call(self, identity: str = "client", *more: str) -> Program:
        return self.machine.run(identity, *self.client, "--port", str(self.port), *more)


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    server, client = PAIRS[request.param]
    with BackgroundWorkloadApi() as background:
        machine = Machine(Programs(tmp_path_factory.mktemp("programs")), background)
        for name in ("server", "client", "stranger"):
            machine.add(name)
        try:
            port = free_port()
            started = machine.run("server", *example(server), "--port", str(port))
            started.wait_for("serving on")
            yield Pair(machine, started, example(client), port)
        finally:
            machine.programs.stop()


def test_the_rightful_client_is_served(pair: Pair) -> None:
    client = pair.call()

    assert client.wait_for_end() == 0, client.said
    assert f"hello, {CLIENT}" in client.said
    assert f"from {SERVER}" in client.said


def test_another_client_is_refused_with_the_reason(pair: Pair) -> None:
    rightful, other = pair.call(), pair.call("stranger")

    assert rightful.wait_for_end() == 0, rightful.said
    assert other.wait_for_end() == 1
    assert "hello, " not in other.said  # the greeting
    pair.server.wait_for('"reason": "caller_not_allowed"')


def test_another_server_is_refused_with_the_reason(pair: Pair) -> None:
    rightful, other = pair.call(), pair.call("client", "--peer", STRANGER)

    assert rightful.wait_for_end() == 0, rightful.said
    assert other.wait_for_end() == 1
    assert "hello, " not in other.said  # the greeting
    assert "wrong_server_identity" in other.said


def test_both_follow_a_rotation_of_everything(pair: Pair) -> None:
    machine, ca = pair.machine, pair.machine.ca
    client = pair.call("client", "--every", "0.1")
    client.wait_for(lambda: f"{CLIENT} {machine.workload('client').svid.serial}")

    machine.background.run(ca.prepare)
    machine.background.run(ca.activate)
    for name in ("server", "client"):
        machine.background.run(machine.workload(name).rotate)
    # The old authority goes: neither side accepts a certificate of before any more.
    client.wait_for(lambda: f"{CLIENT} {machine.workload('client').svid.serial}")
    machine.background.run(ca.retire)
    machine.background.run(machine.workload("client").rotate)

    client.wait_for(lambda: f"{CLIENT} {machine.workload('client').svid.serial}")


@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLES.glob("*_*.py")))
def test_each_example_explains_itself(file: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / file, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "SPIFFE_ENDPOINT_SOCKET" in done.stdout


def test_the_table_names_each_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert {path.name for path in EXAMPLES.glob("*_*.py")} == {
        name for name in os.listdir(EXAMPLES) if f"`{name}`" in table and "_" in name
    }
