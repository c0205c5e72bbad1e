"""Processes are named by id and start time, and ended without ever touching a stranger."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ztdev.processes import ProcessRef, end_processes, port_is_free, port_owner, wait_gone

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True); time.sleep(600)",
]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with _running(SLEEPER) as process:
        yield process


@contextlib.contextmanager
def _running(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_reference_survives_a_round_trip_through_the_state_file(sleeper: subprocess.Popen[bytes]) -> None:
    reference = ProcessRef.of(sleeper.pid)
    assert reference is not None
    assert reference.alive()
    assert ProcessRef.parse(reference.as_dict()) == reference


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {},
        {"pid": "7", "start_time": 1, "boot": "b"},
        {"pid": 1, "start_time": 1, "boot": "b"},
        {"pid": -1, "start_time": 1, "boot": "b"},
        {"pid": 7, "start_time": None, "boot": "b"},
    ],
)
def test_damaged_reference_names_nobody(damaged: object) -> None:
    assert ProcessRef.parse(damaged) is None


async def test_recycled_process_id_is_not_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    actual = ProcessRef.of(sleeper.pid)
    assert actual is not None
    for stranger in (replace(actual, start_time=actual.start_time - 1), replace(actual, boot="another boot")):
        assert not stranger.alive()
        assert stranger.signal(signal.SIGKILL) is False
        assert await end_processes([stranger], grace=0.1) == []
    assert sleeper.poll() is None


async def test_ended_process_is_gone_even_while_its_parent_has_not_waited(
    sleeper: subprocess.Popen[bytes],
) -> None:
    reference = ProcessRef.of(sleeper.pid)
    assert reference is not None
    assert await end_processes([reference], grace=5) == []
    assert not reference.alive()
    assert sleeper.wait(5) == -signal.SIGTERM


async def test_process_that_ignores_sigterm_is_killed() -> None:
    with _running(STUBBORN) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        reference = ProcessRef.of(process.pid)
        assert reference is not None
        assert await end_processes([reference], grace=0.2) == []
        assert process.wait(5) == -signal.SIGKILL


async def test_waiting_names_those_that_stay(sleeper: subprocess.Popen[bytes]) -> None:
    reference = ProcessRef.of(sleeper.pid)
    assert reference is not None
    assert await wait_gone([reference], timeout=0.05) == [reference]


def test_owner_of_a_port_is_named() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        server.listen()
        assert not port_is_free(port)
        owner = port_owner(port)
        assert owner is not None
        assert owner.pid == os.getpid()
        assert str(os.getpid()) in str(owner)
    assert port_is_free(port)
    assert port_owner(port) is None
