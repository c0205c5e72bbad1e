"""Authorizers and the policy: who may be a peer, and who may call what. Everything else is denied."""

from __future__ import annotations

import copy
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ztmtls.authz import (
    METHODS,
    Authorizer,
    NotAuthorized,
    Policy,
    PolicyDocument,
    PolicyError,
    PolicyFile,
    Rule,
    all_of,
    any_of,
    authorize_request,
    decide_request,
    exact,
    is_ambiguous,
    load_policy,
    one_of,
    path_prefix,
    trust_domain,
)
from ztmtls.ids import InvalidSpiffeId, SpiffeId, TrustDomain
from ztmtls.reasons import Reason

ORDERS = "spiffe://zt.example/ns/zt-demo/sa/orders"
FRONTEND = "spiffe://zt.example/ns/zt-demo/sa/frontend"
STRANGER = "spiffe://zt.example/ns/zt-demo/sa/stranger"


def accepts(authorizer: Authorizer, peer: str) -> bool:
    try:
        authorizer(SpiffeId.parse(peer))
    except NotAuthorized as error:
        refusal = error
    else:
        return True
    assert refusal.reason is Reason.CALLER_NOT_ALLOWED
    assert refusal.detail.startswith(f"{peer} is not ")
    return False


# -- Authorizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [ORDERS, SpiffeId.parse(ORDERS)])
def test_exact_accepts_one_id(wanted: str | SpiffeId) -> None:
    authorizer = exact(wanted)

    assert accepts(authorizer, ORDERS)
    for other in (
        FRONTEND, ORDERS + "-evil", ORDERS + "/x", ORDERS[:-1], "spiffe://zt.example",
        "spiffe://zt.example.evil/ns/zt-demo/sa/orders", "spiffe://zt.example/ns/zt-demo/sa/Orders",
        "spiffe://zt.example/orders", "spiffe://zt.example/ns/other/sa/orders",
    ):  # fmt: skip
        assert not accepts(authorizer, other), other


def test_one_of_accepts_those_listed_and_none_means_nobody() -> None:
    authorizer = one_of(ORDERS, SpiffeId.parse(FRONTEND))

    assert accepts(authorizer, ORDERS)
    assert accepts(authorizer, FRONTEND)
    assert not accepts(authorizer, STRANGER)
    assert not accepts(one_of(), ORDERS)


@pytest.mark.parametrize("wanted", ["zt.example", "spiffe://zt.example", TrustDomain("zt.example")])
def test_trust_domain_accepts_its_members_only(wanted: str | TrustDomain) -> None:
    authorizer = trust_domain(wanted)

    assert accepts(authorizer, ORDERS)
    assert accepts(authorizer, "spiffe://zt.example/anything")
    for other in ("spiffe://zt.example.evil/a", "spiffe://evil.zt.example/a", "spiffe://zt.exampl/e"):
        assert not accepts(authorizer, other), other


def test_one_workloads_id_is_not_taken_for_its_whole_domain() -> None:
    with pytest.raises(InvalidSpiffeId):
        trust_domain(ORDERS)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("spiffe://td/spire/agent", True),
        ("spiffe://td/spire/agent/x", True),
        ("spiffe://td/spire/agent/x/y", True),
        ("spiffe://td/spire/agentish", False),
        ("spiffe://td/spire/agent-x/y", False),
        ("spiffe://td/spire/agen", False),
        ("spiffe://td/spire", False),
        ("spiffe://td", False),
        ("spiffe://td/x/spire/agent", False),
        ("spiffe://td/Spire/agent", False),
        ("spiffe://td.evil/spire/agent/x", False),
        ("spiffe://other/spire/agent/x", False),
    ],
)
def test_path_prefix_ends_on_segment_boundaries(peer: str, expected: bool) -> None:
    assert accepts(path_prefix("spiffe://td/spire/agent"), peer) is expected


def test_path_prefix_without_a_path_accepts_nobody() -> None:
    authorizer = path_prefix("spiffe://zt.example")

    assert not accepts(authorizer, ORDERS)
    assert not accepts(authorizer, "spiffe://zt.example")


def test_any_of_needs_one_and_all_of_needs_every_one() -> None:
    domain, orders = trust_domain("zt.example"), exact(ORDERS)

    assert accepts(any_of(orders, exact(FRONTEND)), FRONTEND)
    assert not accepts(any_of(orders, exact(FRONTEND)), STRANGER)
    assert accepts(all_of(domain, orders), ORDERS)
    assert not accepts(all_of(domain, orders), FRONTEND)
    assert not accepts(all_of(trust_domain("other"), orders), ORDERS)
    assert accepts(any_of(all_of(domain, orders), exact(FRONTEND)), FRONTEND)


def test_combinations_of_nothing_accept_nobody() -> None:
    for nothing in (any_of(), all_of(), any_of(any_of(), all_of()), all_of(one_of())):
        assert not accepts(nothing, ORDERS)


