"""Who may do what: authorizers on SPIFFE IDs, and the deny-by-default policy of a service.

An authorizer answers for a connection: may this verified identity be my peer at all? A `Policy` answers
for a request: may this verified caller use this method on this path? Both work on identities that
`verify.verify_peer` has proven, never on headers, host names or addresses.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import yaml

from .audit import AuditLog
from .ids import InvalidSpiffeId, SpiffeId, TrustDomain
from .reasons import Reason, Refusal, printable

logger = logging.getLogger(__name__)


class NotAuthorized(Refusal):
    """A verified peer is not allowed here."""


class Authorizer(Protocol):
    """Returns when `peer` is acceptable; raises `NotAuthorized` when it is not."""

    def __call__(self, peer: SpiffeId, /) -> None: ...


@dataclass(frozen=True, slots=True)
class _Named:
    """An authorizer with a readable description, used in refusals and reprs."""

    description: str
    accepts: Any

    def __call__(self, peer: SpiffeId, /) -> None:
        if not self.accepts(peer):
            raise NotAuthorized(Reason.CALLER_NOT_ALLOWED, f"{peer} is not {self.description}")

    def __repr__(self) -> str:
        return f"<authorizer: {self.description}>"


def _id(value: SpiffeId | str) -> SpiffeId:
    return value if isinstance(value, SpiffeId) else SpiffeId.parse(value)


def exact(peer: SpiffeId | str) -> Authorizer:
    """Accept exactly this SPIFFE ID."""
    wanted = _id(peer)
    return _Named(str(wanted), lambda peer: peer == wanted)


def one_of(*peers: SpiffeId | str) -> Authorizer:
    """Accept any of these SPIFFE IDs; none at all accepts nobody."""
    wanted = frozenset(map(_id, peers))
    return _Named("one of " + (", ".join(sorted(map(str, wanted))) or "nobody"), wanted.__contains__)


def trust_domain(name: TrustDomain | str) -> Authorizer:
    """Accept every workload of this trust domain."""
    wanted = name if isinstance(name, TrustDomain) else TrustDomain.parse(name)
    return _Named(f"in trust domain {wanted}", lambda peer: peer.trust_domain == wanted)


def path_prefix(prefix: SpiffeId | str) -> Authorizer:
    """Accept this ID and those below it, on segment boundaries: ``/a`` covers ``/a/b``, not ``/ab``.

    A prefix with no path accepts nobody: use `trust_domain` to say that.
    """
    wanted = _id(prefix)
    below = wanted.path + "/"
    return _Named(
        f"{wanted} or below it",
        lambda peer: (
            not wanted.is_root
            and peer.trust_domain == wanted.trust_domain
            and (peer.path == wanted.path or peer.path.startswith(below))
        ),
    )


def any_of(*authorizers: Authorizer) -> Authorizer:
    """Accept what at least one of `authorizers` accepts; none at all accepts nobody."""
    return _Named(
        "any of " + ", ".join(map(repr, authorizers)), lambda peer: any(_ok(a, peer) for a in authorizers)
    )


def all_of(*authorizers: Authorizer) -> Authorizer:
    """Accept what every one of `authorizers` accepts; none at all accepts nobody."""
    return _Named(
        "all of " + ", ".join(map(repr, authorizers)),
        lambda peer: bool(authorizers) and all(_ok(a, peer) for a in authorizers),
    )


def _ok(authorizer: Authorizer, peer: SpiffeId) -> bool:
    try:
        authorizer(peer)
    except NotAuthorized:
        return False
    return True


# --- policy -------------------------------------------------------------------------------------------

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET"})
# A policy is read on the event loop of a service that goes on serving, and its index is held in memory.
MAX_POLICY_BYTES = 256 << 10
MAX_POLICY_ENTRIES = 100_000
"""Callers times methods times paths, summed over the rules. YAML's aliases make many of few bytes."""
_FAULTS_SHOWN = 20
_PLACEHOLDER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\}")
_LITERAL = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@-]+")


Place = tuple[str | int, ...]
"""Where in a policy document something stands: ``("rules", 0, "paths", 1)``."""


class Fault(str):
    """One sentence on what is wrong with a policy, its `place` in the document, and `line` in the file.

    `line` counts from 1; it is None when the policy came from no file.
    """

    __slots__ = ("line", "place")

    place: Place
    line: int | None

    def __new__(cls, sentence: str, place: Place = (), line: int | None = None) -> Fault:
        """A sentence with its place."""
        fault = super().__new__(cls, sentence)
        fault.place = place
        fault.line = line
        return fault


