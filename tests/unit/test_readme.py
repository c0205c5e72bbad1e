"""The table of modules in the library's README. What the README shows, test_docs.py runs."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "libs" / "ztmtls" / "README.md"
PACKAGE = README.parent / "src" / "ztmtls"
# Used by several modules of the table, and named in their pages; nothing to start from.
PARTS = {"hop", "identity", "listen", "workload_endpoint"}


def table() -> list[str]:
    rows = README.read_text().split("## Modules")[1].split("##")[0]
    return re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in rows.splitlines() if "|" in line))


def test_every_module_of_the_table_exists() -> None:
    assert len(table()) > 10
    for name in table():
        assert (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name).is_dir(), name


def test_every_module_is_in_the_table() -> None:
    modules = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert {name for name in modules if not name.startswith("__")} - PARTS == set(table())
