"""The demo on EKS: `make deploy` and `make undeploy` (`python -m ztdev.eks deploy --help`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console
from rich.table import Table

from ztdev.aws.stacks import Stack
from ztdev.console import Progress, make_console, print_error
from ztdev.errors import ExitStatus, StackError
from ztdev.events import Steps
from ztdev.functions import LAMBDA_PLATFORMS, kept
from ztdev.state import default_tools_directory

from . import cluster
from .costs import monthly
from .deploy import Deployment, NotVerified
from .preflight import Ready, caller, preflight
from .settings import PREFIX, Misused, Settings, stack_name
from .undeploy import Removal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is named."""
    given = _parser().parse_args(arguments)
    console = make_console()
    progress = Progress(console)
    try:
        if given.command == "prepare":
            return _prepare(Steps(progress))
        session = boto3.Session(region_name=given.region)
        return int(_COMMANDS[given.command](session, given, console, Steps(progress)))
    except (ClientError, BotoCoreError) as error:
        print_error(f"AWS says: {error}")
        return ExitStatus.FAILED
    except NotVerified as error:
        console.print(error.table)
        print_error(str(error))
        return error.exit_status
    except StackError as error:
        print_error(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        print_error("Stopped. What AWS has begun goes on; run the same again to go on from there.")
        return ExitStatus.INTERRUPTED
    finally:
        progress.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ztdev.eks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--region", help="default: the one of AWS's configuration")
    both.add_argument(
        "--kubeconfig", type=Path, help="how the cluster is reached (default: by the credentials of AWS here)"
    )
    both.add_argument("--yes", action="store_true", help="do not ask")

    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument(
        "--page", default="localhost", help="the host name that people know the page by (%(default)s)"
    )
    asked.add_argument(
        "--parameter",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of infra/platform.yaml: NodeCount=2, DatabaseStandby=true, ...",
    )
    asked.add_argument(
        "--door",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of infra/door.yaml, to make it: CertificateArn, Issuer, ClientId, ClientSecretId, ...",
    )
    asked.add_argument(
        "--api-cidrs",
        help="from where the API server is reached, separated by commas (default: this machine's address)",
    )
    asked.add_argument(
        "--schedule", default="rate(1 day)", help="when the databases' logins rotate (%(default)s)"
    )
    asked.add_argument(
        "--key", help="what signs the images, as cosign takes it (default: the platform's, in KMS)"
    )
    asked.add_argument(
        "--database-ca", type=Path, help="PEM file with the databases' authorities (default: RDS's, fetched)"
    )
    asked.add_argument(
        "--overlay", type=Path, help="a kustomization over k8s/overlays/eks, to be used instead"
    )

    commands.add_parser(
        "deploy",
        parents=[both, asked],
        help="make everything, or bring it up to date",
        description="Make everything, or bring it up to date. Run again after a failure, it goes on there.",
    )
    commands.add_parser(
        "check", parents=[both, asked], help="refuse what deploy would, as far as that is known at once"
    )
    commands.add_parser(
        "undeploy",
        parents=[both],
        help="take everything away, orders and payments too",
        description="Take everything away, orders too, and prove that nothing is left that costs.",
    )

    commands.add_parser("prepare", help="fetch beforehand what deploy needs of a package index")

    token = commands.add_parser("token", help="what kubectl shows the cluster (kubectl itself asks for it)")
    token.add_argument("--region", required=True)
    token.add_argument("--cluster", required=True)
    return parser


def _prepare(steps: Steps) -> ExitStatus:
    with steps.step("packages of the rotation function") as detail:
        keep = default_tools_directory() / "packages"
        detail.text = ", ".join(kept(keep, architecture).file.name for architecture in LAMBDA_PLATFORMS)
    return ExitStatus.OK


def _check(session: boto3.Session, given: argparse.Namespace, _: Console, __: Steps) -> ExitStatus:
    """Before tools are built, which takes minutes the first time."""
    _settings(given)
    caller(session)
    _somebody_answers(given, "Deploy it?")
    return ExitStatus.OK


def _deploy(session: boto3.Session, given: argparse.Namespace, console: Console, steps: Steps) -> ExitStatus:
    settings = _settings(given)
    with steps.step("preflight") as detail:
        caller(session)
        there = Stack(session.client("cloudformation"), stack_name("platform")).status()
        ready = preflight(session, settings, new=there is None)
        detail.text = f"account {ready.account}, {ready.region}, as {ready.administrator}"
    for warning in ready.warnings:
        steps.notice(warning, "warning")
    console.print(_costs(settings, ready))
    _ask(console, given, "Deploy it?")
    console.print(Deployment(session, settings, ready, steps).run())
    console.print(
        "The page, until somebody makes a door (docs/eks.md):\n"
        f"  export KUBECONFIG={given.kubeconfig or 'build/eks/kubeconfig'}\n"
        "  kubectl --namespace zt-demo port-forward service/frontend 8443:80   # then https://localhost:8443\n"
        "`make undeploy` takes everything away again."
    )
    return ExitStatus.OK


def _undeploy(
    session: boto3.Session, given: argparse.Namespace, console: Console, steps: Steps
) -> ExitStatus:
    account, who = caller(session)
    console.print(f"Account {account}, {session.region_name}, as {who}.")
    _ask(console, given, f"Take away all that {PREFIX} is, with its orders and payments?")
    left = Removal(session, given.kubeconfig, steps).run()
    for each in left:
        console.print(f"  {each.arn}: {each.free}", soft_wrap=True)
    console.print("Nothing is left that costs.")
    return ExitStatus.OK


def _token(session: boto3.Session, given: argparse.Namespace, _: Console, __: Steps) -> ExitStatus:
    print(json.dumps(cluster.token(session, given.cluster)))
    return ExitStatus.OK


_COMMANDS = {"check": _check, "deploy": _deploy, "undeploy": _undeploy, "token": _token}


def _settings(given: argparse.Namespace) -> Settings:
    chosen = {name: getattr(given, name) for name in ("overlay",) if getattr(given, name) is not None}
    return Settings(
        page=given.page,
        parameters=_named("--parameter", given.parameter),
        door=_named("--door", given.door),
        api_cidrs=given.api_cidrs,
        schedule=given.schedule,
        key=given.key,
        database_ca=given.database_ca,
        kubeconfig=given.kubeconfig,
        **chosen,
    )


def _named(option: str, texts: Sequence[str]) -> dict[str, str]:
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise Misused(f"{option} {text}: write it as NAME=VALUE.")
        values[name] = value
    return values


def _costs(settings: Settings, ready: Ready) -> Table:
    shown = Table("what", "USD a month", title=f"In account {ready.account}, {ready.region}, roughly")
    parts = monthly(settings)
    for what, cost in parts:
        shown.add_row(what, str(cost))
    shown.add_section()
    shown.add_row("together, running all the time", str(sum(cost for _, cost in parts)))
    return shown


def _somebody_answers(given: argparse.Namespace, question: str) -> None:
    if not given.yes and not sys.stdin.isatty():
        raise Misused(f"{question} Nobody is here to answer: --yes says so beforehand.")


def _ask(console: Console, given: argparse.Namespace, question: str) -> None:
    _somebody_answers(given, question)
    if given.yes:
        return
    if console.input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise StackError("Nothing was done.")


if __name__ == "__main__":
    sys.exit(main())