def test_authorizer_that_fails_does_not_let_anybody_in() -> None:
    def broken(peer: SpiffeId, /) -> None:
        raise RuntimeError("broken")

    for combined in (any_of(broken, exact(ORDERS)), all_of(broken, exact(ORDERS)), all_of(broken)):
        with pytest.raises(RuntimeError):
            combined(SpiffeId.parse(ORDERS))


@pytest.mark.parametrize("make", [exact, one_of, path_prefix])
@pytest.mark.parametrize(
    "text", ["", "orders", "spiffe://zt.example/*", "spiffe://ZT.example/a", ORDERS + "/"]
)
def test_authorizers_refuse_what_is_no_spiffe_id(make: Callable[[str], Authorizer], text: str) -> None:
    with pytest.raises(InvalidSpiffeId):
        make(text)


def test_authorizers_say_what_they_accept() -> None:
    orders, both = f"<authorizer: {ORDERS}>", f"<authorizer: one of {FRONTEND}, {ORDERS}>"

    assert repr(exact(ORDERS)) == orders
    assert repr(one_of(ORDERS, FRONTEND)) == both
    assert repr(one_of()) == "<authorizer: one of nobody>"
    assert repr(trust_domain("zt.example")) == "<authorizer: in trust domain zt.example>"
    assert repr(path_prefix(ORDERS)) == f"<authorizer: {ORDERS} or below it>"
    for combine, name in ((any_of, "any of"), (all_of, "all of")):
        assert (
            repr(combine(exact(ORDERS), one_of(ORDERS, FRONTEND))) == f"<authorizer: {name} {orders}, {both}>"
        )


# -- Decisions ------------------------------------------------------------------------------------------

DOCUMENT: dict[str, Any] = {
    "version": 1,
    "rules": [
        {
            "name": "frontend-reads",
            "callers": [FRONTEND],
            "methods": ["GET"],
            "paths": ["/orders", "/orders/{order_id}", "/orders/{order_id}/items/{item}", "/status", "/"],
        },
        {"name": "frontend-places", "callers": [FRONTEND], "methods": ["POST"], "paths": ["/orders"]},
        {"name": "both-ping", "callers": [FRONTEND, ORDERS], "methods": ["GET", "HEAD"], "paths": ["/ping"]},
        {"name": "literal", "callers": [ORDERS], "methods": ["GET"], "paths": ["/a*", "/*", "/**/x", "/.x"]},
        {"name": "shadowed", "callers": [FRONTEND], "methods": ["GET"], "paths": ["/orders/special"]},
    ],
}


@pytest.mark.parametrize(
    ("caller", "method", "path", "rule"),
    [
        (FRONTEND, "GET", "/orders", "frontend-reads"),
        (FRONTEND, "POST", "/orders", "frontend-places"),
        (FRONTEND, "GET", "/orders/1", "frontend-reads"),
        (FRONTEND, "GET", "/orders/ü 1", "frontend-reads"),
        (FRONTEND, "GET", "/orders/{order_id}", "frontend-reads"),
        (FRONTEND, "GET", "/orders/1/items/2", "frontend-reads"),
        (FRONTEND, "GET", "/orders/special", "frontend-reads"),  # the first rule that fits
        (FRONTEND, "GET", "/", "frontend-reads"),
        (FRONTEND, "HEAD", "/ping", "both-ping"),
        (ORDERS, "GET", "/ping", "both-ping"),
        (ORDERS, "GET", "/a*", "literal"),
        (ORDERS, "GET", "/*", "literal"),
        (ORDERS, "GET", "/**/x", "literal"),
        (ORDERS, "GET", "/.x", "literal"),
    ],
)
def test_allowed_by_the_rule_that_names_it(caller: str, method: str, path: str, rule: str) -> None:
    decision = Policy.parse(DOCUMENT).decide(SpiffeId.parse(caller), method, path)

    assert decision.allowed
    assert (decision.rule, decision.reason) == (rule, None)


