"""Giant and malicious policy files: each costs a bounded time and memory, and never replaces a good one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ztmtls.authz import MAX_POLICY_BYTES, MAX_POLICY_ENTRIES, Policy, PolicyError, PolicyFile, load_policy

# Of this thread's own time, whatever else the machine does. Most take milliseconds, a policy a second or two,
# all more under a coverage tracer. What is not bounded takes for ever.
SECONDS = 20.0


def quickly(action: Callable[[], object]) -> None:
    began = time.thread_time()
    action()
    assert time.thread_time() - began < SECONDS


RULE = "  - {{name: r{0}, callers: ['spiffe://zt.example/c{0}'], methods: [GET], paths: [/p{0}]}}\n"
GOOD = "version: 1\nrules:\n" + RULE.format(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.yaml"


def test_largest_policy_file_is_read_and_a_larger_one_is_not(path: Path) -> None:
    text = "version: 1\nrules:\n"
    count = 0
    while len(text) + 100 < MAX_POLICY_BYTES:
        text += RULE.format(count)
        count += 1
    path.write_text(text.ljust(MAX_POLICY_BYTES - 1) + "\n")
    quickly(lambda: load_policy(path))
    assert len(load_policy(path).rules) == count

    path.write_text(text.ljust(MAX_POLICY_BYTES) + "\n")
    refused(path, "is longer than")


def refused(path: Path, why: str) -> None:
    def refuse() -> None:
        with pytest.raises(PolicyError, match=why) as caught:
            load_policy(path)
        assert len(caught.value.detail) < 10_000

    quickly(refuse)


def test_policy_without_an_end_is_not_read_to_its_end() -> None:
    refused(Path("/dev/zero"), "is longer than")


def lists(callers: int, methods: int, paths: int) -> str:
    """Three anchors, for rules made of aliases."""
    names = ["GET", "PUT", "POST", "HEAD"][:methods]
    return (
        f"  - {{name: all, callers: &c {[f'spiffe://a/{i}' for i in range(callers)]}, "
        f"methods: &m {names}, paths: &p {[f'/p{i}' for i in range(paths)]}}}\n"
    )


@pytest.mark.parametrize(
    ("more", "callers", "methods", "paths"),
    [(0, 500, 4, 51), (2000, 51, 1, 1), (2000, 1, 1, 51), (0, 317, 1, 317)],
)
def test_aliases_that_multiply_are_refused(
    path: Path, more: int, callers: int, methods: int, paths: int
) -> None:
    assert (more + 1) * callers * methods * paths > MAX_POLICY_ENTRIES
    again = "".join(f"  - {{name: r{i}, callers: *c, methods: *m, paths: *p}}\n" for i in range(more))
    path.write_text("version: 1\nrules:\n" + lists(3, 2, 3) + again[:100].split("\n")[0] + "\n")
    assert load_policy(path).rules
    path.write_text("version: 1\nrules:\n" + lists(callers, methods, paths) + again)
    assert path.stat().st_size < MAX_POLICY_BYTES

    refused(path, f"line 2: .* more than {MAX_POLICY_ENTRIES} entries")


@pytest.mark.parametrize(("callers", "methods", "paths"), [(500, 4, 50), (500, 1, 200)])
def test_as_many_entries_as_allowed_are_taken(path: Path, callers: int, methods: int, paths: int) -> None:
    assert callers * methods * paths == MAX_POLICY_ENTRIES
    path.write_text("version: 1\nrules:\n" + lists(callers, methods, paths))
    quickly(lambda: load_policy(path))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{a: " * 30_000, "? " * 100_000, "- " * 100_000, "!!set " * 30_000, "&a [*a, *a]\n"],
    ids=["lists", "mappings", "keys", "items", "tags", "itself"],
)
def test_deep_yaml_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    refused(path, ".")


def test_many_faults_make_a_short_message(path: Path) -> None:
    path.write_text("version: 1\nrules:\n" + "- x\n" * 50_000)
    refused(path, "and 49980 more")
    with pytest.raises(PolicyError) as caught:
        Policy.parse({"version": 1, "rules": ["x"] * 20})
    assert "more" not in caught.value.detail
    with pytest.raises(PolicyError, match="; and 1 more"):
        Policy.parse({"version": 1, "rules": ["x"] * 21})


def test_giant_policy_never_replaces_a_good_one(path: Path) -> None:
    path.write_text(GOOD)
    file = PolicyFile(path)
    good = file.current
    path.write_text(GOOD.ljust(MAX_POLICY_BYTES + 1))
    assert not file.reload_if_changed()
    assert file.current is good
    assert file.last_error is not None
    path.write_text(GOOD + RULE.format(1))
    assert file.reload_if_changed()
    assert len(file.current.rules) == 2
