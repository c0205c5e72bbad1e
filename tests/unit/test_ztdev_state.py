"""The state directory belongs to one stack at a time, and what a crash left behind is ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ztdev.errors import AlreadyRunning, DiskFull, ProgramMissing, StateUnusable, explain_os_error
from ztdev.processes import ProcessRef
from ztdev.state import SOCKET_PATH_MAX, StateDirectory, default_state_directory


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    state = StateDirectory(tmp_path / "state")
    state.prepare()
    return state


def test_directory_is_private_even_when_it_was_not(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.mkdir(mode=0o755)
    StateDirectory(path).prepare()
    assert path.stat().st_mode & 0o777 == 0o700


def test_second_stack_is_refused_with_the_first_ones_process(state: StateDirectory) -> None:
    own = ProcessRef.of(os.getpid())
    assert own is not None
    state.lock()
    state.write({"supervisor": own.as_dict()})
    other = StateDirectory(state.path)
    with pytest.raises(AlreadyRunning, match=rf"process {os.getpid()}.*ztdev down"):
        other.lock()
    assert other.in_use()
    state.unlock()
    assert not other.in_use()
    other.lock()
    other.unlock()


def test_lock_is_not_inherited(state: StateDirectory) -> None:
    state.lock()
    argv = [sys.executable, "-c", "print('up', flush=True); input()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, close_fds=False) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        state.unlock()
        assert not state.in_use()
        child.communicate(b"\n")


def test_file_in_place_of_the_directory_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("not a directory")
    with pytest.raises(StateUnusable, match=r"not a directory.*--state"):
        StateDirectory(path).prepare()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"version": 1'])
def test_damaged_state_file_reads_as_empty(state: StateDirectory, text: str) -> None:
    state.state_file.write_text(text)
    assert state.read() == {}
    assert state.supervisor() is None


def test_state_file_is_private_and_replaced_whole(state: StateDirectory) -> None:
    state.write({"phase": "ready"})
    assert state.state_file.stat().st_mode & 0o077 == 0
    assert json.loads(state.state_file.read_text())["phase"] == "ready"
    assert [path.name for path in state.path.iterdir() if "tmp" in path.name] == []


def test_sockets_are_below_the_state_directory_when_their_path_fits(tmp_path: Path) -> None:
    short = StateDirectory(Path("/tmp") / f"zt-test-{os.getpid()}")
    try:
        short.prepare()
        assert short.socket_directory() == short.path / "run"
    finally:
        short.remove_sockets()
        subprocess.run(["rm", "-rf", str(short.path)], check=True)


def test_sockets_move_to_a_short_private_path_when_it_does_not_fit(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / ("deep" * 30))
    state.prepare()
    sockets = state.socket_directory()
    assert len(str(sockets / ("x" * 30))) <= SOCKET_PATH_MAX
    assert sockets.stat().st_mode & 0o777 == 0o700
    assert state.socket_directory() == sockets
    state.remove_sockets()
    assert not sockets.exists()


async def test_leftovers_are_ended_and_strangers_are_not(state: StateDirectory) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    leftover, stranger = subprocess.Popen(argv), subprocess.Popen(argv)
    try:
        ours, theirs = ProcessRef.of(leftover.pid), ProcessRef.of(stranger.pid)
        assert ours is not None
        assert theirs is not None
        sockets = state.socket_directory()
        (sockets / "orders.sock").touch()
        state.write(
            {
                "sockets": str(sockets),
                "processes": [
                    {"name": "orders", "ref": ours.as_dict()},
                    # The id is in use again, by a process that started later.
                    {"name": "payments", "ref": theirs.as_dict() | {"start_time": theirs.start_time - 5}},
                    {"name": "broken"},
                    "broken",
                ],
            }
        )
        assert await StateDirectory(state.path).end_leftovers(grace=5) == [f"orders (pid {leftover.pid})"]
        assert leftover.wait(5) != 0
        assert stranger.poll() is None
        assert not sockets.exists()
    finally:
        for process in (leftover, stranger):
            process.kill()
            process.wait()


async def test_directory_that_is_not_ours_is_never_removed(state: StateDirectory, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    state.write({"sockets": str(precious)})
    await state.end_leftovers()
    assert precious.exists()


def test_state_directory_can_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZTDEV_STATE", "/somewhere/else")
    assert default_state_directory() == Path("/somewhere/else")
    monkeypatch.delenv("ZTDEV_STATE")
    assert default_state_directory().name == ".zt"


@pytest.mark.parametrize(
    ("number", "expected", "advice"),
    [
        ("ENOSPC", DiskFull, "Free some space"),
        ("EDQUOT", DiskFull, "Free some space"),
        ("EACCES", StateUnusable, "chown"),
        ("EROFS", StateUnusable, "--state"),
        ("ENOENT", ProgramMissing, "make setup"),
    ],
)
def test_system_errors_become_advice(number: str, expected: type[Exception], advice: str) -> None:
    import errno

    error = OSError(getattr(errno, number), "words of the system", "/some/file")
    explained = explain_os_error(error, Path("/state"))
    assert isinstance(explained, expected)
    assert advice in str(explained)
    assert "/some/file" in str(explained)


def test_other_system_errors_are_not_explained_away() -> None:
    import errno

    assert explain_os_error(OSError(errno.EIO, "Input/output error"), Path("/state")) is None
