"""Processes of this machine, named so that a recycled process id is never mistaken for an old friend.

A process id alone does not name a process: the kernel gives it to a stranger later. Everything that `ztdev`
ends or reports it names by process id, start time and boot (`ProcessRef`), and signals through a pidfd, so
that the check and the signal concern the same process. Linux only, like the rest of `ztdev`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal as signals
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")

_TCP_LISTEN = "0A"


def boot_id() -> str:
    """The kernel's random identifier of this boot: start times of two boots must not be compared."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time (clock ticks since boot) of a process, or None when there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (OSError, ValueError):
        return None
    # The command name is in parentheses and may hold spaces and parentheses itself: read after the last one.
    fields = text.rpartition(")")[2].split()
    try:
        return fields[0], int(fields[19])
    except (IndexError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process of one boot: `start_time` is in clock ticks since boot, as in proc(5) `stat` field 22."""

    pid: int
    start_time: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The process that has this id now, or None when there is none (a zombie counts as none)."""
        found = _stat(pid)
        if found is None or found[0] in "ZX":
            return None
        return cls(pid, found[1], boot_id())

    @classmethod
    def parse(cls, data: Any) -> ProcessRef | None:
        """From `as_dict()`; None for anything else, since a state file may be old or damaged."""
        if not isinstance(data, dict):
            return None
        pid, start_time, boot = data.get("pid"), data.get("start_time"), data.get("boot")
        if not (isinstance(pid, int) and isinstance(start_time, int) and isinstance(boot, str)) or pid <= 1:
            return None
        return cls(pid, start_time, boot)

    def as_dict(self) -> dict[str, int | str]:
        return {"pid": self.pid, "start_time": self.start_time, "boot": self.boot}

    def alive(self) -> bool:
        """Whether this very process still runs (not a later one with the same id, not a zombie)."""
        return ProcessRef.of(self.pid) == self

    def signal(self, number: signals.Signals) -> bool:
        """Send a signal to this very process. False when it is gone; raises PermissionError for another
        user's."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            return self._signal_by_id(number)
        try:
            # The handle now holds one process: what is true of it after this check stays true for the signal.
            if not self.alive():
                return False
            signals.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def _signal_by_id(self, number: signals.Signals) -> bool:
        """For kernels older than 5.3, which have no pidfd."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


async def wait_gone(processes: Iterable[ProcessRef], timeout: float) -> list[ProcessRef]:
    """Wait up to `timeout` seconds until none of them runs; the answer is those that still do."""
    deadline = time.monotonic() + timeout
    left = [process for process in processes if process.alive()]
    while left and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
        left = [process for process in left if process.alive()]
    return left


async def end_processes(processes: Sequence[ProcessRef], grace: float) -> list[ProcessRef]:
    """SIGTERM, then after `grace` seconds SIGKILL. The answer is those that run on (another user's)."""
    for number, patience in ((signals.SIGTERM, grace), (signals.SIGKILL, 5.0)):
        left = [process for process in processes if process.alive()]
        for process in left:
            with contextlib.suppress(PermissionError):
                process.signal(number)
        if not await wait_gone(left, patience):
            return []
    return [process for process in processes if process.alive()]


def command_of(pid: int) -> str:
    """A short name for people: the command's base name, or "" when it cannot be read."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    names = [word.decode(errors="replace") for word in words if word]
    if not names:
        return ""
    shown = [os.path.basename(names[0]), *names[1:4]]
    return " ".join(shown)[:80]


@dataclass(frozen=True, slots=True)
class PortOwner:
    """Who listens on a port: known only when /proc lets this user see it."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command or 'a process'} (pid {self.pid})"


def port_owner(port: int) -> PortOwner | None:
    """The process that listens on this TCP port, when /proc tells (own processes, or all as root)."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            for descriptor in (entry / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor) in links:
                        return PortOwner(int(entry.name), command_of(int(entry.name)))
        except OSError:
            continue  # gone meanwhile, or not ours to look into
    return None


def _listening_inodes(port: int) -> set[str]:
    wanted = f"{port:04X}"
    inodes: set[str] = set()
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (PROC / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _TCP_LISTEN and fields[1].rpartition(":")[2] == wanted:
                inodes.add(fields[9])
    return inodes


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections linger in TIME_WAIT is free; one that is listened on is
        # not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
