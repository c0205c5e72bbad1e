"""NetworkPolicies read as the API says they are to be read (networking.k8s.io/v1)."""

from __future__ import annotations

from typing import Any

import pytest

from ztdev.kubernetes.reach import Place, Policies, Port, pods

WEB = Port(8443, "TCP", "web")
ONE = Place("one", "a", (("app", "one"),), (WEB,))
TWO = Place("two", "a", (("app", "two"),), (WEB,))
AWAY = Place("one", "b", (("app", "one"),), (WEB,))
OUTSIDE = Place("outside", address="198.51.100.1")


def policy(selector: dict[str, Any], namespace: str = "a", **spec: Any) -> dict[str, Any]:
    metadata = {"name": "it", "namespace": namespace}
    return {"kind": "NetworkPolicy", "metadata": metadata, "spec": {"podSelector": selector, **spec}}


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def test_who_is_selected_by_no_policy_is_open() -> None:
    policies = Policies([policy({"matchLabels": {"app": "two"}}, policyTypes=["Ingress"])])
    assert policies.allow(TWO, ONE, WEB)
    assert not policies.allow(ONE, TWO, WEB)


def test_both_sides_must_allow_it() -> None:
    out = policy(
        {"matchLabels": {"app": "one"}}, egress=[{"to": [{"podSelector": {}}]}], policyTypes=["Egress"]
    )
    into = policy({"matchLabels": {"app": "two"}}, ingress=[{"from": [{"podSelector": {}}]}])
    shut = policy({"matchLabels": {"app": "two"}}, policyTypes=["Ingress"])
    assert Policies([out, into]).allow(ONE, TWO, WEB)
    assert not Policies([out, shut]).allow(ONE, TWO, WEB)
    assert Policies([out, into, shut]).allow(ONE, TWO, WEB), "policies add up"


def test_without_types_egress_is_meant_only_where_it_is_written() -> None:
    assert Policies([policy({})]).allow(ONE, AWAY, WEB)
    assert not Policies([policy({}, egress=[])]).allow(ONE, AWAY, WEB)


@pytest.mark.parametrize(
    ("peer", "who"),
    [
        ({"podSelector": {"matchLabels": {"app": "one"}}}, {"one of a"}),
        ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "one"}}}, {"one of a", "one of b"}),
        ({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "b"}}}, {"one of b"}),
        ({"namespaceSelector": {"matchLabels": {"team": "x"}}}, {"one of b"}),
        (
            {"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}},
            {"one of a"},
        ),
        (
            {"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["one"]}]}},
            {"one of a"},
        ),
        (
            {"podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["one"]}]}},
            set(),
        ),
        ({"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}}, {"one of a"}),
        ({"ipBlock": {"cidr": "198.51.100.0/24"}}, {"outside"}),
        ({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["198.51.100.0/24"]}}, set()),
    ],
)
def test_who_a_peer_is(peer: dict[str, Any], who: set[str]) -> None:
    """Side by side in one peer they are both meant; an address is never a pod's."""
    objects = [policy({}, ingress=[{"from": [peer]}]), namespace("a"), namespace("b", team="x")]
    found = {"one of a": ONE, "one of b": AWAY, "outside": OUTSIDE}
    policies = Policies(objects)
    assert {name for name, sender in found.items() if policies.allow(sender, TWO, WEB)} == who


@pytest.mark.parametrize(
    ("ports", "allowed"),
    [
        ([], True),
        ([{"port": 8443}], True),
        ([{"protocol": "UDP", "port": 8443}], False),
        ([{"port": 8000, "endPort": 9000}], True),
        ([{"port": 8000, "endPort": 8400}], False),
        ([{"port": "web"}], True),
        ([{"port": "other"}], False),
        ([{"protocol": "TCP"}], True),
    ],
)
def test_which_ports(ports: list[dict[str, Any]], allowed: bool) -> None:
    assert Policies([policy({}, ingress=[{"ports": ports}])]).allow(ONE, TWO, WEB) is allowed


def test_a_pod_on_the_network_of_its_node_is_the_node() -> None:
    template = {
        "metadata": {"labels": {"app": "one"}},
        "spec": {"containers": [{"ports": [{"containerPort": 1}]}]},
    }
    workload = {
        "kind": "Deployment",
        "metadata": {"name": "one", "namespace": "a"},
        "spec": {"template": template},
    }
    assert list(pods([workload])) == [Place("one", "a", (("app", "one"),), (Port(1),))]
    template["spec"]["hostNetwork"] = True
    assert list(pods([workload])) == []


def test_an_operator_that_is_none_is_a_fault() -> None:
    selector = {"matchExpressions": [{"key": "app", "operator": "Maybe"}]}
    with pytest.raises(ValueError, match="Maybe"):
        Policies([policy(selector)]).allow(ONE, TWO, WEB)