class PolicyError(Refusal, ValueError):
    """A policy can't be read. `faults` holds one sentence for each thing that is wrong."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        shown = [f if f.line is None else f"line {f.line}: {f}" for f in self.faults[:_FAULTS_SHOWN]]
        if (more := len(self.faults) - _FAULTS_SHOWN) > 0:
            shown.append(f"and {more} more")
        super().__init__(Reason.INVALID_POLICY, "; ".join(shown))


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says of one request. `rule` names the rule that allowed it, `reason` why not."""

    rule: str | None
    reason: Reason | None = None
    detail: str = ""

    @property
    def allowed(self) -> bool:
        """True when a rule allowed it."""
        return self.rule is not None


@dataclass(frozen=True, slots=True)
class Rule:
    """`callers` may use `methods` on `paths` (templates such as ``/orders/{order_id}``)."""

    name: str
    callers: frozenset[SpiffeId]
    methods: frozenset[str]
    paths: tuple[str, ...]


class Policy:
    """Which verified caller may use which method on which path. What no rule allows is denied."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        # caller -> method -> number of segments -> shape -> literals -> the first such rule. A shape is which
        # segments of a template are placeholders: of each shape a path can match one template only.
        self._index: dict[SpiffeId, dict[str, dict[int, dict[_Shape, dict[_Literals, _Rule]]]]] = {}
        for order, rule in enumerate(self.rules):
            templates = [_split(template_segments(path)) for path in rule.paths]
            for caller in rule.callers:
                for method in rule.methods:
                    by_length = self._index.setdefault(caller, {}).setdefault(method, {})
                    for shape, literals in templates:
                        of_shape = by_length.setdefault(len(shape), {}).setdefault(shape, {})
                        of_shape.setdefault(literals, (order, rule.name))

    @classmethod
    def parse(cls, document: object) -> Policy:
        """Build a policy from a parsed ``policy.yaml``. Raises `PolicyError` naming every fault.

        Shape: ``{version: 1, rules: [{name, callers: [SPIFFE ID], methods: [GET…], paths: [template]}]}``.
        """
        return cls(_parse_rules(document))

    def names(self, caller: SpiffeId) -> bool:
        """True when some rule names `caller`."""
        return caller in self._index

    def decide(self, caller: SpiffeId, method: str, path: str) -> Decision:
        """Decide on one request. `path` is the decoded path without the query.

        Deterministic, without I/O: the first rule that allows it. It costs time in the number of shapes
        (which segments are placeholders) that templates of this caller, method and length have, not in the
        number of rules.
        """
        by_method = self._index.get(caller)
        if by_method is None:
            return Decision(None, Reason.CALLER_NOT_ALLOWED, f"no rule names {caller}")
        if path.startswith("/"):
            segments = path[1:].split("/")
            shapes = by_method.get(method, {}).get(len(segments), {})
            found: list[_Rule] = []
            for shape, rules in shapes.items():
                literals = _literals(shape, segments)
                if literals is not None and (rule := rules.get(literals)):
                    found.append(rule)
            if found:
                return Decision(min(found)[1])
        return Decision(
            None,
            Reason.ROUTE_NOT_ALLOWED,
            f"no rule lets {caller} use {printable(method, 16)} {printable(path, 128)}",
        )


def template_segments(path: str) -> tuple[str | None, ...]:
    """The segments of a path template, None for each placeholder."""
    return tuple(None if _PLACEHOLDER.fullmatch(segment) else segment for segment in path[1:].split("/"))


_Shape = tuple[bool, ...]
"""For each segment, whether it is a placeholder."""
_Literals = tuple[str, ...]
_Rule = tuple[int, str]
"""Where a rule stands in the policy, and its name."""


def _split(template: tuple[str | None, ...]) -> tuple[_Shape, _Literals]:
    return tuple(each is None for each in template), tuple(each for each in template if each is not None)


def _literals(shape: _Shape, segments: Sequence[str]) -> _Literals | None:
    """The segments where `shape` has literals; None when it has a placeholder where nothing is: a placeholder
    takes exactly one segment with something in it."""
    literals = []
    for is_placeholder, segment in zip(shape, segments, strict=True):
        if not is_placeholder:
            literals.append(segment)
        elif not segment:
            return None
    return tuple(literals)


def is_ambiguous(path: str, raw_path: bytes) -> bool:
    """True for a request path that two programs could read differently.

    An encoded slash, backslash, dot segment or NUL, an empty segment, a dot segment, a fragment, bytes that
    are not UTF-8, or what decoding a second time would change: a proxy, the policy and the router might each
    see another route, so such a request is refused before the policy is asked.
    """
    raw = raw_path.partition(b"?")[0].lower()
    try:
        unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        return True
    if any(code in raw for code in (b"%2f", b"%5c", b"%2e", b"%00", b"%25", b"\\", b";", b"#")):
        return True
    # A percent sign that decoding left over may be the half of an escape: "%%32f" becomes "%2f".
    if not path.startswith("/") or not path.isprintable() or "%" in path:
        return True
    segments = path[1:].split("/")
    return any(s in (".", "..") for s in segments) or "" in segments[:-1] or "\\" in path


def _parse_rules(document: object) -> list[Rule]:
    if not isinstance(document, Mapping):
        raise PolicyError([Fault("the policy must be a mapping with 'version' and 'rules'")])
    faults = [
        Fault(f"unknown key '{printable(str(k))}'", (k,)) for k in document if k not in ("version", "rules")
    ]
    if document.get("version") != 1 or isinstance(document["version"], bool):
        faults.append(Fault("'version' must be 1", ("version",)))
    entries = document.get("rules")
    if not isinstance(entries, list) or not entries:
        raise PolicyError([*faults, Fault("'rules' must be a list with at least one rule", ("rules",))])
    if sum(map(_entries, entries)) > MAX_POLICY_ENTRIES:
        too_many = f"callers x methods x paths make more than {MAX_POLICY_ENTRIES} entries"
        raise PolicyError([*faults, Fault(too_many, ("rules",))])
    rules: dict[str, Rule] = {}
    repeated: dict[str, Fault] = {}
    for index, entry in enumerate(entries):
        if rule := _parse_rule(index, entry, faults):
            if rule.name in rules:
                place = ("rules", index, "name")
                repeated.setdefault(rule.name, Fault(f"rule name '{rule.name}' is used twice", place))
            rules[rule.name] = rule
    faults += sorted(repeated.values())
    if faults:
        raise PolicyError(faults)
    return list(rules.values())


def _entries(entry: object) -> int:
    lists = [entry.get(key) for key in ("callers", "methods", "paths")] if isinstance(entry, Mapping) else []
    return math.prod(max(1, len(each)) for each in lists if isinstance(each, list))


def _parse_rule(index: int, entry: object, faults: list[Fault]) -> Rule | None:
    where: Place = ("rules", index)
    before = len(faults)

    def fault(sentence: str, *place: str | int, colon: str = ":") -> None:
        faults.append(Fault(f"rules[{index}]{colon} {sentence}", (*where, *place)))

    if not isinstance(entry, Mapping):
        fault("must be a mapping", colon="")
        return None
    for key in entry:
        if key not in ("name", "callers", "methods", "paths"):
            fault(f"unknown key '{printable(str(key))}'", key)
    name = entry.get("name")
    if not isinstance(name, str) or not name or not name.isprintable():
        fault("'name' must be a non-empty string", "name")
    listed: dict[str, list[str]] = {}
    for key in ("callers", "methods", "paths"):
        value = entry.get(key)
        good = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
        if not good:
            fault(f"'{key}' must be a non-empty list of strings", key)
        listed[key] = value if good else []  # type: ignore[assignment]
    callers = []
    for i, text in enumerate(listed["callers"]):
        try:
            caller = SpiffeId.parse(text)
        except InvalidSpiffeId as error:
            fault(f"caller {error.detail}", "callers", i)
            continue
        if caller.is_root:
            fault(f"caller '{caller}' names a trust domain, not a workload", "callers", i)
        callers.append(caller)
    for i, method in enumerate(listed["methods"]):
        if method not in METHODS:
            fault(f"unknown method '{printable(method)}'", "methods", i)
    for i, path in enumerate(listed["paths"]):
        if why := _path_fault(path):
            fault(f"path '{printable(path)}' {why}", "paths", i)
    if len(faults) > before:
        return None
    return Rule(str(name), frozenset(callers), frozenset(listed["methods"]), tuple(listed["paths"]))


def _path_fault(path: str) -> str | None:
    if not path.startswith("/"):
        return "must begin with '/'"
    if path == "/":
        return None
    for segment in path[1:].split("/"):
        if segment in ("", ".", ".."):
            return f"holds the segment '{segment}'"
        if not (_PLACEHOLDER.fullmatch(segment) or _LITERAL.fullmatch(segment)):
            return f"holds '{printable(segment)}': a segment is a literal or one {{name}}"
    return None


class _StrictLoader(yaml.SafeLoader):
    """YAML without the surprise that a key given twice silently replaces the first."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str) or key in mapping:
            # Nothing but a string is shown: a list of lists of aliases would take for ever to print.
            shown = f"key '{printable(key)}' is given twice" if isinstance(key, str) else "a key is no string"
            raise yaml.constructor.ConstructorError(None, None, shown, key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    """A ``policy.yaml`` as it was read: `content` for `Policy.parse`, and where each part of it stands."""

    content: object
    _root: yaml.Node | None

    @classmethod
    def read(cls, path: Path | str) -> PolicyDocument:
        """Read a file. Raises `PolicyError` when it can't be read or is not YAML."""
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_POLICY_BYTES + 1)
            text = content.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError([Fault(f"{path} can't be read: {error}")]) from error
        if len(content) > MAX_POLICY_BYTES:
            raise PolicyError([Fault(f"{path} is longer than {MAX_POLICY_BYTES} bytes")])
        try:
            loader = _StrictLoader(text)
            root = loader.get_single_node()
            return cls(None if root is None else loader.construct_document(root), root)
        except Exception as error:
            # Not YAMLError alone: the constructors of dates and numbers let ValueError, KeyError and
            # AttributeError through, and deep nesting ends in RecursionError.
            mark = getattr(error, "problem_mark", None)
            sentence = f"{path} is not YAML: {' '.join(str(error).split())}"
            raise PolicyError([Fault(sentence, (), mark.line + 1 if mark else None)]) from error

    def line(self, place: Place) -> int | None:
        """The line of `place`, from 1; that of the nearest part around it when it is missing there."""
        node = self._root
        if node is None:
            return None
        line = node.start_mark.line
        for step in place:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == step), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                found = (node.value[step], node.value[step])
            else:
                found = None
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        return int(line) + 1

    def policy(self) -> Policy:
        """The policy it holds. Raises `PolicyError`, each fault with its line."""
        try:
            return Policy.parse(self.content)
        except PolicyError as error:
            raise PolicyError([Fault(f, f.place, self.line(f.place)) for f in error.faults]) from None