@pytest.mark.parametrize(
    ("caller", "method", "path"),
    [
        # method
        (FRONTEND, "DELETE", "/orders"), (FRONTEND, "get", "/orders"), (FRONTEND, "HEAD", "/orders"),
        (FRONTEND, "POST", "/orders/1"), (FRONTEND, "", "/orders"), (FRONTEND, "GET ", "/orders"),
        (FRONTEND, "OPTIONS", "/orders"), (FRONTEND, "WEBSOCKET", "/orders"), (FRONTEND, "FOO\n", "/orders"),
        # path
        (FRONTEND, "GET", "/unlisted"), (FRONTEND, "GET", "/Orders"), (FRONTEND, "GET", "/orders/"),
        (FRONTEND, "GET", "//orders"), (FRONTEND, "GET", "/orders/1/"), (FRONTEND, "GET", "/orders//items/2"),
        (FRONTEND, "GET", "/orders/1/items/"), (FRONTEND, "GET", "/orders/1/items"),
        (FRONTEND, "GET", "/orders/1/items/2/x"), (FRONTEND, "GET", "orders"), (FRONTEND, "GET", ""),
        (FRONTEND, "GET", "*"), (FRONTEND, "GET", "/orders?x=1"), (FRONTEND, "GET", "/x/../orders"),
        (FRONTEND, "GET", "/orders\n"), (FRONTEND, "GET", "/status/1"), (FRONTEND, "GET", "/orders%2f1"),
        (FRONTEND, "GET", "xorders"),
        # wildcards are not special
        (ORDERS, "GET", "/ab"), (ORDERS, "GET", "/a"), (ORDERS, "GET", "/x"), (ORDERS, "GET", "/x/x"),
        (ORDERS, "GET", "/bx"),
        # another caller's route
        (ORDERS, "GET", "/orders"), (ORDERS, "POST", "/orders"),
    ],
)  # fmt: skip
def test_route_no_rule_allows(caller: str, method: str, path: str) -> None:
    decision = Policy.parse(DOCUMENT).decide(SpiffeId.parse(caller), method, path)

    assert not decision.allowed
    assert (decision.rule, decision.reason) == (None, Reason.ROUTE_NOT_ALLOWED)
    assert caller in decision.detail
    assert decision.detail.isprintable()


@pytest.mark.parametrize(
    "caller",
    [STRANGER, FRONTEND + "/x", FRONTEND + "x", "spiffe://zt.example", "spiffe://zt.example/frontend",
     "spiffe://zt.example.evil/ns/zt-demo/sa/frontend", "spiffe://other/ns/zt-demo/sa/frontend"],
)  # fmt: skip
def test_caller_no_rule_names(caller: str) -> None:
    decision = Policy.parse(DOCUMENT).decide(SpiffeId.parse(caller), "GET", "/orders")

    assert not decision.allowed
    assert (decision.rule, decision.reason) == (None, Reason.CALLER_NOT_ALLOWED)
    assert caller in decision.detail


def test_policy_of_no_rules_denies_everything() -> None:
    assert not Policy([]).decide(SpiffeId.parse(FRONTEND), "GET", "/").allowed


def test_detail_of_a_long_request_is_short_and_on_one_line() -> None:
    decision = Policy.parse(DOCUMENT).decide(SpiffeId.parse(FRONTEND), "X" * 9999, "/a\n" + "b" * 9999)

    shown = f"{'X' * 16}… /a\\n{'b' * 124}…"
    assert decision.detail == f"no rule lets {FRONTEND} use {shown}"
    assert decision.detail.isprintable()


def test_rules_do_not_mix_callers_methods_and_paths() -> None:
    # Given two rules, only the pairs of one rule are allowed, not their products.
    policy = Policy.parse(
        {
            "version": 1,
            "rules": [
                {"name": "a", "callers": [FRONTEND], "methods": ["GET"], "paths": ["/a"]},
                {"name": "b", "callers": [ORDERS], "methods": ["POST"], "paths": ["/b"]},
                {"name": "c", "callers": [FRONTEND], "methods": ["POST"], "paths": ["/c"]},
            ],
        }
    )
    allowed = {
        (caller, method, path)
        for caller in (FRONTEND, ORDERS)
        for method in METHODS
        for path in ("/a", "/b", "/c")
        if policy.decide(SpiffeId.parse(caller), method, path).allowed
    }

    assert allowed == {(FRONTEND, "GET", "/a"), (ORDERS, "POST", "/b"), (FRONTEND, "POST", "/c")}


# -- Requests -------------------------------------------------------------------------------------------


def denied(
    policy: Policy | PolicyFile, caller: str, method: str, path: str, raw: bytes = b""
) -> NotAuthorized:
    with pytest.raises(NotAuthorized) as caught:
        authorize_request(policy, SpiffeId.parse(caller), method, path, raw or path.encode())
    return caught.value


def test_the_first_rule_that_allows_it_is_named_whatever_else_matches() -> None:
    """All pairs and triples of templates of two segments, against reading the rules from top to bottom."""
    caller = SpiffeId.parse(ORDERS)
    parts = ("a", "b", "{one}")
    templates = [f"/{first}/{second}" for first in parts for second in parts]
    paths = [f"/{first}/{second}" for first in ("a", "b", "c", "") for second in ("a", "b", "c", "")]

    def matches(template: str, path: str) -> bool:
        pairs = zip(template[1:].split("/"), path[1:].split("/"), strict=True)
        return all(got != "" if want.startswith("{") else want == got for want, got in pairs)

    for number in (2, 3):
        for chosen in itertools.permutations(templates, number):
            rules = [
                Rule(template, frozenset({caller}), frozenset({"GET"}), (template,)) for template in chosen
            ]
            policy = Policy(rules)
            for path in paths:
                first = next((template for template in chosen if matches(template, path)), None)
                assert policy.decide(caller, "GET", path).rule == first, (chosen, path)


