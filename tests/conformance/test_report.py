"""The report itself: a clause passes only when each of its tests did, and one without a test fails."""

from __future__ import annotations

import json
from pathlib import Path

from .clauses import CLAUSES, EXPECTED, Results


def test_clause_without_a_test_fails(tmp_path: Path) -> None:
    results = Results()
    results.add("XV-1", "server", True)

    results.write(tmp_path / "build" / "report.json")

    rows = json.loads((tmp_path / "build" / "report.json").read_text())
    assert [(row["id"], row["role"]) for row in rows] == list(EXPECTED)
    assert [(row["id"], row["role"]) for row in rows if row["result"] == "pass"] == [("XV-1", "server")]
    assert results.rows(complete=False) == [{"id": "XV-1", "role": "server", "result": "pass"}]


def test_one_failed_variant_fails_the_clause() -> None:
    results = Results()
    for passed in (True, False, True):
        results.add("WA-2", "workload", passed)

    assert results.rows(complete=False) == [{"id": "WA-2", "role": "workload", "result": "fail"}]


def test_no_clause_stands_twice() -> None:
    assert len({clause.id for clause in CLAUSES}) == len(CLAUSES)
