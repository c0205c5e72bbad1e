"""``ztmtls doctor``: what is in the way of this workload, from its socket to its peers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from ztmtls.authz import Policy, PolicyDocument, PolicyError
from ztmtls.ids import SpiffeId
from ztmtls.reasons import Reason

from .agent_checks import agent_checks
from .checks import Check, Deadline, Overdue, Status, fail, ok, skip
from .connect_checks import address, connect_checks
from .decision import Request, mismatches
from .endpoint_checks import endpoint_checks
from .output import Exit, Style, UsageError, command, write, write_json
from .policy_check import add_app_options, compare, fault_line
from .policy_explain import workload_id
from .routes import load_app, routes_of
from .show import add_endpoint, seconds

EXAMPLES = """\
  ztmtls doctor
  ztmtls doctor --expect spiffe://zt.example/ns/zt-demo/sa/orders
  ztmtls doctor --connect payments:8443 --peer spiffe://zt.example/ns/zt-demo/sa/payments
  ztmtls doctor --policy policy.yaml --app orders.app:router
  ztmtls doctor --policy policy.yaml --peer spiffe://zt.example/ns/zt-demo/sa/frontend \\
      --method GET --path /orders
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "doctor",
        "find what is in the way of this workload's identity",
        "Go the way that a service goes, from the address of the Workload API to its SVID, and say at each "
        "step what was found and what to do. Run it as the service runs: same user, same container. Warnings "
        "don't change the exit status. Key material is never printed.",
        EXAMPLES,
    )
    add_endpoint(parser)
    parser.add_argument("--expect", metavar="ID", help="the SPIFFE ID that we should have")
    parser.add_argument("--policy", metavar="FILE", help="also check this policy file")
    add_app_options(parser)
    parser.add_argument(
        "--peer", metavar="ID", help="caller that --method and --path ask about; or server behind --connect"
    )
    parser.add_argument(
        "--method", metavar="M", help="with --policy, --peer and --path: what would it be told"
    )
    parser.add_argument("--path", metavar="P", help="see --method")
    parser.add_argument("--connect", metavar="HOST:PORT", help="also try a handshake with the server --peer")
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=10.0, help="seconds for all of it (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Exit:
    """Check everything asked for, and report as it goes."""
    checks: list[Check] = []
    style = Style(sys.stdout)
    for check in _checks(arguments, *_asked(arguments)):
        checks.append(check)
        if not arguments.json:
            _report(check, style)
    failed = sum(check.status is Status.FAIL for check in checks)
    if arguments.json:
        write_json({"ok": not failed, "checks": [check.as_dict() for check in checks]})
    else:
        write(style.bad(f"{failed} failed") if failed else style.good("nothing is in the way"))
    return Exit.FINDINGS if failed else Exit.OK


_Asked = tuple[SpiffeId | None, Request | None, tuple[tuple[str, int], SpiffeId] | None]


def _asked(arguments: argparse.Namespace) -> _Asked:
    """The expected ID, the request to explain, the server to connect to. Raises `UsageError`."""
    expected = workload_id(arguments.expect, "--expect") if arguments.expect else None
    peer = workload_id(arguments.peer, "--peer") if arguments.peer else None
    request = server = None
    if arguments.app and not arguments.policy:
        raise UsageError("--app: name the policy to compare it with, by --policy")
    if arguments.method or arguments.path:
        if not (arguments.policy and peer and arguments.method and arguments.path):
            raise UsageError("--method and --path: give both, with --policy and --peer")
        if arguments.connect:
            raise UsageError(
                "--peer is the caller for --method, and the server for --connect: ask them apart"
            )
        request = Request.sent(peer, arguments.method, arguments.path)
    if arguments.connect:
        if peer is None:
            raise UsageError("--connect: name the SPIFFE ID that the server must prove, by --peer")
        server = address(arguments.connect), peer
    elif peer and not request:
        raise UsageError("--peer: give --method and --path too, or --connect")
    return expected, request, server


def _checks(
    arguments: argparse.Namespace,
    expected: SpiffeId | None,
    request: Request | None,
    server: tuple[tuple[str, int], SpiffeId] | None,
) -> Iterator[Check]:
    deadline = Deadline(arguments.timeout)
    target = yield from endpoint_checks(arguments.endpoint, deadline)
    context = None
    if target is not None:
        context = yield from agent_checks(arguments.endpoint, target, expected, deadline)
    if arguments.policy:
        yield from _policy_checks(arguments, request, deadline)
    if server is not None:
        if context is None:
            yield skip("connect", "a handshake needs an identity of our own")
        else:
            yield from connect_checks(context, *server, deadline)


def _policy_checks(
    arguments: argparse.Namespace, request: Request | None, deadline: Deadline
) -> Iterator[Check]:
    path = arguments.policy
    try:
        document = PolicyDocument.read(path)
        policy = document.policy()
    except PolicyError as error:
        for fault in error.faults:
            yield fail("policy", fault_line(path, fault), "mend the file", Reason.INVALID_POLICY)
        return
    yield ok("policy", f"{path} is valid")
    if arguments.app:
        yield from _app_checks(arguments, policy, document, deadline)
    if request is not None:
        yield _told(policy, request)


def _app_checks(
    arguments: argparse.Namespace, policy: Policy, document: PolicyDocument, deadline: Deadline
) -> Iterator[Check]:
    try:
        with deadline.interrupting():
            routes = routes_of(load_app(arguments.app, factory=arguments.factory))
    except UsageError as error:
        yield fail("app", str(error), "name it as the server that runs it does")
        return
    except Overdue:
        advice = "what it does at import (a connection, a wait) belongs to its start: or give --timeout more"
        yield fail("app", f"--app: {arguments.app} was not made within the deadline", advice)
        return
    fit = compare(policy, document, routes)
    for finding in fit.findings:
        where = f"{arguments.policy}:{finding.line}: " if finding.line else ""
        yield fail(
            "app", f"{where}{finding.text}", "`ztmtls policy check` lists every route with its callers"
        )
    if not fit.findings:
        yield ok("app", f"{arguments.app}: every rule matches a route, and every route has a caller")


def _told(policy: Policy, request: Request) -> Check:
    decision = request.decided_by(policy)
    asked = f"{request.peer} asks {request.method} {request.path}"
    if decision.allowed:
        return ok("request", f"{asked}: allowed by rule {decision.rule}")
    advice = "`ztmtls policy explain` tells of each rule why it does not match"
    if decision.reason is not Reason.AMBIGUOUS_PATH:
        nearest = mismatches(policy, request)[0]
        advice = f"the nearest rule is {nearest.rule.name}: {'; '.join(nearest.why)}. {advice}"
    return fail("request", f"{asked}: denied, {decision.reason}: {decision.detail}", advice, decision.reason)


def _report(check: Check, style: Style) -> None:
    paint = {Status.OK: style.good, Status.WARN: style.doubtful, Status.FAIL: style.bad}.get(
        check.status, str
    )
    reason = f" [{check.reason}]" if check.reason else ""
    write(f"{paint(f'{check.status:<4}')}  {check.name:<8}  {check.text}{reason}")
    if check.advice:
        write(f"{'':16}to do: {check.advice}")