def test_a_decision_looks_at_shapes_and_not_at_every_rule() -> None:
    caller = SpiffeId.parse(ORDERS)

    def looks(rules: int) -> int:
        """How many functions are called for one decision."""
        paths = tuple(f"/orders-{number}/{{order_id}}" for number in range(rules))
        policy = Policy([Rule("many", frozenset({caller}), frozenset({"GET"}), paths)])
        called = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal called
            called += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            assert policy.decide(caller, "GET", f"/orders-{rules - 1}/7").allowed
        finally:
            sys.setprofile(None)
        return called

    assert looks(10_000) == looks(1)


def test_request_is_allowed_by_a_rule_or_denied_for_a_reason() -> None:
    policy = Policy.parse(DOCUMENT)
    frontend = SpiffeId.parse(FRONTEND)
    assert authorize_request(policy, frontend, "POST", "/orders", b"/orders") == "frontend-places"
    assert authorize_request(policy, frontend, "GET", "/orders/a b", b"/orders/a%20b?c") == "frontend-reads"

    for caller, method, path, reason in (
        (STRANGER, "GET", "/orders", Reason.CALLER_NOT_ALLOWED),
        (FRONTEND, "DELETE", "/orders", Reason.ROUTE_NOT_ALLOWED),
        (FRONTEND, "GET", "/unlisted", Reason.ROUTE_NOT_ALLOWED),
    ):
        error = denied(policy, caller, method, path)
        assert error.reason is reason
        decision = decide_request(policy, SpiffeId.parse(caller), method, path, path.encode())
        assert decision == policy.decide(SpiffeId.parse(caller), method, path)
        assert (error.reason, error.detail) == (decision.reason, decision.detail)


@pytest.mark.parametrize(
    ("path", "raw"),
    [("/orders/a", b"/orders%2fa"), ("/orders/a%", b"/orders/a"), ("/orders/..", b"/orders/x")],
)
def test_ambiguous_request_is_denied_before_the_policy_is_asked(path: str, raw: bytes) -> None:
    policy = Policy.parse(DOCUMENT)
    assert policy.decide(SpiffeId.parse(FRONTEND), "GET", path).allowed

    error = denied(policy, FRONTEND, "GET", path, raw)

    assert error.reason is Reason.AMBIGUOUS_PATH
    assert "more than one way" in error.detail


def test_request_is_decided_by_the_policy_in_force(path: Path) -> None:
    path.write_text(GOOD)
    file = PolicyFile(path)
    assert authorize_request(file, SpiffeId.parse(FRONTEND), "GET", "/a", b"/a") == "r"

    path.write_text(GOOD.replace("/a]", "/changed]"))
    assert file.reload_if_changed()

    assert denied(file, FRONTEND, "GET", "/a").reason is Reason.ROUTE_NOT_ALLOWED
    assert authorize_request(file, SpiffeId.parse(FRONTEND), "GET", "/changed", b"/changed") == "r"


# -- Paths with more than one reading ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/a/b", b"/a%2fb"), ("/a/b", b"/a%2Fb"), ("/a\\b", b"/a%5cb"), ("/a\\b", b"/a%5Cb"),
        ("/a\\b", b"/a\\b"), ("/..", b"/%2e%2e"), ("/.", b"/%2E"), ("/a/../b", b"/a/%2e./b"),
        ("/a.b", b"/a%2eb"), ("/a\0", b"/a%00"), ("/a%2fb", b"/a%252fb"), ("/a%", b"/a%25"),
        ("/a%2fb", b"/a%%32fb"), ("/a%2fb", b"/a%2%66b"), ("/a%zz", b"/a%zz"), ("/a#/b", b"/a#/b"),
        # Either of the two is enough: a server may decode in its own way.
        ("/ab", b"/a%5cb"), ("/ab", b"/a%5Cb"), ("/ab", b"/a%00b"), ("/ab", b"/a%25b"), ("/ab", b"/a\\b"),
        ("/a\\b", b"/ab"), ("/a%2fb", b"/ab"),
        ("/a;b=c", b"/a;b=c"), ("//a", b"//a"), ("/a//b", b"/a//b"), ("/a//", b"/a//"), ("//", b"//"),
        ("/./a", b"/./a"), ("/a/.", b"/a/."), ("/../a", b"/../a"), ("/a/..", b"/a/.."), ("/..", b"/.."),
        ("", b""), ("a", b"a"), ("*", b"*"), ("http://host/a", b"http://host/a"),
        ("/a\n", b"/a%0a"), ("/a\r\n", b"/a%0d%0a"), ("/a\t", b"/a%09"), ("/a\x7f", b"/a%7f"),
        ("/a\u200b", b"/a%e2%80%8b"), ("/a\u202e", b"/a%e2%80%ae"), ("/a\u2028", b"/a%e2%80%a8"),
        ("/a\xa0", b"/a%c2%a0"), ("/a\ufeff", b"/a%ef%bb%bf"),
        # Bytes that are not UTF-8: servers decode all of them to the same replacement character.
        ("/a\ufffd", b"/a%ff"), ("/a\ufffd", b"/a%c0%af"),
    ],
)  # fmt: skip
def test_ambiguous_path(path: str, raw: bytes) -> None:
    assert is_ambiguous(path, raw)


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/", b"/"), ("/a", b"/a"), ("/a/b", b"/a/b"), ("/a/", b"/a/"), ("/...", b"/..."), ("/.a", b"/.a"),
        ("/a..b", b"/a..b"), ("/a b", b"/a%20b"), ("/ü", b"/%C3%BC"), ("/a+b", b"/a+b"),
        ("/a~_-.b", b"/a~_-.b"),
        ("/a#b", b"/a%23b"), ("/a?b", b"/a%3fb"), ("/a", b"/a?#"),
        ("/{id}", b"/%7Bid%7D"), ("/a:b@c,d", b"/a:b@c,d"), ("/a", b"/a?x=%2f..%2e&y=%00\\;"),
        ("/a", b"/a?"), ("/a", b"/a?b?%2f"), ("/a", b"/a?%2f?b"),
    ],
)  # fmt: skip
def test_path_with_one_meaning(path: str, raw: bytes) -> None:
    assert not is_ambiguous(path, raw)


