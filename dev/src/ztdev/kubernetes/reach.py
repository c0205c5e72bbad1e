"""Which pod may connect to which, as the NetworkPolicies of a set of manifests say.

The rules are those of the networking.k8s.io/v1 API: a pod that no policy selects for a direction is open in
it; else a connection needs a rule of some policy that selects the pod. It takes place when the sender's side
and the receiver's side allow it. Pods on the network of their node are the node's: no policy selects them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

Object = Mapping[str, Any]
Direction = Literal["Ingress", "Egress"]


@dataclass(frozen=True)
class Port:
    """A port where a pod listens; `name` is empty for one that has none."""

    number: int
    protocol: str = "TCP"
    name: str = ""

    def __str__(self) -> str:
        return f"{self.protocol.lower()}/{self.number}"


@dataclass(frozen=True)
class Place:
    """Somebody who connects or listens: a pod, or with an `address` instead of labels something that is no
    pod of ours. `calls` tells of the latter that it also connects by itself."""

    name: str
    namespace: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    ports: tuple[Port, ...] = ()
    address: str = ""
    calls: bool = False

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def pods(objects: Sequence[Object]) -> Iterator[Place]:
    """The pods that workloads make, one for each; not those on the network of their node."""
    for each in objects:
        template = each.get("spec", {}).get("template")
        if template is None or template["spec"].get("hostNetwork"):
            continue
        ports = tuple(
            Port(port["containerPort"], port.get("protocol", "TCP"), port.get("name", ""))
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
        )
        labels = tuple(sorted(template["metadata"]["labels"].items()))
        yield Place(each["metadata"]["name"], each["metadata"]["namespace"], labels, ports)


@dataclass(frozen=True, order=True)
class Arrow:
    """A connection that is allowed."""

    sender: str
    receiver: str
    port: str


def arrows(objects: Sequence[Object], beyond: Sequence[Place]) -> list[Arrow]:
    """Every connection that the policies among `objects` allow: of the pods there with each other and with
    those `beyond`."""
    policies, ours = Policies(objects), list(pods(objects))
    callers = [place for place in beyond if place.calls]
    pairs = [*product(ours, [*ours, *beyond]), *product(callers, ours)]
    return sorted(
        Arrow(str(sender), str(receiver), str(port))
        for sender, receiver in pairs
        for port in receiver.ports
        if policies.allow(sender, receiver, port)
    )


class Policies:
    """The NetworkPolicies among `objects`, and the labels of the namespaces there."""

    def __init__(self, objects: Sequence[Object]) -> None:
        self._policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
        self._namespaces: dict[str, Mapping[str, str]] = {
            each["metadata"]["name"]: each["metadata"].get("labels", {})
            for each in objects
            if each["kind"] == "Namespace"
        }

    def allow(self, sender: Place, receiver: Place, port: Port) -> bool:
        """Whether `sender` may connect to `port` of `receiver`."""
        return self._side("Egress", sender, receiver, port) and self._side("Ingress", receiver, sender, port)

    def _side(self, direction: Direction, own: Place, other: Place, port: Port) -> bool:
        if own.address:
            return True
        selecting = [
            policy["spec"]
            for policy in self._policies
            if policy["metadata"]["namespace"] == own.namespace
            and direction in _types(policy["spec"])
            and _matches(policy["spec"]["podSelector"], own.labels)
        ]
        where = "from" if direction == "Ingress" else "to"
        listener = own if direction == "Ingress" else other
        return not selecting or any(
            self._peer(rule.get(where, ()), own, other) and _port(rule.get("ports", ()), listener, port)
            for spec in selecting
            for rule in spec.get(direction.lower(), ())
        )

    def _peer(self, peers: Sequence[Object], own: Place, other: Place) -> bool:
        return not peers or any(self._is(peer, own, other) for peer in peers)

    def _is(self, peer: Object, own: Place, other: Place) -> bool:
        if "ipBlock" in peer:
            return bool(other.address) and _within(peer["ipBlock"], other.address)
        if other.address:
            return False
        if "namespaceSelector" in peer:
            labels = {
                **self._namespaces.get(other.namespace, {}),
                "kubernetes.io/metadata.name": other.namespace,
            }
            if not _matches(peer["namespaceSelector"], tuple(labels.items())):
                return False
        elif other.namespace != own.namespace:
            return False
        return _matches(peer.get("podSelector", {}), other.labels)


def _types(spec: Object) -> Sequence[str]:
    default = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
    found: Sequence[str] = spec.get("policyTypes") or default
    return found


def _port(ports: Sequence[Object], listener: Place, wanted: Port) -> bool:
    def one(port: Object) -> bool:
        if port.get("protocol", "TCP") != wanted.protocol:
            return False
        number = port.get("port")
        if isinstance(number, str):
            return Port(wanted.number, wanted.protocol, number) in listener.ports
        return number is None or number <= wanted.number <= port.get("endPort", number)

    return not ports or any(one(port) for port in ports)


def _within(block: Object, address: str) -> bool:
    here = ipaddress.ip_address(address)
    return here in ipaddress.ip_network(block["cidr"]) and not any(
        here in ipaddress.ip_network(cut) for cut in block.get("except", ())
    )


def _matches(selector: Object, labels: tuple[tuple[str, str], ...]) -> bool:
    has = dict(labels)
    if any(has.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        key, values = expression["key"], expression.get("values", ())
        match expression["operator"]:
            case "In":
                found = has.get(key) in values
            case "NotIn":
                found = has.get(key) not in values
            case "Exists":
                found = key in has
            case "DoesNotExist":
                found = key not in has
            case operator:
                raise ValueError(f"there is no operator {operator!r} in a label selector")
        if not found:
            return False
    return True
