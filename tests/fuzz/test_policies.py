"""Policies: any file ends in a policy or in a list of faults, and a policy allows what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzz.models import is_spiffe_id, policy_allows
from ztmtls.authz import METHODS, Policy, PolicyError, load_policy
from ztmtls.ids import SpiffeId
from ztmtls.reasons import Reason

CALLERS = [f"spiffe://zt.example/{name}" for name in ("a", "b", "a/b")]
SEGMENTS = st.sampled_from(["orders", "Orders", "{id}", "{x}", "a.b", "~a", "..."])
TEMPLATES = st.lists(SEGMENTS, max_size=3).map(lambda segments: "/" + "/".join(segments))
RULES = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.text("abc", min_size=1, max_size=4),
            "callers": st.lists(st.sampled_from(CALLERS), min_size=1, max_size=3),
            "methods": st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=3),
            "paths": st.lists(TEMPLATES, min_size=1, max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda rule: str(rule["name"]),
)
PATHS = st.lists(st.sampled_from(["orders", "Orders", "7", "", "{id}", "a.b", "~a", "..."]), max_size=4).map(
    lambda segments: "/" + "/".join(segments)
)


@given(RULES, st.sampled_from(CALLERS), st.sampled_from([*sorted(METHODS), "get", "TRACE"]), PATHS)
def test_a_policy_allows_what_its_rules_say_and_nothing_else(
    rules: list[dict[str, Any]], caller: str, method: str, path: str
) -> None:
    policy = Policy.parse({"version": 1, "rules": rules})

    decision = policy.decide(SpiffeId.parse(caller), method, path)

    assert decision.allowed == policy_allows(policy.rules, caller, method, path)
    assert policy.names(SpiffeId.parse(caller)) == any(caller in rule["callers"] for rule in rules)
    if not decision.allowed:
        named = policy.names(SpiffeId.parse(caller))
        assert decision.reason is (Reason.ROUTE_NOT_ALLOWED if named else Reason.CALLER_NOT_ALLOWED)


# What stands where something else should be.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.one_of(st.text(max_size=4), st.integers()), max_size=3),
    st.sampled_from(
        ["/", "//", "/a/../b", "/{}", "/{a}{b}", "/*", "GET", "*", "spiffe://zt.example", *CALLERS]
    ),
)
ODD_LISTS = st.one_of(ODD, st.lists(ODD, max_size=3))
ODD_RULES = st.one_of(
    ODD,
    st.dictionaries(
        st.sampled_from(["name", "callers", "methods", "paths", "path", 1]), ODD_LISTS, max_size=5
    ),
)
ODD_DOCUMENTS = st.one_of(
    ODD,
    st.dictionaries(st.text(max_size=8), ODD),
    st.fixed_dictionaries({"version": st.one_of(st.just(1), ODD), "rules": st.lists(ODD_RULES, max_size=3)}),
)


@st.composite
def documents_with_one_fault(draw: st.DrawFn) -> dict[str, Any]:
    rules: list[dict[Any, Any]] = [dict(rule) for rule in draw(RULES)]
    rule = draw(st.sampled_from(rules))
    key = draw(st.sampled_from(["name", "callers", "methods", "paths", "other"]))
    rule[key] = draw(ODD_LISTS)
    return {"version": 1, "rules": rules}


@given(st.one_of(ODD_DOCUMENTS, documents_with_one_fault()))
def test_any_document_is_a_policy_or_a_list_of_faults(document: Any) -> None:
    try:
        policy = Policy.parse(document)
    except PolicyError as error:
        event("refused")
        assert error.reason is Reason.INVALID_POLICY
        assert error.faults
        assert all(fault.isprintable() for fault in error.faults), error.faults
        return

    event("accepted")
    assert document["version"] == 1
    for rule, given_rule in zip(policy.rules, document["rules"], strict=True):
        assert set(given_rule) == {"name", "callers", "methods", "paths"}
        assert rule.callers
        assert rule.paths
        assert rule.methods
        assert rule.methods <= METHODS
        for caller in rule.callers:
            assert is_spiffe_id(str(caller))
            assert str(caller).count("/") > 2, "a trust domain is no caller"
        for path in rule.paths:
            assert path.startswith("/")
            assert not {"", ".", ".."} & set(path[1:].split("/") if path != "/" else ())


YAML_PIECES = st.sampled_from(
    [
        "version: 1\n",
        "rules:\n",
        "- ",
        "  ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!binary ",
        "!!python/object:os.x ",
        "<<: ",
        "'",
        '"',
        "|\n",
        ">\n",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "name: r\n",
        "callers: ",
        "? ",
        ": ",
        "\t",
        "2026-99-99",
        "0x",
        "1e999",
        ".nan",
        "!!set ",
        "!!int a",
        "!!timestamp x",
        "\x00",
        "�",
        "é",
        "#",
        "\n",
    ]
)


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies") / "policy.yaml"


@given(
    st.one_of(
        st.lists(YAML_PIECES, max_size=20).map(
            lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass")
        ),
        st.binary(max_size=200),
        RULES.map(lambda rules: yaml.safe_dump({"version": 1, "rules": rules}).encode()),
    )
)
def test_any_file_is_a_policy_or_a_list_of_faults(policy_path: Path, content: bytes) -> None:
    policy_path.write_bytes(content)
    try:
        policy = load_policy(policy_path)
    except PolicyError as error:
        event("refused")
        assert error.faults
        assert all(fault.isprintable() for fault in error.faults), error.faults
        return
    event("accepted")
    assert policy.rules