# -- Reading a policy -----------------------------------------------------------------------------------


def rule(**changes: Any) -> dict[str, Any]:
    return {"name": "r", "callers": [FRONTEND], "methods": ["GET"], "paths": ["/a"]} | changes


def faults(document: object) -> tuple[str, ...]:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(document)
    error = caught.value
    assert error.reason is Reason.INVALID_POLICY
    assert isinstance(error, ValueError)
    assert all(fault and fault.isprintable() for fault in error.faults)
    assert error.detail == "; ".join(error.faults)
    return error.faults


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, "mapping"), ([], "mapping"), ("version: 1", "mapping"), (1, "mapping"),
        ({"rules": [rule()]}, "'version' must be 1"),
        ({"version": 2, "rules": [rule()]}, "'version' must be 1"),
        ({"version": "1", "rules": [rule()]}, "'version' must be 1"),
        ({"version": None, "rules": [rule()]}, "'version' must be 1"),
        ({"version": True, "rules": [rule()]}, "'version' must be 1"),
        ({"version": [1], "rules": [rule()]}, "'version' must be 1"),
        ({"version": 1}, "'rules' must be"), ({"version": 1, "rules": []}, "'rules' must be"),
        ({"version": 1, "rules": None}, "'rules' must be"), ({"version": 1, "rules": {}}, "'rules' must be"),
        ({"version": 1, "rules": "all"}, "'rules' must be"),
        ({"version": 1, "rules": [rule()], "default": "allow"}, "unknown key 'default'"),
        ({"version": 1, "rules": [rule()], "Rules": []}, "unknown key 'Rules'"),
        ({"version": 1, "rules": [rule()], "x\ny": 1}, r"unknown key 'x\ny'"),
    ],
)  # fmt: skip
def test_policy_that_is_no_policy(document: object, expected: str) -> None:
    found = faults(document)

    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, "must be a mapping"), ("all", "must be a mapping"), ([], "must be a mapping"),
        (rule(allow=True), "unknown key 'allow'"),
        (rule(Callers=[FRONTEND]), "unknown key 'Callers'"),
        ({k: v for k, v in rule().items() if k != "name"}, "'name'"),
        (rule(name=""), "'name'"), (rule(name=None), "'name'"), (rule(name=7), "'name'"),
        (rule(name="a\nb"), "'name'"), (rule(name=["r"]), "'name'"),
        ({k: v for k, v in rule().items() if k != "callers"}, "'callers'"),
        (rule(callers=[]), "'callers'"), (rule(callers=None), "'callers'"),
        (rule(callers=FRONTEND), "'callers'"),
        (rule(callers=[7]), "'callers'"), (rule(callers=[[FRONTEND]]), "'callers'"),
        (rule(callers={FRONTEND: True}), "'callers'"), (rule(callers=[FRONTEND, None]), "'callers'"),
        (rule(callers=["*"]), "caller '*'"), (rule(callers=["any"]), "caller 'any'"),
        (rule(callers=["spiffe://zt.example/*"]), "'*'"),
        (rule(callers=["spiffe://zt.example/ns/{ns}/sa/x"]), "'{ns}'"),
        (rule(callers=[FRONTEND + "/"]), "ends in '/'"), (rule(callers=[FRONTEND + "\n"]), r"frontend\n'"),
        (rule(callers=["SPIFFE://zt.example/a"]), "does not begin with"),
        (rule(callers=["spiffe://zt.example"]), "names a trust domain, not a workload"),
        (rule(methods=[]), "'methods'"), (rule(methods="GET"), "'methods'"),
        (rule(methods=[True]), "'methods'"),
        (rule(methods=["get"]), "unknown method 'get'"), (rule(methods=["*"]), "unknown method '*'"),
        (rule(methods=["ANY"]), "unknown method 'ANY'"),
        (rule(methods=["CONNECT"]), "unknown method 'CONNECT'"),
        (rule(methods=["GET "]), "unknown method 'GET '"), (rule(methods=["GET,POST"]), "unknown method"),
        (rule(paths=[]), "'paths'"), (rule(paths="/a"), "'paths'"), (rule(paths=[1]), "'paths'"),
        (rule(paths=["a"]), "must begin with '/'"), (rule(paths=[""]), "must begin with '/'"),
        (rule(paths=["*"]), "must begin with '/'"), (rule(paths=["/a/"]), "holds the segment ''"),
        (rule(paths=["//a"]), "holds the segment ''"), (rule(paths=["/a//b"]), "holds the segment ''"),
        (rule(paths=["/."]), "holds the segment '.'"), (rule(paths=["/a/../b"]), "holds the segment '..'"),
        (rule(paths=["/{}"]), "one {name}"), (rule(paths=["/{a}{b}"]), "one {name}"),
        (rule(paths=["/x{a}"]), "one {name}"), (rule(paths=["/{a}.json"]), "one {name}"),
        (rule(paths=["/{a:path}"]), "one {name}"), (rule(paths=["/{1a}"]), "one {name}"),
        (rule(paths=["/{a b}"]), "one {name}"), (rule(paths=["/{a"]), "one {name}"),
        (rule(paths=["/a?x=1"]), "one {name}"), (rule(paths=["/a#b"]), "one {name}"),
        (rule(paths=["/a%2fb"]), "one {name}"), (rule(paths=["/a b"]), "one {name}"),
        (rule(paths=["/a\n"]), "one {name}"), (rule(paths=["/a\\b"]), "one {name}"),
        (rule(paths=["/ü"]), "one {name}"),
    ],
)  # fmt: skip
def test_fault_in_a_rule_is_named_with_its_place(entry: object, expected: str) -> None:
    found = faults({"version": 1, "rules": [rule(name="good"), entry]})

    assert len(found) == 1, found
    assert found[0].startswith("rules[1]")
    assert expected in found[0]


