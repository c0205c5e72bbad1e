"""Prove that each control is enforced on the cluster of KUBECONFIG: `python -m ztdev.kubernetes.verify`.

A control is believed only when it was seen: what is rightful goes through, and then what is not is refused,
for the reason that the control gives. Where the rightful fails, nothing is proved.

Nothing is changed but for one pod, which is made and taken away again. Exit status 1 when a control is not
enforced, or not proved.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from ztdev.console import make_console
from ztdev.errors import StackError
from ztdev.inside import CALL_PAYMENTS, CONNECT, READ_SECRETS, RESOLVE

from .kubectl import ClusterFault, kubectl, python, read, said_of
from .pods import NAMESPACE, as_deployed, running, waiting

Outcome = Literal["enforced", "NOT ENFORCED", "NOT PROVED"]
Change = Callable[[dict[str, Any]], None]

PLACES = {
    "payments": ("payments.zt-demo", 8443),
    "orders": ("orders.zt-demo", 8443),
    "the API server": ("kubernetes.default", 443),
    "the metadata service": ("169.254.169.254", 80),
}
ROGUE = "verify-rogue"

NO_PAYMENT = "/payments/00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True)
class Finding:
    """What was seen of a control."""

    pillar: str
    control: str
    outcome: Outcome
    seen: str


class NotProved(Exception):
    """What is rightful does not go through, so that a refusal would tell nothing."""


class NotEnforced(Exception):
    """What is not rightful goes through."""


def rightful(happens: bool, text: str) -> None:
    """Go on only when what is rightful `happens`."""
    if not happens:
        raise NotProved(text)


def refused(is_refused: bool, text: str) -> None:
    """Go on only when what is not rightful `is_refused`."""
    if not is_refused:
        raise NotEnforced(text)


def address(place: str) -> tuple[str, int]:
    """Of one of `PLACES`, so that nobody is kept from it by a name server alone."""
    host, port = PLACES[place]
    name, _, namespace = host.partition(".")
    if "." in namespace:
        return host, port
    return read("service", name, "--namespace", namespace)["spec"]["clusterIP"], port


def reached(target: str, *places: str) -> list[str]:
    """Those of `places` that a pod connects to."""
    outcomes = python(NAMESPACE, target, CONNECT, [address(place) for place in places])
    return [place for place, outcome in zip(places, outcomes, strict=True) if outcome == "connected"]


# -- network ---------------------------------------------------------------------------------------------


def resolved(target: str) -> str:
    """What becomes of a pod's question where payments is."""
    (outcome,) = python(NAMESPACE, target, RESOLVE, [PLACES["payments"][0]])
    return str(outcome)


def network_policies() -> str:
    """Only orders reaches payments."""
    rightful(bool(reached("deployment/orders", "payments")), "orders does not connect to payments")
    refused(not reached("deployment/frontend", "payments"), "frontend connects to payments")
    refused(not reached("deployment/payments", "orders"), "payments connects to orders")
    return "orders connects to payments; frontend does not, and payments not to orders"


def a_stranger_reaches_nobody() -> str:
    """A pod that admission lets in, under an account and a name of its own."""
    rightful(resolved("deployment/orders") == "known", "orders learns no name")
    with running(waiting(ROGUE, account=ROGUE, label=ROGUE)) as pod:
        found = reached(pod, "payments", "orders", "the API server")
        learns = resolved(pod)
    refused(not found, f"a pod of a stranger connects to {', '.join(found)}")
    refused(learns == "unanswered", "a pod of a stranger has its questions answered by a name server")
    return "a pod of its own name connects to nobody, and no name server answers it"


def no_api_server() -> str:
    """Services have no business with the API server, nor with what a node's metadata service knows."""
    rightful(bool(reached("deployment/frontend", "orders")), "frontend does not connect to orders")
    found = reached("deployment/frontend", "the API server", "the metadata service")
    refused(not found, f"frontend connects to {', '.join(found)}")
    return "frontend connects to orders, and neither to the API server nor to the metadata service"


# -- identity and application ----------------------------------------------------------------------------


def every_route_has_its_callers() -> str:
    """Who payments knows may do what its policy says, and nothing else."""
    told = python(
        NAMESPACE, "deployment/orders", CALL_PAYMENTS, [["GET", NO_PAYMENT], ["DELETE", NO_PAYMENT]]
    )
    rightful(bool(told["id"]), f"orders has no identity ({told.get('reason')})")
    (status, reason), (forbidden, why) = told["answers"]
    rightful(status == 404, f"orders may not ask payments for a payment ({status} {reason})")
    refused(forbidden == 403, f"orders deletes a payment ({forbidden} {why})")
    return f"as {told['id']} orders asks for a payment, and may not delete one ({why})"


def a_role_reads_one_secret() -> str:
    """Web identity: the role of an account, and what it may read."""
    for service, other in (("orders", "payments"), ("payments", "orders")):
        names = [f"zt-demo/{service}/db", f"zt-demo/{other}/db", f"zt-demo/{service}/db-owner"]
        own, *others = python(NAMESPACE, f"deployment/{service}", READ_SECRETS, names)
        rightful(own == "read", f"{service} does not read its own secret ({own})")
        refused("read" not in others, f"{service} reads {names[1]} or {names[2]}: {others}")
    return (
        "orders and payments read their own secret, and neither the other's nor their owner's (AccessDenied)"
    )


# -- admission -------------------------------------------------------------------------------------------


def admission_refuses(change: Change, reason: str) -> str:
    """A pod as it should be is let in, and with the change it isn't."""
    document = as_deployed("orders", "verify")
    rightful(not (said := said_of(document)), f"a pod as it should be is not let in: {said}")
    change(document)
    said = said_of(document)
    refused(bool(said), "it is let in")
    rightful(reason in said, f"refused, but for another reason: {said}")
    return f"refused: {reason}"


