"""``ztmtls policy``: is the file right, does it fit the application, what would a caller be told."""

from __future__ import annotations

import argparse

from . import policy_check, policy_explain, policy_schema
from .output import EXIT_STATUSES


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and those below it."""
    parser = commands.add_parser(
        "policy",
        help="check a policy file, explain a decision, print the JSON Schema",
        description="Work with policy files.",
        epilog=EXIT_STATUSES,
        allow_abbrev=False,
    )
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (policy_check, policy_explain, policy_schema):
        module.add(below)
