"""A supervised process is restarted when it dies, stopped with patience, and never outlives its
supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ztdev.errors import NotReady
from ztdev.logfile import LogFile
from ztdev.managed import ManagedProcess, ProcessSpec, ProcessState, base_environment, describe_exit
from ztdev.processes import ProcessRef

#: Answers its probe port (argument 1), and on SIGTERM says so and ends.
SERVER = """
import http.server, os, signal, sys
class Probe(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *_): pass
def end(*_):
    print("asked to end", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print("environment", sorted(os.environ), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Probe).serve_forever()
"""


UNWANTED = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "HTTPS_PROXY", "PYTHONSTARTUP", "PGPASSWORD")


class Watched:
    """A managed process and what it told."""

    def __init__(self, tmp_path: Path, script: str, port: int, grace: float = 5.0) -> None:
        self.notices: list[str] = []
        self.admitted: list[ProcessRef] = []
        self.process = ManagedProcess(
            ProcessSpec(
                name="probe-server",
                argv=(sys.executable, "-c", script, str(port)),
                environment=base_environment(tmp_path),
                probe=f"http://127.0.0.1:{port}",
                grace=grace,
            ),
            LogFile(tmp_path / "logs" / "probe-server.log"),
            admit=self.admitted.append,
            notice=self.notices.append,
        )


@pytest.fixture
async def watch(tmp_path: Path, free_port: int) -> AsyncIterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(script: str = SERVER, grace: float = 5.0) -> Watched:
        made.append(Watched(tmp_path, script, free_port, grace))
        return made[-1]

    yield make
    for watched in made:
        await watched.process.stop(grace=0)


@pytest.fixture
def free_port() -> int:
    from ztdev.ports import choose_free_ports

    return choose_free_ports(1)[0]


async def eventually(condition: Callable[[], bool], within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def replaced(watched: Watched, pid: int) -> Callable[[], bool]:
    return lambda: watched.process.pid not in (None, pid)


def state_of(watched: Watched) -> ProcessState:
    return watched.process.state


async def test_ready_then_stopped_by_sigterm(watch: Callable[..., Watched]) -> None:
    watched = watch()
    await watched.process.start()
    await watched.process.wait_ready(10)
    assert state_of(watched) is ProcessState.RUNNING
    assert watched.admitted == [watched.process.ref]

    assert await watched.process.stop() is True

    assert state_of(watched) is ProcessState.STOPPED
    assert not watched.admitted[0].alive()
    assert "asked to end" in list(watched.process.log.lines())


async def test_environment_is_exactly_what_was_given(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in UNWANTED:
        monkeypatch.setenv(name, "from-the-parent")
    watched = watch()
    await watched.process.start()
    await watched.process.wait_ready(10)
    [line] = [line for line in watched.process.log.lines() if line.startswith("environment")]
    assert not [name for name in UNWANTED if name in line]


async def test_killed_process_is_started_again_and_reported(watch: Callable[..., Watched]) -> None:
    watched = watch()
    await watched.process.start()
    await watched.process.wait_ready(10)
    first = watched.process.pid
    assert first is not None

    os.kill(first, signal.SIGKILL)

    await eventually(replaced(watched, first))
    await watched.process.wait_ready(10)
    assert watched.process.restarts == 1
    assert len(watched.admitted) == 2
    assert "killed by SIGKILL" in watched.notices[0]


async def test_repeated_deaths_are_spaced_out(watch: Callable[..., Watched]) -> None:
    watched = watch()
    await watched.process.start()
    await watched.process.wait_ready(10)
    for count in (1, 2):
        pid = watched.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await eventually(replaced(watched, pid))
        assert watched.process.restarts == count
    assert "again in 0.5 s" in watched.notices[0]
    assert "again in 1 s" in watched.notices[1]


async def test_restart_on_request_is_gentle_and_at_once(watch: Callable[..., Watched]) -> None:
    watched = watch()
    await watched.process.start()
    await watched.process.wait_ready(10)
    first = watched.process.pid

    await watched.process.restart()

    assert watched.process.pid not in (None, first)
    assert watched.notices == []
    await watched.process.wait_ready(10)
    assert "asked to end" in list(watched.process.log.lines())


async def test_death_at_start_tells_its_last_words_and_is_not_repeated(watch: Callable[..., Watched]) -> None:
    watched = watch("import sys; print('PORT: is not set', file=sys.stderr); sys.exit(78)")
    await watched.process.start()
    with pytest.raises(NotReady, match=r"(?s)died while it started.*configuration.*PORT: is not set"):
        await watched.process.wait_ready(10)
    assert state_of(watched) is ProcessState.FAILED
    assert watched.process.restarts == 0


async def test_never_ready_is_an_error_with_the_last_log_lines(watch: Callable[..., Watched]) -> None:
    watched = watch("print('waiting for something', flush=True)\nimport time; time.sleep(600)")
    await watched.process.start()
    await eventually(lambda: watched.process.log.tail() != [])
    with pytest.raises(NotReady, match=r"(?s)is not ready after 0 s.*waiting for something"):
        await watched.process.wait_ready(0.1)


async def test_process_that_ignores_sigterm_is_killed_after_its_grace(watch: Callable[..., Watched]) -> None:
    watched = watch(SERVER.replace("signal.SIGTERM, end", "signal.SIGTERM, signal.SIG_IGN"), grace=0.2)
    await watched.process.start()
    await watched.process.wait_ready(10)
    assert await watched.process.stop() is False
    assert not watched.admitted[0].alive()


async def test_single_run_fails_with_its_output(watch: Callable[..., Watched]) -> None:
    with pytest.raises(NotReady, match=r"(?s)failed \(exit status 3\).*no such table"):
        await watch("print('no such table'); raise SystemExit(3)").process.run(10)


async def test_single_run_that_does_not_end_is_ended(watch: Callable[..., Watched]) -> None:
    watched = watch("import time; time.sleep(600)")
    with pytest.raises(NotReady, match="did not end"):
        await watched.process.run(0.3)
    assert not watched.admitted[0].alive()


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from ztdev.logfile import LogFile
from ztdev.managed import ManagedProcess, ProcessSpec, base_environment

async def main(folder):
    spec = ProcessSpec(name="child", argv=(sys.executable, "-c", "import time; time.sleep(600)"),
                       environment=base_environment(folder))
    child = ManagedProcess(spec, LogFile(folder / "child.log"))
    await child.start()
    print(child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_child_dies_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stdout is not None
        child = ProcessRef.of(int(supervisor.stdout.readline()))
        assert child is not None
        supervisor.kill()
        await eventually(lambda: not child.alive())
    finally:
        supervisor.kill()
        supervisor.communicate()


def test_exit_statuses_are_described() -> None:
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert describe_exit(-99) == "killed by signal 99"
    assert describe_exit(3) == "exit status 3"
    assert describe_exit(78) == "exit status 78: its configuration is at fault"
