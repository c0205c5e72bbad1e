"""The state directory: who uses it, what runs, and what an earlier run left behind.

    .zt/                    0700, owned by the user that runs the stack
        lock                held (flock) by the supervisor for as long as it lives
        state.json          what runs: for `status`, `down`, and for the next `up` after a crash
        logs/               one file per process, rotated by size
        home/               HOME of the services: empty, so that nobody's ~/.aws is read
        run/                Workload API sockets (or a short private directory, see `socket_directory`)
        tokens/ cloud/ postgres/   what the parts keep

No password, key or SVID is written by this module; `state.json` holds process ids and addresses.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import AlreadyRunning, StateUnusable, explain_os_error
from .processes import ProcessRef, end_processes

#: sun_path of a Unix socket holds 108 bytes with its final NUL: unix(7).
SOCKET_PATH_MAX = 107

#: Room for the name of the longest socket below its directory.
_SOCKET_NAME_ROOM = 32

_VERSION = 1


class StateDirectory:
    """Paths of one state directory, and the lock that makes it one stack's own."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.lock_file = self.path / "lock"
        self.state_file = self.path / "state.json"
        self.logs = self.path / "logs"
        self.home = self.path / "home"
        self._lock: int | None = None
        self._sockets: Path | None = None

    # -- making it ours

    def prepare(self) -> None:
        """Create it (0700) and its folders. Raises `StateUnusable` or `DiskFull` with what to do."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            details = self.path.stat()
            if not stat.S_ISDIR(details.st_mode):
                raise StateUnusable(f"{self.path} is not a directory: use another one with --state DIR.")
            if details.st_uid != os.geteuid():
                raise StateUnusable(
                    f"{self.path} belongs to another user (uid {details.st_uid}; this is uid "
                    f"{os.geteuid()}). Run as that user, remove the directory, or use another one: "
                    "--state DIR."
                )
            self.path.chmod(0o700)
            for folder in (self.logs, self.home, self.path / "tokens"):
                folder.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:
            raise StateUnusable(
                f"{error.filename} is not a directory: use another one with --state DIR."
            ) from None
        except OSError as error:
            raise (
                explain_os_error(error, self.path) or StateUnusable(f"Cannot use {self.path}: {error}.")
            ) from error

    def lock(self) -> None:
        """Take the lock for this process. Raises `AlreadyRunning` when another stack holds it."""
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            supervisor = self.supervisor()
            who = f" (process {supervisor.pid})" if supervisor else ""
            raise AlreadyRunning(
                f"Another stack{who} is using {self.path}. Look at it with `ztdev status --state "
                f"{self.path}`, end it with `ztdev down --state {self.path}`, or use another directory: "
                "--state DIR."
            ) from None
        self._lock = descriptor

    @property
    def locked(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock is not None

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def in_use(self) -> bool:
        """Whether a stack holds the lock now."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    # -- what runs

    def read(self) -> dict[str, Any]:
        """The state file, or an empty one when there is none or it is damaged."""
        try:
            data = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) and data.get("version") == _VERSION else {}

    def write(self, data: Mapping[str, Any]) -> None:
        """Replace the state file in one step, so that a reader never sees half of it."""
        temporary = self.state_file.with_suffix(f".{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"version": _VERSION, **data}, file, indent=1)
        temporary.replace(self.state_file)

    def supervisor(self) -> ProcessRef | None:
        return ProcessRef.parse(self.read().get("supervisor"))

    # -- sockets

    def socket_directory(self) -> Path:
        """A private directory whose path is short enough for Unix sockets: below the state directory when it
        fits, else a new one in XDG_RUNTIME_DIR or the temporary directory."""
        if self._sockets is None:
            own = self.path / "run"
            if len(os.fsencode(own)) + _SOCKET_NAME_ROOM <= SOCKET_PATH_MAX:
                own.mkdir(mode=0o700, exist_ok=True)
                own.chmod(0o700)
                self._sockets = own
            else:
                self._sockets = _short_directory()
        return self._sockets

    def remove_sockets(self) -> None:
        """Remove the socket directory with all that is in it."""
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None

    # -- leftovers

    async def end_leftovers(self, grace: float = 5.0) -> list[str]:
        """End what an earlier supervisor that was killed has left: processes that the state file names (each
        verified by its start time, so never a stranger), and their sockets. Needs the lock. The answer names
        what was found."""
        data = self.read()
        found: list[str] = []
        processes: list[ProcessRef] = []
        for entry in data.get("processes", []):
            reference = ProcessRef.parse(entry.get("ref")) if isinstance(entry, dict) else None
            if reference is not None and reference.alive():
                found.append(f"{entry.get('name', 'process')} (pid {reference.pid})")
                processes.append(reference)
        if processes:
            remaining = await end_processes(processes, grace)
            if remaining:
                pids = ", ".join(str(process.pid) for process in remaining)
                raise StateUnusable(
                    f"Processes of an earlier stack in {self.path} cannot be ended (pid {pids}): end them, "
                    "then start again."
                )
        self._remove_recorded_sockets(data.get("sockets"))
        return found

    def _remove_recorded_sockets(self, recorded: Any) -> None:
        """Only a directory that is ours to remove: named as we name them, private, and this user's."""
        if not isinstance(recorded, str):
            return
        path = Path(recorded)
        if path != self.path / "run" and not path.name.startswith(_SHORT_PREFIX):
            return
        with contextlib.suppress(OSError):
            details = path.lstat()
            if stat.S_ISDIR(details.st_mode) and details.st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)


_SHORT_PREFIX = "zt-"


def _short_directory() -> Path:
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp is private
        if not base or len(os.fsencode(base)) + len("/zt-12345678/") + _SOCKET_NAME_ROOM > SOCKET_PATH_MAX:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=_SHORT_PREFIX, dir=base))
        except OSError:
            continue
    raise StateUnusable("No directory with a short path for Unix sockets: set XDG_RUNTIME_DIR or TMPDIR.")


def now() -> float:
    """Wall clock, for the state file."""
    return time.time()


def checkout() -> Path | None:
    """The checkout that this package runs from, if it does."""
    found = Path(__file__).resolve().parents[3]
    if (found / "uv.lock").is_file() and (found / "dev" / "pyproject.toml").is_file():
        return found
    return None


def default_state_directory() -> Path:
    """`ZTDEV_STATE`, else `.zt` in the checkout, else `.zt` in the current directory."""
    named = os.environ.get("ZTDEV_STATE")
    return Path(named) if named else (checkout() or Path.cwd()) / ".zt"


def default_tools_directory() -> Path:
    """Where what is unpacked or installed once is kept, for every stack of this user: `ZTDEV_TOOLS`, else
    `.tools` in the checkout when it can be written, else the user's cache."""
    named = os.environ.get("ZTDEV_TOOLS")
    if named:
        return Path(named)
    here = checkout()
    if here is not None and os.access(here, os.W_OK):
        return here / ".tools"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ztdev"
