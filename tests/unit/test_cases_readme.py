"""The table of troubles names tests that exist, and all of those beside it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CASES = REPOSITORY / "tests" / "cases"
NAMED = re.findall(r"`(tests/\S+\.py)::(\w+)`", (CASES / "README.md").read_text())


def names_in(path: Path) -> set[str]:
    functions = (
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {function.name for function in functions if function.name.startswith("test_")}


def test_each_test_that_the_table_names_exists() -> None:
    assert len(NAMED) > 30
    assert [f"{path}::{name}" for path, name in NAMED if name not in names_in(REPOSITORY / path)] == []


def test_each_test_of_a_trouble_is_in_the_table() -> None:
    there = {name for path in CASES.glob("test_*.py") for name in names_in(path)}
    assert there - {name for _, name in NAMED} == set()