def test_every_fault_is_named_at_once() -> None:
    found = faults(
        {
            "version": 3,
            "default": "allow",
            "rules": [
                rule(name="", methods=["get", "FETCH"]),
                rule(callers=["nobody", "spiffe://zt.example"], paths=["a", "/b/", "/{c"]),
                "all",
                {"name": "empty"},
                rule(name="twice"),
                rule(name="twice"),
                rule(name="twice"),
            ],
        }
    )

    for expected, times in {
        "unknown key 'default'": 1, "'version' must be 1": 1, "rules[0]": 3, "rules[1]": 5, "rules[2]": 1,
        "rules[3]": 3, "rule name 'twice' is used twice": 1,
    }.items():  # fmt: skip
        assert sum(expected in fault for fault in found) == times, (expected, found)
    assert len(found) == 15


def test_each_name_used_twice_is_named() -> None:
    assert faults({"version": 1, "rules": [rule(name=name) for name in "baab"]}) == (
        "rule name 'a' is used twice",
        "rule name 'b' is used twice",
    )


def test_parsing_changes_nothing_in_the_document() -> None:
    before = copy.deepcopy(DOCUMENT)

    Policy.parse(DOCUMENT)

    assert before == DOCUMENT


# -- Policy files ---------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.yaml"


def test_policy_file_is_read(path: Path) -> None:
    path.write_text(yaml.safe_dump(DOCUMENT), encoding="utf-8")

    policy = load_policy(path)

    assert [r.name for r in policy.rules] == [r["name"] for r in DOCUMENT["rules"]]
    assert policy.decide(SpiffeId.parse(FRONTEND), "POST", "/orders").rule == "frontend-places"
    assert load_policy(str(path)).rules == policy.rules


def test_aliases_that_only_save_writing_are_fine(path: Path) -> None:
    path.write_text(
        f"version: 1\nrules:\n- {{name: a, callers: &c ['{FRONTEND}'], methods: [GET], paths: [/a]}}\n"
        "- {name: b, callers: *c, methods: [POST], paths: [/b]}\n"
    )

    assert load_policy(path).decide(SpiffeId.parse(FRONTEND), "POST", "/b").rule == "b"


RULE = f"{{name: r, callers: ['{FRONTEND}'], methods: [GET], paths: [/a]}}"
GOOD = f"version: 1\nrules: [{RULE}]\n"

