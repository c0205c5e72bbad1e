"""``ztmtls policy explain``: what a caller would be told, and why."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ztmtls.authz import Decision, PolicyError, load_policy
from ztmtls.ids import InvalidSpiffeId, SpiffeId
from ztmtls.reasons import Reason

from .decision import Mismatch, Request, mismatches
from .output import Exit, Style, UsageError, command, shown, write, write_json
from .policy_check import report_faults

EXAMPLES = """\
  ztmtls policy explain policy.yaml --peer spiffe://zt.example/ns/zt-demo/sa/frontend \\
      --method GET --path /orders/42
"""

AMBIGUOUS = (
    "it holds one of these: an encoded '/', '\\', '.', '%' or NUL, a ';', an empty or dot segment, bytes "
    "that are not printable text. Such a path is refused before any rule is asked"
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = command(
        commands,
        "explain",
        "what would this caller be told, and by which rule",
        "Say what a caller would be told: allowed and by which rule, or denied, with the reason code and why "
        "each rule did not match, the nearest first. It asks the function that the server asks.",
        EXAMPLES,
    )
    parser.add_argument("policy", metavar="POLICY", help="the policy file")
    parser.add_argument("--peer", metavar="ID", required=True, help="SPIFFE ID of the caller")
    parser.add_argument("--method", metavar="M", required=True, help="HTTP method, or WEBSOCKET")
    parser.add_argument("--path", metavar="P", required=True, help="the path as the client sends it")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def workload_id(text: str, option: str) -> SpiffeId:
    """The SPIFFE ID of a workload. Raises `UsageError` in the name of `option`."""
    try:
        found = SpiffeId.parse(text)
    except InvalidSpiffeId as error:
        raise UsageError(f"{option}: {error.detail}") from None
    if found.is_root:
        raise UsageError(f"{option}: '{found}' names a trust domain, not a workload: add its path")
    return found


def run(arguments: argparse.Namespace) -> Exit:
    """Explain one request."""
    request = Request.sent(workload_id(arguments.peer, "--peer"), arguments.method, arguments.path)
    try:
        policy = load_policy(arguments.policy)
    except PolicyError as error:
        return report_faults(arguments.policy, error.faults, as_json=arguments.json)
    decision = request.decided_by(policy)
    nearest = [] if decision.reason in (None, Reason.AMBIGUOUS_PATH) else mismatches(policy, request)
    if arguments.json:
        write_json(_as_dict(request, decision, nearest))
    else:
        _report(arguments.policy, request, decision, nearest)
    return Exit.OK if decision.allowed else Exit.FINDINGS


def _report(path: str, request: Request, decision: Decision, nearest: list[Mismatch]) -> None:
    style = Style(sys.stdout)
    if decision.allowed:
        write(f"{style.good('allowed')} by rule {decision.rule} of {path}")
        return
    write(f"{style.bad('denied')}: {decision.reason}: {decision.detail}")
    if decision.reason is Reason.AMBIGUOUS_PATH:
        write(f"  {shown(request.raw_path.decode())}: {AMBIGUOUS}")
        return
    write(f"why not, by rule of {path}, the nearest first:")
    for mismatch in nearest:
        write(f"  {mismatch.rule.name}")
        for why in mismatch.why:
            write(f"    {why}")


def _as_dict(request: Request, decision: Decision, nearest: list[Mismatch]) -> dict[str, Any]:
    return {
        "peer": str(request.peer),
        "method": request.method,
        "path": request.path,
        "allowed": decision.allowed,
        "rule": decision.rule,
        "reason": decision.reason,
        "detail": decision.detail,
        "not_matched": [mismatch.as_dict() for mismatch in nearest],
    }
