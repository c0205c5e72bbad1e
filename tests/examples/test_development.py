"""The Workload API for development, in one command."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.programs import Programs, example, free_port


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    programs = Programs(tmp_path)
    yield programs
    programs.stop()


def test_examples_run_on_it_and_see_rotations(programs: Programs) -> None:
    api = programs.run("-m", "ztmtls.testing", "server", "client", "--svid-ttl", "4")
    api.wait_for("client.sock\n")
    sockets = dict(re.findall(r"# (\S+)\nexport SPIFFE_ENDPOINT_SOCKET=(\S+)", api.said))
    assert set(sockets) == {"spiffe://example.org/server", "spiffe://example.org/client"}
    server, client = (sockets[f"spiffe://example.org/{name}"] for name in ("server", "client"))

    port = str(free_port())
    serving = programs.run(*example(["blocking_sockets.py", "server", "--port", port]), endpoint=server)
    serving.wait_for("serving on")
    calling = programs.run(
        *example(["blocking_sockets.py", "client", "--port", port, "--every", "0.1"]), endpoint=client
    )

    calling.wait_for("hello, spiffe://example.org/client")
    renewal = "svid_renewed spiffe://example.org/client serial "
    api.wait_for(renewal)
    calling.wait_for(
        lambda: f"hello, spiffe://example.org/client {api.said.rpartition(renewal)[2].split()[0]}"
    )


def test_ctrl_c_ends_it_and_leaves_nothing(programs: Programs, tmp_path: Path) -> None:
    directory = tmp_path / "api"
    api = programs.run("-m", "ztmtls.testing", "server", "--directory", str(directory))
    api.wait_for("server.sock\n")
    assert (directory / "server.sock").is_socket()

    api.process.send_signal(signal.SIGINT)

    assert api.wait_for_end() == 0, api.said
    assert not directory.exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["a/b"], "can't be a workload's name"),
        (["a", "a"], "there is a workload 'a' already"),
        (["a", "--trust-domain", "A_B"], "invalid_spiffe_id"),
        (["a", "--svid-ttl", "0"], "from 1 to 86400 seconds"),
        (["a", "--directory", "/usr"], "mode 700"),
    ],
)
def test_what_cannot_be_done_is_one_line(programs: Programs, arguments: list[str], why: str) -> None:
    api = programs.run("-m", "ztmtls.testing", *arguments)
    assert api.wait_for_end() not in (0, None)
    assert why in api.said
    assert "Traceback" not in api.said
