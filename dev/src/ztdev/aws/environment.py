"""The Python environment of the stand-in for AWS: made once, kept while its requirements are the same.

It is not the environment of this tree, since ministack pins an exact botocore. What goes into it is pinned by
version and hash in requirements.txt.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from ztdev.errors import ProgramMissing, StackError, explain_os_error

REQUIREMENTS = Path(__file__).with_name("requirements.txt")

#: Written last: a directory without it is half made.
_MARKER = "zt-complete"

#: Raised when environments are made in another way.
_RECIPE = 2

_TIMEOUT = 900.0

Progress = Callable[[str], None]


def find_uv() -> Path:
    """The uv program: `$UV`, else on PATH, else in the checkout's .tools.

    Raises:
        ProgramMissing: it is nowhere.
    """
    named = os.environ.get("UV")
    if named:
        found = shutil.which(named)
        if found is None:
            raise ProgramMissing(
                f"UV names {named}, which is not a program. Unset UV, or set it to uv's path."
            )
        return Path(found)
    found = shutil.which("uv")
    if found is not None:
        return Path(found)
    for directory in Path(__file__).resolve().parents:
        candidate = directory / ".tools" / "uv" / "bin" / "uv"
        if candidate.is_file():
            return candidate
    raise ProgramMissing(
        "uv is needed once, to make the environment of the local AWS. Run `make setup`, or install uv, "
        "or set UV to its path."
    )


async def ensure_environment(directory: Path, progress: Progress) -> Path:
    """Return the environment's Python, after making the environment when it is missing or out of date.

    Raises:
        ProgramMissing: there is no uv.
        StackError: it cannot be made; the message says why and what to do.
    """
    key = _key()
    python = directory / "bin" / "python"
    if _is_complete(directory, key, python):
        return python
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _only_one(directory.with_name(directory.name + ".lock")):
            if not _is_complete(directory, key, python):
                await _make(directory, key, progress)
    except OSError as error:
        raise explain_os_error(error, directory) or StackError(
            f"Cannot make {directory}: {error}."
        ) from error
    return python


def _key() -> str:
    """What the environment depends on. A new Python patch release does not matter, a minor one does."""
    version = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"
    return f"{_RECIPE} {version} {hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()}\n"


def _is_complete(directory: Path, key: str, python: Path) -> bool:
    try:
        # The interpreter is a link: it breaks when the one it was made from is removed.
        return (directory / _MARKER).read_text() == key and python.exists()
    except OSError:
        return False


async def _make(directory: Path, key: str, progress: Progress) -> None:
    uv = find_uv()
    progress("making the environment of the local AWS (once; about 85 MB)")
    await asyncio.to_thread(_clear, directory)
    await _run(uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(directory))
    progress("installing the local AWS (ministack, pinned by hash)")
    await _run(
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        str(directory / "bin" / "python"),
        "--require-hashes",
        "--compile-bytecode",  # or each start would compile ministack anew
        "--requirements",
        str(REQUIREMENTS),
    )
    (directory / _MARKER).write_text(key)


def _clear(directory: Path) -> None:
    """Remove a half made or outdated environment, and nothing else."""
    if not directory.exists():
        return
    if not (directory / "pyvenv.cfg").exists() and any(directory.iterdir()):
        raise StackError(f"{directory} is in the way: it is not a Python environment. Remove it.")
    shutil.rmtree(directory)


async def _run(uv: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    process = await asyncio.create_subprocess_exec(
        uv,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        cwd="/",
    )
    try:
        async with asyncio.timeout(_TIMEOUT):
            output, _ = await process.communicate()
    except TimeoutError:
        raise StackError(
            f"`uv {arguments[0]}` did not end within {_TIMEOUT / 60:.0f} minutes: check the network."
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise StackError(_advice(arguments, output.decode(errors="replace")))


def _advice(arguments: tuple[str, ...], output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()][-8:]
    said = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
    return (
        "The environment of the local AWS cannot be made. It is downloaded from the Python package index the "
        "first time; after that no network is needed.\n"
        "  Check the network (a proxy: HTTPS_PROXY; a mirror: UV_DEFAULT_INDEX), then start again.\n"
        f"  `uv {' '.join(arguments[:2])}` said:\n{said}"
    )


@contextlib.asynccontextmanager
async def _only_one(lock_file: Path) -> AsyncIterator[None]:
    """Two stacks that share the directory must not make it at the same time."""
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
