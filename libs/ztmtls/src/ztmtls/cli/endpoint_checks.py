"""``ztmtls doctor``: the way to the Workload API, up to somebody who listens there."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
from collections.abc import Generator
from pathlib import Path

from ztmtls.reasons import Reason
from ztmtls.workload_endpoint import ENVIRONMENT_VARIABLE, InvalidEndpoint, parse_endpoint

from .checks import Check, Deadline, fail, ok


def endpoint_checks(endpoint: str | None, deadline: Deadline) -> Generator[Check, None, str | None]:
    """Address, socket, listener. Returns the gRPC target when somebody listens there."""
    named = ENVIRONMENT_VARIABLE if endpoint is None else "--endpoint"
    try:
        target = parse_endpoint(endpoint)
    except InvalidEndpoint as error:
        advice = (
            "the address has the form unix:/run/spire/agent.sock or tcp://127.0.0.1:8081; the agent's "
            "configuration names it (SPIRE: socket_path)"
        )
        yield fail("endpoint", f"{named}: {error.detail}", advice, Reason.INVALID_ENDPOINT)
        return None
    yield ok("endpoint", f"{named} names {target}")
    scheme, _, rest = target.partition(":")
    if scheme == "unix":
        found = _socket_file(Path(rest))
        yield found
        if found.status != "ok":
            return None
    found = _listener(scheme, rest, deadline)
    yield found
    return target if found.status == "ok" else None


def _socket_file(path: Path) -> Check:
    for directory in reversed(path.parents):
        try:
            if not stat.S_ISDIR(directory.stat().st_mode):
                return fail("socket", f"{directory} is not a directory", f"look at the address: {path}")
        except FileNotFoundError:
            return fail(
                "socket",
                f"the directory {directory} does not exist",
                "is the agent running on this machine? In a container, is its directory mounted here?",
            )
        except NotADirectoryError:
            return fail("socket", f"{directory.parent} is not a directory", f"look at the address: {path}")
        except OSError as error:
            return _unreadable(directory, error)
        if not os.access(directory, os.X_OK, effective_ids=True):
            return _closed(directory, "search (x)")
    try:
        found = path.stat()
    except FileNotFoundError:
        dangling = f": it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        return fail(
            "socket",
            f"{path} does not exist{dangling}",
            "is the agent running? It makes the socket when it is ready. Is this the path in its "
            f"configuration? {path.parent} holds: {_listing(path.parent)}",
        )
    except OSError as error:
        return _unreadable(path, error)
    if not stat.S_ISSOCK(found.st_mode):
        kind = (
            "directory"
            if stat.S_ISDIR(found.st_mode)
            else "plain file"
            if stat.S_ISREG(found.st_mode)
            else "file"
        )
        return fail(
            "socket",
            f"{path} is a {kind}, not a socket",
            "point the address at the agent's socket; remove what stands there if an agent should make it",
        )
    if not os.access(path, os.W_OK, effective_ids=True):
        return _closed(path, "write (w), which connecting needs")
    return ok("socket", f"{path} is a socket that we may open ({_mode(found)})")


def _closed(path: Path, need: str) -> Check:
    try:
        how = _mode(path.stat())
    except OSError as error:
        return _unreadable(path, error)
    return fail(
        "socket",
        f"{path} is closed to us: it is {how}, and we are {_us()}, without {need}",
        f"run as a user that may, or let the agent's administrator open {path} (SPIRE: the directory of "
        "the socket must be open to workloads, mode 0755, and the socket 0777)",
    )


def _unreadable(path: Path, error: OSError) -> Check:
    return fail("socket", f"{path} can't be looked at: {error.strerror}", "look at the directories above it")


def _mode(found: os.stat_result) -> str:
    return f"{stat.filemode(found.st_mode)} of {_user(found.st_uid)}:{_group(found.st_gid)}"


def _us() -> str:
    groups = ", ".join(_group(gid) for gid in sorted({os.getegid(), *os.getgroups()}))
    return f"user {_user(os.geteuid())} in {groups}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _listing(directory: Path) -> str:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return f"({error.strerror})"
    return ", ".join(map(repr, names[:8])) + (" …" if len(names) > 8 else "") if names else "nothing"


def _listener(scheme: str, rest: str, deadline: Deadline) -> Check:
    family = {"unix": socket.AF_UNIX, "ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}[scheme]
    host, _, port = rest.rpartition(":")
    address = rest if scheme == "unix" else (host.strip("[]"), int(port))
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(deadline.remaining)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            return fail(
                "listener",
                f"nobody listens at {rest}",
                "the agent has stopped"
                + (" and left its socket behind" if scheme == "unix" else "")
                + ": start it, and look at its log",
            )
        except TimeoutError:
            return fail(
                "listener",
                f"{rest} did not take our connection within the deadline",
                "the agent is overloaded or stopped (SIGSTOP, a debugger), or a firewall drops packets",
            )
        except PermissionError as error:
            return fail(
                "listener",
                f"{rest} can't be connected to: {error.strerror}, although its mode allows it",
                "SELinux or AppArmor (see the audit log), or capabilities that this container has dropped: "
                "root without CAP_DAC_OVERRIDE is an ordinary user",
            )
        except OSError as error:
            return fail("listener", f"{rest} can't be connected to: {error.strerror}", "look at the address")
    return ok("listener", f"somebody listens at {rest}")
