"""``ztmtls policy schema``: the JSON Schema of policy.yaml, for editors."""

from __future__ import annotations

import argparse
from importlib.resources import files

from .output import Exit, command, write

EXAMPLES = """\
  ztmtls policy schema > policy.schema.json
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "schema",
        "print the JSON Schema of policy.yaml",
        "Print the JSON Schema (draft 2020-12) of policy.yaml. Editors complete and check with it; only "
        "`ztmtls policy check` knows every rule.",
        EXAMPLES,
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Exit:
    """Print it."""
    write(schema_text().rstrip("\n"))
    return Exit.OK


def schema_text() -> str:
    """The schema as it is shipped."""
    return files("ztmtls").joinpath("policy.schema.json").read_text(encoding="utf-8")
