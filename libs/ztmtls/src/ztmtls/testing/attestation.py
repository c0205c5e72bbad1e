"""Who is at the other end of a Unix socket, and whether that process is the registered one.

A SPIFFE agent attests the workload that calls it from what the kernel says about the connection
(SPIFFE Workload API, section 3; Workload Endpoint, section 3: the caller holds no secret yet). gRPC for
Python doesn't show the socket, so a `Guard` stands in front: it accepts the connection, asks the kernel
for its peer (``SO_PEERCRED``), and passes the bytes on to the gRPC server.

The gRPC server knows which guarded connection a call came on by the name that the guard binds to its own
end: an abstract Unix address of 128 random bits, seen as ``context.peer()``. A process that finds the
server's own socket and connects to it directly can't have such a name, and is a stranger.

Linux only: both ``SO_PEERCRED`` with process IDs and abstract addresses are Linux's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_PATH_BYTES = 100
"""Longest socket path accepted, in bytes. The kernel's limit is 107; the rest is for clients' prefixes."""

MAX_CONNECTIONS = 256
"""Connections of registered processes held open per socket; more are closed as they come."""

MAX_STRANGERS = 32
"""The same for all other processes, counted apart so that they can't shut the registered one out."""

_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """What the kernel says about the process that connected. `pid` is 0 when it can't be seen from here."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, connection: socket.socket) -> PeerCredentials:
        """Read ``SO_PEERCRED`` of a connected Unix socket."""
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return cls(*struct.unpack("3i", raw))


@dataclass(frozen=True, slots=True)
class Attestation:
    """The decision on one connection: for the audit log. `reason` says why, to a person."""

    workload: str
    pid: int
    uid: int
    gid: int
    allowed: bool
    reason: str


class Registrations:
    """Which processes may have one workload's identity. Nothing registered means nobody."""

    def __init__(self) -> None:
        self._processes: dict[int, int] = {}
        self._users: set[int] = set()

    def allow(self, *, pid: int | None = None, uid: int | None = None) -> None:
        """Register one process, or every process of a user.

        A process is remembered with its start time, so that another one that gets the same ID later is
        refused. Raises `ProcessLookupError` when there is no such process, and `ValueError` for the user
        ID that the kernel shows in place of any that has none here (user_namespaces(7)).
        """
        if (pid is None) == (uid is None):
            raise TypeError("name either a pid or a uid")
        if pid is not None:
            started = process_start_time(pid)
            if started is None:
                raise ProcessLookupError(f"no process {pid} can be seen in /proc")
            self._processes[pid] = started
        elif uid is not None:
            if uid == _overflow_uid():
                raise ValueError(
                    f"user {uid} can't be registered: unknown users of other namespaces look alike"
                )
            self._users.add(uid)

    def disallow(self, *, pid: int | None = None, uid: int | None = None) -> None:
        """Take a registration back. Naming neither takes all of them back."""
        if pid is None and uid is None:
            self._processes.clear()
            self._users.clear()
        if pid is not None:
            self._processes.pop(pid, None)
        if uid is not None:
            self._users.discard(uid)

    def decide(self, peer: PeerCredentials) -> tuple[bool, str]:
        """Whether `peer` is registered, and why or why not. Whatever can't be read is refused."""
        if peer.uid in self._users:
            return True, f"user {peer.uid} is registered"
        if not self._processes and not self._users:
            return False, "nothing is registered for this workload"
        if peer.pid <= 0:
            return False, "the caller's process is not visible from this process's PID namespace"
        registered = self._processes.get(peer.pid)
        if registered is None:
            return False, f"process {peer.pid} of user {peer.uid} is not registered"
        started = process_start_time(peer.pid)
        if started is None:
            return False, f"process {peer.pid} can't be read in /proc"
        if started != registered:
            return False, f"process ID {peer.pid} now belongs to another process than the registered one"
        return True, f"process {peer.pid} is registered"