def load_policy(path: Path | str) -> Policy:
    """Read and check a ``policy.yaml``. Raises `PolicyError` for anything that is wrong with it."""
    return PolicyDocument.read(path).policy()


class PolicyFile:
    """A policy file that may change while it is in use.

    Reading it for the first time raises `PolicyError` when it is wrong: a service does not start on a
    broken policy. Later a broken or vanished file never replaces the good one and never opens anything:
    `current` stays what it was, `last_error` says why, and a line is written to the log and to `audit` (event
    `policy`). `version` counts the policies that were in force, from 1.

    `server.serve` calls `reload_if_changed` every second; elsewhere the program does.
    """

    def __init__(self, path: Path | str, audit: AuditLog | None = None) -> None:
        self.path = Path(path)
        self._audit = audit
        self.last_error: PolicyError | None = None
        self.version = 1
        self._seen = self._stamp()
        self._current = load_policy(self.path)

    @property
    def current(self) -> Policy:
        """The policy in force."""
        return self._current

    def reload_if_changed(self) -> bool:
        """Look at the file again; return True when a new policy came into force. Never raises."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._current = load_policy(self.path)
        except PolicyError as error:
            self.last_error = error
            logger.error("policy not reloaded, the last good one stays in force: %s", error.detail)
            if self._audit is not None:
                self._audit.record("policy", "deny", reason=error.reason, detail=printable(error.detail))
            return False
        self.last_error = None
        self.version += 1
        logger.info("policy reloaded from %s: %d rules", self.path, len(self._current.rules))
        if self._audit is not None:
            self._audit.record("policy", "allow", detail=f"{len(self._current.rules)} rules from {self.path}")
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        # A rename (as Kubernetes does it for a ConfigMap) changes the inode, an edit the time or size.
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def decide_request(
    policy: Policy | PolicyFile, caller: SpiffeId, method: str, path: str, raw_path: bytes
) -> Decision:
    """Decide on a verified `caller`'s request as it came: the path must have one meaning, and a rule for it.

    `path` is the decoded path without the query, `raw_path` the same as it came.
    """
    if is_ambiguous(path, raw_path):
        return Decision(None, Reason.AMBIGUOUS_PATH, "the path could be read in more than one way")
    current = policy.current if isinstance(policy, PolicyFile) else policy
    return current.decide(caller, method, path)


def authorize_request(
    policy: Policy | PolicyFile, caller: SpiffeId, method: str, path: str, raw_path: bytes
) -> str:
    """The name of the rule by which `decide_request` allows this. Raises `NotAuthorized` when it does not."""
    decision = decide_request(policy, caller, method, path, raw_path)
    if decision.rule is None:
        raise NotAuthorized(decision.reason or Reason.ROUTE_NOT_ALLOWED, decision.detail)
    return decision.rule
