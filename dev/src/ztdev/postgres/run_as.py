"""Run a program as another user, in directories which that user could not reach by their path.

    python -I -S run_as.py '{"uid": …, "gid": …, "directories": {"DATA": "/…"}, "argv": […], …}'

PostgreSQL refuses to run as root, and the user that it runs as instead may have no way through the
directories above its data: a state directory is 0700, and so is /root. Opening those up would be the wrong
cure. So this process opens the named directories while it is still root, gives up its rights, and hands
them on as open descriptors. In `argv`, `{DATA}` stands for the directory's path when the user can reach it,
else for `/proc/self/fd/N`. `short` names directories that get the descriptor too when their path is long,
as paths of Unix sockets are limited to 107 bytes: unix(7).

The kernel sends `death_signal` to the program when its parent dies (PR_SET_PDEATHSIG; it is set after the
change of user, which clears it, and is kept over execve). It is bound to the parent's *thread*: start this
from a thread that lives as long as the program should.

Standard library only; nothing is imported after the rights are gone, as the interpreter itself may be out
of reach by then. Exit statuses: 125 no right to become that user, 126 out of reach, 127 cannot be run.
"""

import ctypes
import errno
import json
import os
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

CANNOT_DROP = 125
OUT_OF_REACH = 126
CANNOT_RUN = 127

LONG_PATH = 80


def fail(status: int, message: str) -> NoReturn:
    print(f"run_as: {message}", file=sys.stderr, flush=True)
    os._exit(status)


def main() -> None:
    order = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)

    opened = {
        name: (path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for name, path in order["directories"].items()
    }

    uid, gid = order["uid"], order["gid"]
    if os.geteuid() != uid:
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            fail(CANNOT_DROP, f"cannot become user {uid}: {error.strerror}")
    os.umask(0o077)
    os.chdir("/")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, order["death_signal"], 0, 0, 0)
    if os.getppid() != order["parent"]:
        os._exit(0)  # the parent died before the kernel was asked to tell us

    places = {}
    for name, (path, descriptor) in opened.items():
        reachable = os.access(os.path.join(path, "."), os.R_OK | os.W_OK | os.X_OK)
        if reachable and not (name in order["short"] and len(os.fsencode(path)) > LONG_PATH):
            places[name] = path
            os.close(descriptor)
        else:
            places[name] = f"/proc/self/fd/{descriptor}"
            os.set_inheritable(descriptor, True)
            if not os.access(os.path.join(places[name], "."), os.R_OK | os.W_OK | os.X_OK):
                fail(OUT_OF_REACH, f"user {uid} may not write to {path}")

    argv = order["argv"][:1]
    for word in order["argv"][1:]:
        for name, place in places.items():
            word = word.replace("{" + name + "}", place)
        argv.append(word)
    try:
        os.execve(argv[0], argv, order["environment"])  # noqa: S606 - no shell: this is what the file is for
    except PermissionError as error:
        fail(OUT_OF_REACH, f"user {uid} cannot reach or run {argv[0]}: {error.strerror}")
    except OSError as error:
        # A program whose loader is missing (musl) looks as if it were missing itself.
        hint = " (or its dynamic loader: it needs glibc)" if error.errno == errno.ENOENT else ""
        fail(CANNOT_RUN, f"cannot run {argv[0]}{hint}: {error.strerror}")


if __name__ == "__main__":
    main()
