"""Programs of others as peers. A missing one fails the tests that need it; nothing is skipped."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.mtls.conftest import ca, caller, served, server_source
from tests.spire.conftest import pytest_runtest_makereport, spire, spire_processes
from ztmtls.svid import X509Bundle, X509Svid
from ztmtls.testing import CertificateAuthority

TOOLS = Path(__file__).resolve().parents[2] / ".tools"
PATIENCE = 20.0

# Fixtures and a hook that this folder shares with others.
__all__ = ["ca", "caller", "pytest_runtest_makereport", "served", "server_source", "spire", "spire_processes"]


def program(name: str, advice: str) -> Path:
    """Where a program is. Fails the test if it is missing."""
    found = TOOLS / name if "/" in name else Path(shutil.which(name) or "")
    if not found.is_file():
        pytest.fail(f"{name} is missing: {advice}", pytrace=False)
    return found


@dataclass(frozen=True)
class Ended:
    """What a program said, and its exit status."""

    status: int
    out: str
    error: str


async def run(*command: object, stdin: str = "", env: dict[str, str] | None = None) -> Ended:
    """Run a program to its end."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            out, error = await process.communicate(stdin.encode())
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(errors="replace"), error.decode(errors="replace"))


@contextlib.asynccontextmanager
async def running(
    *command: object, log: Path, env: dict[str, str] | None = None
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Keep a program running; all that it prints goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def line_with(process: subprocess.Popen[bytes], log: Path, text: str) -> str:
    """The first line of `log` that holds `text`; waits for it. Fails when the program ends before."""
    async with asyncio.timeout(PATIENCE):
        while True:
            ended = process.poll() is not None
            said = log.read_text(errors="replace")
            for line in said.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line.strip()
            assert not ended, f"it ended: {said}"
            await asyncio.sleep(0.02)


def expired(ca: CertificateAuthority, spiffe_id: str) -> X509Svid:
    """An SVID that ran out an hour ago."""
    now = datetime.now(UTC)
    return ca.issue(spiffe_id, not_before=now - timedelta(hours=2), not_after=now - timedelta(hours=1))


def pem_file(folder: Path, name: str, svid: X509Svid) -> Path:
    """Key and chain of `svid` as a file, for programs that take files."""
    return _write(folder / f"{name}.pem", svid.pem())


def bundle_file(folder: Path, name: str, bundle: X509Bundle) -> Path:
    """The authorities of `bundle` as a file."""
    return _write(
        folder / f"{name}.bundle.pem", b"".join(a.public_bytes(Encoding.PEM) for a in bundle.authorities)
    )


def _write(path: Path, data: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path
