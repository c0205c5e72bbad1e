"""What a caller would be told, by the function that `guard.Guard` asks, and why each rule does not match."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from ztmtls.authz import METHODS, Decision, Policy, Rule, decide_request, template_segments
from ztmtls.ids import SpiffeId
from ztmtls.reasons import printable

from .output import UsageError, shown


@dataclass(frozen=True, slots=True)
class Request:
    """One request as a policy sees it. `path` is decoded, `raw_path` as it stands in the request line."""

    peer: SpiffeId
    method: str
    path: str
    raw_path: bytes

    @classmethod
    def sent(cls, peer: SpiffeId, method: str, target: str) -> Request:
        """The request of a client that asks for `target`, percent-encoded or not."""
        if "#" in target:
            raise UsageError("--path: a fragment ('#…') never reaches a server: leave it out")
        raw = quote(target, safe="".join(map(chr, range(33, 127))))
        # As HTTP servers do it: the query goes, and the rest is decoded.
        path = unquote(raw.partition("?")[0])
        return cls(peer, method, path, raw.encode("ascii"))

    def decided_by(self, policy: Policy) -> Decision:
        """What a server with this policy decides, once the caller's certificate is verified."""
        return decide_request(policy, self.peer, self.method, self.path, self.raw_path)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why one rule does not allow a request. `distance` orders rules, the nearest first."""

    rule: Rule
    why: tuple[str, ...]
    distance: tuple[int, int]

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {"rule": self.rule.name, "why": list(self.why)}


def mismatches(policy: Policy, request: Request) -> list[Mismatch]:
    """Why each rule does not allow `request`, the nearest rule first."""
    return sorted((_mismatch(rule, request) for rule in policy.rules), key=lambda found: found.distance)


def _mismatch(rule: Rule, request: Request) -> Mismatch:
    why = []
    if request.peer not in rule.callers:
        why.append(f"caller: it names {', '.join(map(str, sorted(rule.callers)))}")
    if request.method not in rule.methods:
        hint = ""
        if request.method not in METHODS and request.method.upper() in METHODS:
            hint = f" (methods are in upper case: {request.method.upper()})"
        why.append(
            f"method: it allows {', '.join(sorted(rule.methods))}, not {printable(request.method, 16)}{hint}"
        )
    paths = [(template, *_path_mismatch(rule, template, request)) for template in rule.paths]
    nearest = min(distance for _, distance, _ in paths)
    failed = len(why) + (nearest > 0)
    if nearest:
        paths.sort(key=lambda path: path[1])
        why += [f"path: {template}: {sentence}" for template, _, sentence in paths]
    return Mismatch(rule, tuple(why), (failed, nearest))


def _path_mismatch(rule: Rule, template: str, request: Request) -> tuple[int, str]:
    """How far the path is from `template`, 0 for a match, and what is different."""
    # Whether it matches is asked of the policy itself, as if nothing else could fail.
    alone = replace(
        rule, callers=frozenset({request.peer}), methods=frozenset({request.method}), paths=(template,)
    )
    if Policy([alone]).decide(request.peer, request.method, request.path).allowed:
        return 0, ""
    wanted, got = template_segments(template), request.path[1:].split("/")
    if len(wanted) != len(got):
        return 100 * abs(len(wanted) - len(got)), f"it has {_segments(len(wanted))}, the path {len(got)}"
    different = [
        f"segment {number} is '{shown(found, 64)}', not '{want}'" if want else f"segment {number} is empty"
        for number, (want, found) in enumerate(zip(wanted, got, strict=True), 1)
        if (found != want if want is not None else not found)
    ]
    return len(different), ", ".join(different)


def _segments(count: int) -> str:
    return f"{count} segment{'' if count == 1 else 's'}"
