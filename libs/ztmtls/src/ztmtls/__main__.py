"""``python -m ztmtls``, and the command ``ztmtls``: look at an identity, a policy, a workload."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .cli import doctor, policy, show
from .cli.output import EXIT_STATUSES, CommandError, Exit, complain
from .reasons import Refusal

DESCRIPTION = "SPIFFE mutual TLS: what identity this workload has, what its policy says, what is in the way."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="ztmtls", description=DESCRIPTION, epilog=EXIT_STATUSES, allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (doctor, show, policy):
        module.add(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CommandError as error:
        complain(str(error))
        return int(error.status)
    except Refusal as refusal:
        complain(str(refusal))
        return int(Exit.FINDINGS)
    except KeyboardInterrupt:
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        # Whoever read along has gone; nor may the interpreter complain of it when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.FINDINGS)


if __name__ == "__main__":
    sys.exit(main())
