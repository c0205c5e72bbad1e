"""What a policy's decision costs, as rules become more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from ztmtls.authz import Policy, Rule
from ztmtls.ids import SpiffeId

Say = Callable[[str], None]

SIZES = (10, 1_000, 100_000)
_GET = frozenset({"GET"})


def _id(number: int) -> SpiffeId:
    return SpiffeId.parse(f"spiffe://bench.example/caller-{number}")


def _of_many_callers(rules: int) -> list[Rule]:
    """A rule for each caller."""
    return [Rule(f"r{n}", frozenset({_id(n)}), _GET, ("/orders/{order_id}",)) for n in range(rules)]


def _of_many_paths(rules: int) -> list[Rule]:
    """All rules are for one caller."""
    return [Rule(f"r{n}", frozenset({_id(0)}), _GET, (f"/things-{n}/{{id}}",)) for n in range(rules)]


def measured(say: Say, turns: int, decisions: int) -> dict[str, Any]:
    """Microseconds of a decision, each on another rule of the policy, turn by turn; and what the largest
    policy costs against the smallest."""
    policies = {}
    for size in SIZES:
        say(f"decisions: making policies of {size} rules")
        policies["callers", size] = Policy(_of_many_callers(size))
        policies["paths", size] = Policy(_of_many_paths(size))
    found: dict[tuple[str, int], list[float]] = {key: [] for key in policies}
    for turn in range(turns):
        say(f"decisions: turn {turn + 1} of {turns}")
        for key in random.sample(tuple(policies), len(policies)):
            found[key].append(_timed(policies[key], key, decisions))
    medians = {key: median(times) for key, times in found.items()}
    return {
        f"one of many {what}": {
            **{f"us_at_{size}": round(medians[what, size] * 1e6, 2) for size in SIZES},
            "ratio": round(medians[what, SIZES[-1]] / medians[what, SIZES[0]], 2),
        }
        for what in ("callers", "paths")
    }


def _timed(policy: Policy, key: tuple[str, int], decisions: int) -> float:
    what, size = key
    chosen = [random.randrange(size) for _ in range(decisions)]
    if what == "callers":
        asked = [(_id(number), "/orders/7") for number in chosen]
    else:
        asked = [(_id(0), f"/things-{number}/7") for number in chosen]
    began = time.perf_counter()
    for caller, path in asked:
        policy.decide(caller, "GET", path)
    took = time.perf_counter() - began
    assert all(policy.decide(caller, "GET", path).allowed for caller, path in asked[:10])
    return took / decisions
