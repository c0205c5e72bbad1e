"""Run a program that cannot outlive the supervisor. Started as a script of its own, before anything else:

    python -I -S launch.py SUPERVISOR SIGNAL PROGRAM [ARGUMENT ...]

It asks the kernel to send SIGNAL to this process when the supervisor dies (PR_SET_PDEATHSIG, kept over
execve), makes sure that the supervisor (its process id) has not died before that, waits for one byte on
standard input, and becomes PROGRAM. The byte is the supervisor's word that it has recorded this process and
registered its identity: nothing runs that nobody knows of. End of file instead of the byte means that the
supervisor is gone, and so is this process.

Two things follow for the supervisor. The signal is bound to the *thread* that started this process: start it
from the thread of the event loop, which lives as long as the stack. And there is no `preexec_fn`, which is
not safe in a program with threads: the first steps run here, after exec, in a process of its own.

Only the standard library, imported without site packages, so that this costs some milliseconds.
"""

import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor, signal_number, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != supervisor or os.read(0, 1) != b"g":
        sys.exit(75)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        os.execv(program[0], program)  # noqa: S606 - no shell: this is what the file is for
    except OSError as error:
        print(f"cannot run {program[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
