"""The benchmark's guard: it names what is worse than it may be, of what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from bench.guard import LIMITS, Limit, crossed


def results(limit: Limit, value: float) -> dict[str, Any]:
    """As the benchmark writes them."""
    found: Any = value
    for key in reversed(limit.place):
        found = {key: found}
    return dict(found)


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: " ".join(limit.place))
def test_a_ratio_is_taken_at_its_limit_and_not_beyond(limit: Limit) -> None:
    bound, worse = (limit.least, 0.99) if limit.least else (limit.most, 1.01)
    assert limit.crossed(results(limit, bound)) is None
    assert str(limit.crossed(results(limit, bound * worse))).startswith(" / ".join(limit.place))


def test_what_was_not_measured_is_not_judged() -> None:
    assert crossed({"machine": {}}) == []


def test_what_is_measured_otherwise_is_noticed() -> None:
    """A ratio that is gone, or has another name, would else be guarded by nobody."""
    with pytest.raises(KeyError):
        crossed({"decisions": {}})