def process_start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot (proc_pid_stat(5), field 22).

    None when it can't be read, also when /proc shows another PID namespace than ours.
    """
    try:
        if int(os.readlink("/proc/self")) != os.getpid():
            return None
        text = Path(f"/proc/{pid:d}/stat").read_bytes()
        # The command name, field 2, is in parentheses and may hold spaces and parentheses itself.
        return int(text[text.rindex(b")") + 1 :].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534


class Guard:
    """A Unix socket that tells the gRPC server behind it who connected.

    `attest` decides on the credentials of each connection. Whatever it decides, the bytes are passed on
    to the server at `target`; `opened(name, decision)` and `closed(name)` tell the server under which
    ``context.peer()`` the connection's calls will appear.
    """

    def __init__(
        self,
        path: Path,
        target: Path,
        *,
        attest: Callable[[PeerCredentials], Attestation],
        opened: Callable[[str, Attestation], None],
        closed: Callable[[str], None],
    ) -> None:
        self.path = path
        self._target = target
        self._attest = attest
        self._opened = opened
        self._closed = closed
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: dict[asyncio.Task[None], tuple[PeerCredentials, Attestation]] = {}

    @property
    def running(self) -> bool:
        """True while the socket is there."""
        return self._listener is not None

    async def start(self) -> None:
        """Bind the socket and accept connections. Does nothing when it is running."""
        if self._listener is not None:
            return
        remove_stale_socket(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind(os.fsencode(self.path))
            self.path.chmod(0o600)
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name=f"guard {self.path.name}")

    async def stop(self) -> None:
        """Remove the socket and close every connection."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.path.unlink(missing_ok=True)
        assert self._accepting is not None
        await _cancel(self._accepting)
        listener.close()
        await self.drop(lambda _: True)

    async def drop(self, matches: Callable[[PeerCredentials], bool]) -> None:
        """Close the connections whose peer `matches`."""
        chosen = [task for task, (peer, _) in self._connections.items() if matches(peer)]
        await _cancel(*chosen)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # for example no file descriptor left: others may be closed soon
                logger.warning("can't accept on %s: %s", self.path, error)
                await asyncio.sleep(0.2)
                continue
            try:
                connection.setblocking(False)
                peer = PeerCredentials.of(connection)
                decision = self._attest(peer)
                alike = sum(1 for _, known in self._connections.values() if known.allowed == decision.allowed)
                if alike >= (MAX_CONNECTIONS if decision.allowed else MAX_STRANGERS):
                    raise ConnectionError(f"{alike} connections are open")
            except Exception as error:
                logger.warning("connection to %s closed: %s", self.path, error)
                connection.close()
                continue
            task = asyncio.create_task(self._pass_on(connection, decision))
            self._connections[task] = (peer, decision)
            task.add_done_callback(lambda done: self._connections.pop(done, None))

    async def _pass_on(self, connection: socket.socket, decision: Attestation) -> None:
        name = f"ztmtls-{secrets.token_hex(16)}"
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer_name = f"unix-abstract:{name}"
        try:
            inner.setblocking(False)
            inner.bind(b"\0" + name.encode())
            # Before the server can see the first call.
            self._opened(peer_name, decision)
            await asyncio.get_running_loop().sock_connect(inner, os.fsencode(self._target))
            await _splice(connection, inner)
        except OSError as error:
            logger.debug("connection to %s ended: %s", self.path, error)
        finally:
            connection.close()
            inner.close()
            # The name is free for others only after the close above: it was ours until here.
            self._closed(peer_name)


async def _splice(first: socket.socket, second: socket.socket) -> None:
    """Copy bytes both ways until both sides have ended, or one has failed."""
    left_reader, left_writer = await asyncio.open_unix_connection(sock=first)
    try:
        right_reader, right_writer = await asyncio.open_unix_connection(sock=second)
    except BaseException:
        left_writer.transport.abort()
        raise
    pumps = [
        asyncio.ensure_future(_pump(left_reader, right_writer)),
        asyncio.ensure_future(_pump(right_reader, left_writer)),
    ]
    clean = False
    try:
        await asyncio.gather(*pumps)
        clean = True
        for writer in (left_writer, right_writer):
            writer.close()
            await writer.wait_closed()
    finally:
        # No-ops when both ended cleanly. Else they take the sockets off the event loop at once, which
        # has to happen before anyone closes them.
        left_writer.transport.abort()
        right_writer.transport.abort()
        if not clean:
            await _cancel(*pumps)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _cancel(*tasks: asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def private_directory(path: Path) -> bool:
    """Make sure that `path` is a directory only its owner, we, can enter; returns whether it was made.

    Raises `PermissionError` for one that is open to others: sockets in it could be swapped.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(f"{path} is not a directory") from None
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(
                f"{path} must belong to the user that runs this and have mode 700, not "
                f"{stat.S_IMODE(found.st_mode):o}: chmod it, or name a directory that doesn't exist yet"
            ) from None
        return False
    path.chmod(0o700)  # whatever the umask says
    return True


def check_socket_path(path: Path) -> Path:
    """Return `path`, or raise `ValueError` when it is too long for a Unix socket."""
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise ValueError(
            f"the socket path {path} has {size} bytes, at most {MAX_PATH_BYTES} can be used: "
            "give a shorter directory"
        )
    return path


def remove_stale_socket(path: Path) -> None:
    """Remove a socket that a dead server left behind. Raises `FileExistsError` if it isn't dead."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fsencode(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise FileExistsError(f"{path} is in use: {error}") from error
    raise FileExistsError(f"another server listens on {path}")


def require_linux() -> None:
    """Raise `NotImplementedError` where connections can't be attested."""
    if not sys.platform.startswith("linux"):
        raise NotImplementedError("the Workload API of ztmtls.testing attests its callers and needs Linux")