BROKEN = {
    "empty": "",
    "comment only": "# nothing\n",
    "not YAML": "rules: [",
    "tab": "version:\t1\n\trules: []",
    "two documents": f"{GOOD}---\n{GOOD}",
    "NUL": GOOD + "\0",
    "key twice": GOOD + "version: 1\n",
    "rules twice": f"{GOOD}rules: [{RULE}]\n",
    "key twice in a rule": f"version: 1\nrules: [{{callers: [], {RULE[1:]}]\n",
    "key twice by alias": "&k version: 1\n*k : 1\nrules: []\n",
    "key that is no string": f"{GOOD}1: 2\n",
    "key that is a list": f"{GOOD}? [a]\n: 1\n",
    "merge key": f"version: 1\nrules: [{{<<: &r {RULE}, name: x}}]\n",
    "alias to nothing": "version: 1\nrules: *nothing\n",
    "alias to itself": "version: 1\nrules: &r [*r]\n",
    "rule within itself": "version: 1\nrules: [&r {name: *r}]\n",
    "Python object": "version: 1\nrules: !!python/object/apply:os.system ['true']\n",
    "unknown tag": "version: 1\nrules: !mine []\n",
    "very deep": "[" * 1_500,
    "binary that is none": "version: !!binary é\nrules: []\n",
    "date that is none": GOOD.replace("name: r", "name: 2026-99-99"),
    "date as name": GOOD.replace("name: r", "name: 2026-01-01"),
    "number that is none": "version: !!int one\nrules: []\n",
    "number without digits": GOOD.replace("version: 1", "version: 0b_"),
    "number of 5000 digits": GOOD.replace("version: 1", "version: " + "1" * 5000),
    "truth that is none": GOOD.replace("version: 1", "version: !!bool maybe"),
    "timestamp that is none": GOOD.replace("version: 1", "version: !!timestamp now"),
    "yes for version": GOOD.replace("version: 1", "version: yes"),
    "no for a method": GOOD.replace("[GET]", "[no]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_a_policy_error_on_one_line(path: Path, case: str) -> None:
    path.write_text(GOOD, encoding="utf-8")
    file = PolicyFile(path)
    good = file.current
    path.write_text(BROKEN[case], encoding="utf-8")

    with pytest.raises(PolicyError) as caught:
        load_policy(path)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    # And a policy in use stays in use.
    assert file.reload_if_changed() is False
    assert file.current is good
    assert file.last_error is not None
    assert "\n" not in str(file.last_error)


def test_list_within_itself_is_refused_where_it_stands(path: Path) -> None:
    path.write_text("version: 1\nrules: &r [*r]\n")

    with pytest.raises(PolicyError, match=r"is not YAML.*recursive") as caught:
        load_policy(path)
    assert caught.value.faults[0].line == 2


def test_each_fault_has_its_place_and_line(path: Path) -> None:
    path.write_text(
        "# comment\n"
        "version: 2\n"
        "rules:\n"
        "  - name: a\n"
        "    callers:\n"
        "      - spiffe://zt.example/ok\n"
        "      - SPIFFE://zt.example/x\n"
        "    methods: [get]\n"
        "    paths: ['/a',\n"
        "      '/b/']\n"
        "    extra: 1\n"
        "  - callers: [spiffe://zt.example]\n"
        "    methods:\n"
        "      []\n"
        "    name: ''\n"
        "  - nothing\n"
        f"  - &twice {RULE}\n"
        "  - *twice\n"
        "other: 1\n"
    )

    with pytest.raises(PolicyError) as caught:
        load_policy(path)

    assert [(fault.line, fault.place, str(fault)) for fault in caught.value.faults] == [
        (19, ("other",), "unknown key 'other'"),
        (2, ("version",), "'version' must be 1"),
        (11, ("rules", 0, "extra"), "rules[0]: unknown key 'extra'"),
        (7, ("rules", 0, "callers", 1), "rules[0]: caller 'SPIFFE://zt.example/x' does not begin with 'spiffe://'"),
        (8, ("rules", 0, "methods", 0), "rules[0]: unknown method 'get'"),
        (10, ("rules", 0, "paths", 1), "rules[0]: path '/b/' holds the segment ''"),
        (15, ("rules", 1, "name"), "rules[1]: 'name' must be a non-empty string"),
        (13, ("rules", 1, "methods"), "rules[1]: 'methods' must be a non-empty list of strings"),
        (12, ("rules", 1, "paths"), "rules[1]: 'paths' must be a non-empty list of strings"),
        (12, ("rules", 1, "callers", 0),
         "rules[1]: caller 'spiffe://zt.example' names a trust domain, not a workload"),
        (16, ("rules", 2), "rules[2] must be a mapping"),
        (17, ("rules", 4, "name"), "rule name 'r' is used twice"),
    ]  # fmt: skip
    assert caught.value.detail.startswith("line 19: unknown key 'other'; line 2: 'version' must be 1; ")


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("version: 1\nrules: [\n", 3, "is not YAML"),
        ("version: 1\nversion: 1\n", 2, "key 'version' is given twice"),
        ("version: 1\n1: 1\n", 2, "a key is no string"),
        ("version: 1\nrules: [*nothing]\n", 2, "is not YAML"),
        ("version: 1\n\n\nrules: {}\n", 4, "'rules' must be a list"),
        ("version: 1\n", 1, "'rules' must be a list"),
        ("", None, "the policy must be a mapping"),
        ("\n- 1\n", 2, "the policy must be a mapping"),
    ],
)
def test_fault_of_the_whole_file_has_the_nearest_line(
    path: Path, text: str, line: int | None, sentence: str
) -> None:
    path.write_text(text)

    with pytest.raises(PolicyError) as caught:
        load_policy(path)

    [fault] = caught.value.faults
    assert fault.line == line
    assert fault.place == (("rules",) if "rules" in sentence and line else ())
    assert sentence in fault


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ((), 2),
        (("rules", 1), 4),
        (("rules", 2), 3),  # of two: nothing stands there
        (("rules", "a"), 3),  # a list has no keys
        (("version", 0), 2),  # a scalar has no parts
        (("rules", 1, "paths", 3), 6),
    ],
)
def test_part_that_is_not_there_has_the_line_of_what_is_around_it(
    path: Path, place: tuple[str | int, ...], line: int
) -> None:
    path.write_text("# comment\nversion: 1\nrules: [{name: a},\n  {\n  name: b,\n  paths: []}]\n")

    assert PolicyDocument.read(path).line(place) == line