def privileged(document: dict[str, Any]) -> None:
    """Takes hold of the node."""
    held = document["spec"]["containers"][0]["securityContext"]
    held |= {"privileged": True, "allowPrivilegeEscalation": True}


def by_tag(document: dict[str, Any]) -> None:
    """Names its image by a tag."""
    container = document["spec"]["containers"][0]
    container["image"] = container["image"].partition("@")[0] + ":latest"


def from_elsewhere(document: dict[str, Any]) -> None:
    """Takes its image from another registry."""
    container = document["spec"]["containers"][0]
    container["image"] = "registry.example/" + container["image"].rpartition("/")[2]


def signed_by_nobody(document: dict[str, Any]) -> None:
    """Names an image of our registry that nobody has signed."""
    container = document["spec"]["containers"][0]
    container["image"] = f"{container['image'].partition('@')[0]}@sha256:{secrets.token_hex(32)}"


def under_another_account(document: dict[str, Any]) -> None:
    """Is named as orders is, and is somebody else."""
    document["spec"]["serviceAccountName"] = "payments"


def with_a_token_of_the_api_server(document: dict[str, Any]) -> None:
    """Has the token of its account mounted."""
    document["spec"]["automountServiceAccountToken"] = True


# -- data ------------------------------------------------------------------------------------------------


def secrets_are_encrypted() -> str:
    """The API server encrypts Secrets by a key of a key service before it writes them down."""
    told = kubectl("get", "--raw", "/readyz?verbose")
    plugins = [line for line in told.splitlines() if "kms-provider" in line]
    refused(bool(plugins), "the API server has no key service")
    rightful(all(line.startswith("[+]") for line in plugins), f"the key service does not answer: {plugins}")
    return "the API server's key service answers"


@dataclass(frozen=True)
class Control:
    """What is claimed, and the check that says what was seen of it, or raises; and the `part` of the demo,
    where a cluster may do without."""

    pillar: str
    name: str
    check: Callable[[], str]
    part: str = ""

    def finding(self) -> Finding:
        """Look."""
        try:
            return Finding(self.pillar, self.name, "enforced", self.check())
        except NotEnforced as found:
            return Finding(self.pillar, self.name, "NOT ENFORCED", str(found))
        except (NotProved, ClusterFault) as fault:
            return Finding(self.pillar, self.name, "NOT PROVED", str(fault))


CONTROLS = [
    Control("network", "network policies are obeyed", network_policies),
    Control("network", "a stranger's pod reaches nobody", a_stranger_reaches_nobody),
    Control("network", "no way to the API server, nor to the node's metadata", no_api_server),
    Control("application", "every route has its callers", every_route_has_its_callers),
    Control("identity", "a role reads one secret", a_role_reads_one_secret),
    Control(
        "identity",
        "an account is one application's",
        lambda: admission_refuses(under_another_account, "account_reused"),
    ),
    Control(
        "identity",
        "no token of the API server in a pod",
        lambda: admission_refuses(with_a_token_of_the_api_server, "token_audience"),
    ),
    Control("workload", "no hold on the node", lambda: admission_refuses(privileged, "violates PodSecurity")),
    Control("workload", "images by their digest", lambda: admission_refuses(by_tag, "image_not_pinned")),
    Control(
        "workload", "images from our registry", lambda: admission_refuses(from_elsewhere, "image_source")
    ),
    Control(
        "workload",
        "images signed by our key",
        lambda: admission_refuses(signed_by_nobody, "zt-signatures"),
        "signatures",
    ),
    Control("data", "Secrets of the cluster are encrypted", secrets_are_encrypted),
]


def cluster() -> str:
    """The address of the cluster that is looked at. Raises `ClusterFault` when none answers."""
    try:
        where = kubectl("config", "view", "--minify", "--output", "jsonpath={.clusters[0].cluster.server}")
    except ClusterFault:
        raise ClusterFault("No cluster is named: set KUBECONFIG, or choose a context of kubectl.") from None
    kubectl("get", "namespace", NAMESPACE, timeout=20)
    return where


_COLOURS: dict[Outcome, str] = {"enforced": "green", "NOT ENFORCED": "bold red", "NOT PROVED": "yellow"}


def main() -> int:
    """Prove each control, and say what was seen."""
    parser = argparse.ArgumentParser(
        prog="python -m ztdev.kubernetes.verify", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parts = sorted({control.part for control in CONTROLS} - {""})
    parser.add_argument(
        "--without", choices=parts, action="append", default=[], help="what this cluster has not"
    )
    arguments = parser.parse_args()
    console = make_console(stderr=arguments.json)
    try:
        console.print(f"The cluster at {cluster()}:")
        with console.status("") as status:
            findings = look(status.update, arguments.without)
    except StackError as error:
        print(error, file=sys.stderr)
        return int(error.exit_status)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    console.print(table(findings))
    return int(any(finding.outcome != "enforced" for finding in findings))


def look(say: Callable[[str], None], without: Collection[str] = ()) -> list[Finding]:
    """What was seen of each control, but for those of the parts that the cluster is `without`; `say` is told
    which is looked at."""
    findings = []
    for control in CONTROLS:
        if control.part in without:
            continue
        say(control.name)
        findings.append(control.finding())
    return findings


def table(findings: Sequence[Finding]) -> Table:
    """For people."""
    shown = Table("pillar", "control", "", "seen")
    for finding in findings:
        colour = _COLOURS[finding.outcome]
        shown.add_row(finding.pillar, finding.control, f"[{colour}]{finding.outcome}[/]", finding.seen)
    return shown


if __name__ == "__main__":
    sys.exit(main())
