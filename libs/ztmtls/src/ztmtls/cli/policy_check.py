"""``ztmtls policy check``: faults of a policy file, and how it fits the routes of an application."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ztmtls.authz import METHODS, Fault, Policy, PolicyDocument, PolicyError, Rule

from .coverage import Cover, cover, ends_in_slash
from .output import Exit, Style, command, shown, table, write, write_json
from .routes import AppRoute, load_app, routes_of

EXAMPLES = """\
  ztmtls policy check policy.yaml
  ztmtls policy check policy.yaml --app orders.app:router
  ztmtls policy check policy.yaml --app orders.app:create_app --factory --json
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "check",
        "name every fault of a policy file; list an application's routes with who may call them",
        "Name every fault of a policy file with its line. With --app, list each route of the application "
        "with who may call it, and find rules that match no route and routes that nobody may call.",
        EXAMPLES,
    )
    parser.add_argument("policy", metavar="POLICY", help="the policy file")
    add_app_options(parser)
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def add_app_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an application."""
    parser.add_argument(
        "--app",
        metavar="MODULE:ATTR",
        help="an ASGI application or router (Starlette, FastAPI) to compare with",
    )
    parser.add_argument(
        "--factory", action="store_true", help="--app names a function without arguments that makes it"
    )


@dataclass(frozen=True, slots=True)
class Grant:
    """What one rule allows on one route."""

    rule: Rule
    paths: tuple[str, ...]
    cover: Cover
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Access:
    """One method of one route, and what the policy's rules allow on it. `method` is ANY for all of HTTP."""

    route: AppRoute
    method: str
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to mend. `line` is that of the policy file."""

    kind: str
    text: str
    line: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {"kind": self.kind, "line": self.line, "text": self.text}


@dataclass(frozen=True, slots=True)
class Fit:
    """How a policy fits an application."""

    accesses: tuple[Access, ...]
    findings: tuple[Finding, ...]


def compare(policy: Policy, document: PolicyDocument, routes: Iterable[AppRoute]) -> Fit:
    """Who may call each of `routes`, the rules that match none, and the routes that nobody may call."""
    accesses = tuple(
        Access(route, method, _grants(policy, route, method))
        for route in routes
        for method in route.methods or ("ANY",)
    )
    return Fit(accesses, (*_useless(policy, document, accesses), *_unreachable(accesses)))


def _grants(policy: Policy, route: AppRoute, method: str) -> tuple[Grant, ...]:
    # "ANY" is a route that takes whatever HTTP method comes; a mounted application also takes WebSockets.
    taken = METHODS if route.opaque else METHODS - {"WEBSOCKET"} if method == "ANY" else {method}
    grants = []
    for rule in policy.rules:
        covers = {path: cover(path, route.path) for path in rule.paths}
        paths = tuple(path for path, found in covers.items() if found is not Cover.NONE)
        methods = tuple(sorted(taken & rule.methods))
        if paths and methods:
            whole = any(found is Cover.ALL for found in covers.values())
            grants.append(Grant(rule, paths, Cover.ALL if whole else Cover.PARTLY, methods))
    return tuple(grants)


def _useless(policy: Policy, document: PolicyDocument, accesses: tuple[Access, ...]) -> list[Finding]:
    used = {
        (grant.rule.name, path, method)
        for access in accesses
        for grant in access.grants
        for path in grant.paths
        for method in grant.methods
    }
    known = {path for rule in policy.rules for path in rule.paths if _some_route(path, accesses)}
    findings = []
    for i, rule in enumerate(policy.rules):
        for j, path in enumerate(rule.paths):
            line = document.line(("rules", i, "paths", j))
            if path not in known:
                text = f"rule '{rule.name}': no route of the application takes {path}"
                findings.append(Finding("rule_matches_nothing", text, line))
                continue
            idle = sorted(m for m in rule.methods if (rule.name, path, m) not in used)
            if idle:
                text = f"rule '{rule.name}': no route of the application takes {' or '.join(idle)} on {path}"
                findings.append(Finding("rule_matches_nothing", text, line))
    return findings


def _some_route(path: str, accesses: tuple[Access, ...]) -> bool:
    return any(cover(path, access.route.path) is not Cover.NONE for access in accesses)


def _unreachable(accesses: tuple[Access, ...]) -> list[Finding]:
    findings = []
    for access in accesses:
        route = access.route
        if access.grants:
            continue
        # Frameworks add HEAD to each GET; that nobody may use it is no surprise to report each time.
        if access.method == "HEAD" and "GET" in route.methods:
            continue
        why = ""
        if ends_in_slash(route.path):
            why = ": a policy can't name a path that holds an empty segment or ends in '/'"
        elif access.method not in (*METHODS, "ANY"):
            why = f": a policy can't name the method {shown(access.method)}"
        findings.append(
            Finding("nobody_may_call", f"nobody may call {access.method} {shown(route.path)}{why}")
        )
    return findings


def run(arguments: argparse.Namespace) -> Exit:
    """Check the file, then the fit."""
    try:
        document = PolicyDocument.read(arguments.policy)
        policy = document.policy()
    except PolicyError as error:
        return report_faults(arguments.policy, error.faults, as_json=arguments.json)
    fit = None
    if arguments.app:
        fit = compare(policy, document, routes_of(load_app(arguments.app, factory=arguments.factory)))
    if arguments.json:
        write_json(_as_dict(arguments.policy, policy, fit))
    else:
        _report(arguments.policy, policy, fit)
    return Exit.FINDINGS if fit and fit.findings else Exit.OK


def report_faults(path: str, faults: tuple[Fault, ...], *, as_json: bool) -> Exit:
    """Print every fault of a policy file."""
    if as_json:
        found = [{"line": f.line, "place": list(f.place), "text": str(f)} for f in faults]
        write_json({"policy": path, "valid": False, "faults": found})
    else:
        for fault in faults:
            write(fault_line(path, fault))
    return Exit.FINDINGS


def fault_line(path: str, fault: Fault) -> str:
    """One fault as compilers write it, ``file:line: sentence``."""
    sentence = str(fault).removeprefix(f"{path} ")
    return f"{path}:{'' if fault.line is None else f'{fault.line}:'} {shown(sentence)}"


def _report(path: str, policy: Policy, fit: Fit | None) -> None:
    style = Style(sys.stdout)
    callers = {caller for rule in policy.rules for caller in rule.callers}
    write(f"{path}: valid, {_count(len(policy.rules), 'rule')}, {_count(len(callers), 'caller')}")
    if fit is None:
        return
    write("")
    for line in table(row for access in fit.accesses for row in _rows(access)):
        write(line)
    write("")
    for finding in fit.findings:
        where = f"{path}:{finding.line}" if finding.line else path
        write(f"{style.bad('finding')}: {where}: {finding.text}")
    if not fit.findings:
        write(style.good("every rule matches a route, and every route has a caller"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rows(access: Access) -> list[list[str]]:
    route = access.route
    path = shown(route.path) + (f" ({route.opaque})" if route.opaque else "")
    if not access.grants:
        return [[access.method, path, "nobody", ""]]
    rows = []
    for grant in access.grants:
        notes = [f"rule {grant.rule.name}"]
        if access.method == "ANY":
            notes.append(f"only {', '.join(grant.methods)}")
        if grant.cover is Cover.PARTLY:
            notes.append(f"partly: {', '.join(grant.paths)}")
        rows += [
            [access.method, path, str(caller), "; ".join(notes)] for caller in sorted(grant.rule.callers)
        ]
    return rows


def _as_dict(path: str, policy: Policy, fit: Fit | None) -> dict[str, Any]:
    document: dict[str, Any] = {"policy": path, "valid": True, "rules": len(policy.rules)}
    if fit is not None:
        document["routes"] = [
            {
                "method": access.method,
                "path": access.route.path,
                "opaque": access.route.opaque or None,
                "allowed": [
                    {
                        "rule": grant.rule.name,
                        "callers": sorted(map(str, grant.rule.callers)),
                        "methods": list(grant.methods),
                        "paths": list(grant.paths),
                        "cover": str(grant.cover),
                    }
                    for grant in access.grants
                ],
            }
            for access in fit.accesses
        ]
        document["findings"] = [finding.as_dict() for finding in fit.findings]
    return document