def test_file_that_can_not_be_read(path: Path, tmp_path: Path) -> None:
    for unreadable in (path, tmp_path, tmp_path / "missing" / "policy.yaml"):
        with pytest.raises(PolicyError, match="can't be read"):
            load_policy(unreadable)
    path.write_bytes(b"version: 1\nrules: \xff\n")
    with pytest.raises(PolicyError, match="can't be read"):
        load_policy(path)


@pytest.mark.parametrize("place", ["a value", "a key"])
def test_alias_bomb_is_refused_at_once(path: Path, place: str) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    lines.append("rules: *a11" if place == "a value" else "? *a11\n: x")
    path.write_text("\n".join(lines) + "\nversion: 1\n")
    code = (
        "import sys\nfrom ztmtls.authz import PolicyError, load_policy\n"
        "try: load_policy(sys.argv[1])\nexcept PolicyError as error: print(len(str(error)))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))

    found = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        preexec_fn=limit,
    )

    assert found.returncode == 0, found.stderr[-300:]
    assert int(found.stdout) < 2000


def test_changed_file_comes_into_force_once(path: Path) -> None:
    path.write_text(GOOD)
    file = PolicyFile(path)
    assert (file.version, file.reload_if_changed()) == (1, False)

    path.write_text(GOOD.replace("/a]", "/changed]"))

    assert file.reload_if_changed() is True
    assert file.reload_if_changed() is False
    assert file.version == 2
    assert file.current.rules[0].paths == ("/changed",)


def test_replaced_file_of_the_same_size_and_time_is_seen(path: Path, tmp_path: Path) -> None:
    # As Kubernetes does it: another file is put in its place.
    path.write_text(GOOD)
    file = PolicyFile(path)
    other = tmp_path / "new"
    other.write_text(GOOD.replace("/a]", "/b]"))
    stamp = path.stat()
    os.utime(other, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    other.replace(path)

    assert file.reload_if_changed() is True
    assert file.current.rules[0].paths == ("/b",)


def test_good_file_after_a_broken_one_clears_the_error(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ztmtls.authz")
    path.write_text(GOOD)
    file = PolicyFile(path)
    path.unlink()
    assert file.reload_if_changed() is False
    assert file.last_error is not None
    assert file.version == 1

    path.write_text(GOOD.replace("/a]", "/again]"))

    error = file.last_error.detail
    assert file.reload_if_changed() is True
    assert file.last_error is None
    assert file.version == 2
    assert caplog.messages == [
        f"policy not reloaded, the last good one stays in force: {error}",
        f"policy reloaded from {path}: 1 rules",
    ]


# -- Found by mutation: what nothing else held ----------------------------------------------------------


def test_policy_names_its_callers_and_nobody_else() -> None:
    rule = {"name": "r", "callers": [FRONTEND], "methods": ["GET"], "paths": ["/a"]}
    policy = Policy.parse({"version": 1, "rules": [rule]})
    assert policy.names(SpiffeId.parse(FRONTEND)) is True
    assert policy.names(SpiffeId.parse(STRANGER)) is False


@pytest.mark.parametrize("caller", [FRONTEND, STRANGER])
def test_denied_is_false_and_nothing_like_it(caller: str) -> None:
    rule = {"name": "r", "callers": [FRONTEND], "methods": ["GET"], "paths": ["/a"]}
    policy = Policy.parse({"version": 1, "rules": [rule]})
    assert policy.decide(SpiffeId.parse(FRONTEND), "GET", "/a").allowed is True
    assert policy.decide(SpiffeId.parse(caller), "GET", "/b").allowed is False


def test_policy_file_is_in_force_from_the_start(path: Path) -> None:
    path.write_text(GOOD)
    file = PolicyFile(path)
    assert file.current.rules == load_policy(path).rules
    assert file.last_error is None
