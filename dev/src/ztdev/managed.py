"""One supervised process: started, watched, restarted when it dies, stopped with patience."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import httpx

from .errors import NotReady
from .logfile import LogFile
from .logview import readable
from .processes import ProcessRef

LAUNCH = Path(__file__).with_name("launch.py")

#: Seconds between a death and the next try: doubled each time, up to the last; a long life resets it.
FIRST_DELAY, LAST_DELAY, LONG_LIFE = 0.5, 10.0, 30.0

#: What a child may know of the environment of the supervisor: never AWS_*, proxies or PYTHON*.
_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ")


def base_environment(home: Path) -> dict[str, str]:
    """The environment that every child starts from. `home` is an empty directory: no ~/.aws, no ~/.pgpass;
    what a child writes for the moment goes there, too."""
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return environment | {"HOME": str(home), "TMPDIR": str(home), "PYTHONUNBUFFERED": "1"}


class ProcessState(StrEnum):
    """Life of a supervised process."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting to restart"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """What to run. `environment` is whole: nothing is added to it."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    address: str = ""
    identity: str = ""
    probe: str = ""
    grace: float = 15.0
    death_signal: signal.Signals = signal.SIGKILL


class ManagedProcess:
    """A process of the stack. `on_change` is called after each change of its state or process id."""

    def __init__(
        self,
        spec: ProcessSpec,
        log: LogFile,
        *,
        admit: Callable[[ProcessRef], None] = lambda _: None,
        notice: Callable[[str], None] = lambda _: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.log = log
        self.state = ProcessState.NEW
        self.restarts = 0
        self.ref: ProcessRef | None = None
        self.exit_code: int | None = None
        self._admit = admit
        self._notice = notice
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._asked_to_restart = False
        self._proven = False
        self._spawned = asyncio.Event()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self.ref.pid if self.ref else None

    async def start(self) -> None:
        """Start it and watch over it. A process that dies before it was ever ready is not started again: that
        is a fault to show, not to repeat."""
        await self._spawn()
        self._watcher = asyncio.create_task(self._watch(), name=f"watch-{self.name}")

    async def run(self, timeout: float) -> None:
        """Run it to its end once. Raises `NotReady` with its last lines unless it exits with 0."""
        await self._spawn()
        assert self._process is not None
        try:
            async with asyncio.timeout(timeout):
                code = await self._process.wait()
                await self._drain()
        except TimeoutError:
            await self._end(grace=1.0)
            raise NotReady(self._story(f"did not end within {timeout:.0f} s")) from None
        except asyncio.CancelledError:
            await self._end(grace=1.0)
            raise
        self.ref = None
        self._become(ProcessState.STOPPED)
        if code != 0:
            raise NotReady(self._story(f"failed ({describe_exit(code)})"))

    async def wait_ready(self, timeout: float) -> None:
        """Wait until its probe says ready. Raises `NotReady` with the last log lines when it dies or is
        late."""
        deadline = time.monotonic() + timeout
        last = "no answer from its probe port"
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
            while True:
                if self.state is ProcessState.FAILED:
                    raise NotReady(self._story(f"died while it started ({describe_exit(self.exit_code)})"))
                try:
                    answer = await client.get(f"{self.spec.probe}/readyz")
                except httpx.HTTPError as error:
                    last = f"no answer from its probe port ({type(error).__name__})"
                else:
                    if answer.status_code == 200:
                        self._proven = True
                        if self.state is ProcessState.STARTING:
                            self._become(ProcessState.RUNNING)
                        return
                    last = f"its probe says {answer.text.strip()[:300]}"
                if time.monotonic() > deadline:
                    raise NotReady(self._story(f"is not ready after {timeout:.0f} s: {last}"))
                await asyncio.sleep(0.05)

    async def restart(self) -> None:
        """Stop it as `stop` would, and start it again at once. Returns when the new process runs."""
        if self._watcher is None or self._stop.is_set():
            raise RuntimeError(f"{self.name} is not being watched")
        self._spawned.clear()
        self._asked_to_restart = True
        previous = self.ref
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.spec.grace):
                await self._spawned.wait()
        except TimeoutError:
            if previous is not None:
                previous.signal(signal.SIGKILL)
            await self._spawned.wait()

    async def stop(self, grace: float | None = None) -> bool:
        """SIGTERM, `grace` seconds, SIGKILL. False when it had to be killed."""
        self._stop.set()
        if self._watcher is None:
            return True
        self._become(ProcessState.STOPPING)
        gentle = await self._end(self.spec.grace if grace is None else grace)
        await self._watcher
        self._watcher = None
        self._become(ProcessState.STOPPED)
        self.log.close()
        return gentle

    def kill(self) -> None:
        """SIGKILL now."""
        self._signal(signal.SIGKILL)

    # -- inside

    async def _spawn(self) -> None:
        self.exit_code = None
        gate_in, gate_out = os.pipe()
        try:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-I",
                    "-S",
                    str(LAUNCH),
                    str(os.getpid()),
                    str(int(self.spec.death_signal)),
                    *self.spec.argv,
                    stdin=gate_in,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    env=dict(self.spec.environment),
                    start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
                )
            finally:
                os.close(gate_in)
            self._pump = asyncio.create_task(self._copy_output(self._process), name=f"log-{self.name}")
            self.ref = ProcessRef.of(self._process.pid)
            if self.ref is not None:
                self._admit(self.ref)
            self._become(ProcessState.STARTING if not self._proven else ProcessState.RUNNING)
            with contextlib.suppress(BrokenPipeError):
                os.write(gate_out, b"g")
        finally:
            os.close(gate_out)
        self._asked_to_restart = False
        self._spawned.set()

    async def _watch(self) -> None:
        failures = 0
        while True:
            assert self._process is not None
            began = time.monotonic()
            self.exit_code = await self._process.wait()
            await self._drain()
            self.ref = None
            if self._stop.is_set():
                return
            if not self._asked_to_restart:
                if not self._proven:
                    self._become(ProcessState.FAILED)
                    return
                failures = 0 if time.monotonic() - began > LONG_LIFE else failures
                delay = min(FIRST_DELAY * 2**failures, LAST_DELAY)
                failures = min(failures + 1, 16)
                self._become(ProcessState.WAITING)
                self._notice(
                    f"{self.name} ended ({describe_exit(self.exit_code)}); starting it again in {delay:g} s"
                    + self._last_line()
                )
                if await self._stopped_within(delay):
                    return
            self.restarts += 1
            try:
                await self._spawn()
            except OSError as error:
                self._become(ProcessState.FAILED)
                self._notice(f"{self.name} cannot be started again: {error}")
                return

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    async def _end(self, grace: float) -> bool:
        """SIGTERM, wait, SIGKILL, wait. True when SIGTERM was enough."""
        process = self._process
        if process is None or process.returncode is not None:
            return True
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await process.wait()
            return False
        return process.returncode != -signal.SIGKILL

    async def _drain(self) -> None:
        """Take what is left in the pipe. A grandchild that keeps it open does not hold us."""
        if self._pump is not None:
            await asyncio.wait({self._pump}, timeout=1.0)
            self._pump.cancel()
        self.log.end_of_output()

    async def _copy_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while data := await process.stdout.read(65536):
            before = self.log.dropped
            self.log.feed(data)
            if self.log.dropped and not before:
                self._notice(
                    f"{self.log.path} cannot be written (is the disk full?): lines of {self.name} are lost"
                )

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _become(self, state: ProcessState) -> None:
        self.state = state
        self._on_change()

    def _last_line(self) -> str:
        lines = self.log.tail(1)
        return f". Its last line: {readable(lines[0])[:300]}" if lines else ""

    def _story(self, what: str) -> str:
        lines = [readable(line) for line in self.log.tail(15)]
        shown = (
            "\n".join("    " + part for line in lines for part in line.split("\n"))
            or "    (it wrote nothing)"
        )
        return f"{self.name} {what}.\n  The last lines of {self.log.path}:\n{shown}"


def describe_exit(code: int | None) -> str:
    """An exit status for people."""
    if code is None:
        return "still running"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    if code == 78:
        return "exit status 78: its configuration is at fault"
    return f"exit status {code}"
