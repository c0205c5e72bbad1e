"""The cluster of KUBECONFIG, by kubectl."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ztdev.errors import ProgramMissing, StackError
from ztdev.inside import PYTHON

ROOT = Path(__file__).parents[4]


class ClusterFault(StackError):
    """The cluster, or what it was asked for, failed. The text is what kubectl said."""


def run(*command: str, given: str = "", timeout: float = 180) -> str:
    """What a command prints, with `given` as its standard input. Raises with what it said when it fails."""
    try:
        done = subprocess.run(
            command,
            input=given,
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise ProgramMissing(f"{command[0]} is not there.") from None
    except subprocess.TimeoutExpired:
        raise ClusterFault(f"{shlex.join(command[:6])}: no answer in {timeout:.0f} s") from None
    if done.returncode != 0:
        raise ClusterFault(f"{shlex.join(command[:6])}: {done.stdout[-2000:]}{done.stderr[-3000:]}".strip())
    return done.stdout


def kubectl(*arguments: str, given: str = "", timeout: float = 180) -> str:
    """What kubectl prints."""
    return run("kubectl", *arguments, given=given, timeout=timeout)


def read(*arguments: str) -> dict[str, Any]:
    """An object, or a list of them, as the API server has it."""
    found: dict[str, Any] = json.loads(kubectl("get", *arguments, "--output", "json"))
    return found


def apply(*objects: Mapping[str, Any]) -> None:
    """Apply objects as the server itself sees them: an unknown field is a fault."""
    command = ("apply", "--server-side", "--force-conflicts", "--validate=strict", "--filename=-")
    kubectl(*command, given=yaml.safe_dump_all(objects))


def rendered(overlay: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization."""
    text = kubectl("kustomize", "--load-restrictor", "LoadRestrictionsNone", str(overlay))
    return [each for each in yaml.safe_load_all(text) if each]


def refusal(*arguments: str, given: str = "") -> str:
    """What kubectl says when it fails; nothing when it does not."""
    try:
        kubectl(*arguments, given=given)
    except ClusterFault as fault:
        return str(fault)
    return ""


def said_of(document: dict[str, Any]) -> str:
    """What the API server says of an object that it is asked to make, as far as it would: nothing when it is
    let in."""
    return refusal("create", "--dry-run=server", "--output=name", "--filename=-", given=json.dumps(document))


def python(namespace: str, target: str, program: str, given: object = None) -> Any:
    """What a program of `ztdev.inside` saw in a container of ours, as its user; `target` is a pod or
    ``deployment/NAME``."""
    command = ("--namespace", namespace, "exec", "--stdin", target, "--", PYTHON, "-c", program)
    return json.loads(kubectl(*command, given=json.dumps(given)))
