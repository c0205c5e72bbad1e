"""What can go wrong for the person at the keyboard: each with a message that says what to do, and an exit
status."""

from __future__ import annotations

import errno
from enum import IntEnum
from pathlib import Path


class ExitStatus(IntEnum):
    """Exit statuses of `ztdev` (listed in its README)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    ALREADY_RUNNING = 4
    PORT_IN_USE = 5
    STATE_UNUSABLE = 6
    DISK_FULL = 7
    PROGRAM_MISSING = 8
    INTERRUPTED = 130


class StackError(Exception):
    """The stack cannot start, or a command cannot be carried out. `str()` is for the person who runs it."""

    exit_status: ExitStatus = ExitStatus.FAILED


class AlreadyRunning(StackError):
    """Another stack uses this state directory."""

    exit_status = ExitStatus.ALREADY_RUNNING


class NotRunning(StackError):
    """No stack uses this state directory."""

    exit_status = ExitStatus.NOT_RUNNING


class PortInUse(StackError):
    """A port that the stack needs is taken."""

    exit_status = ExitStatus.PORT_IN_USE


class StateUnusable(StackError):
    """The state directory cannot be made, read or written."""

    exit_status = ExitStatus.STATE_UNUSABLE


class DiskFull(StackError):
    """No room for the database or the logs."""

    exit_status = ExitStatus.DISK_FULL


class ProgramMissing(StackError):
    """Something that has to be installed is not."""

    exit_status = ExitStatus.PROGRAM_MISSING


class NotReady(StackError):
    """A part did not come up: the message shows its last log lines."""


def explain_os_error(error: OSError, where: Path) -> StackError | None:
    """The error as advice when it is one of those that a person can put right; else None."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"The disk that holds {error.filename or where} is full. Free some space (a first start needs "
            "about 500 MB) or use another directory: --state DIR."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StateUnusable(
            f"Cannot write to {error.filename or where}: {error.strerror}. Give it to this user "
            "(chown -R), or use another directory: --state DIR."
        )
    if error.errno == errno.ENOENT and error.filename:
        return ProgramMissing(f"{error.filename} is missing. Run `make setup` (or `uv sync --frozen`) again.")
    return None
