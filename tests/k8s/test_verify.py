"""`make verify` on a real cluster: it says what is so, and notices when it isn't."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.k8s.cluster import rolled_out
from tests.k8s.test_networks import without_policies
from tests.waiting import until
from ztdev.kubernetes.kubectl import apply, kubectl, read, run
from ztdev.kubernetes.verify import CONTROLS, Finding, network_policies

NETWORK = {control.name for control in CONTROLS if control.pillar == "network"}


def verify() -> tuple[int, dict[str, Finding]]:
    """Its exit status, and what it found, by control."""
    command = (sys.executable, "-m", "ztdev.kubernetes.verify", "--json", "--without", "signatures")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.stdout, done.stderr
    findings = [Finding(**each) for each in json.loads(done.stdout)]
    return done.returncode, {finding.control: finding for finding in findings}


def outcome(control: str) -> str:
    return next(each for each in CONTROLS if each.name == control).finding().outcome


@contextmanager
def nobody_enforces() -> Iterator[None]:
    """`K8S_STOP_ENFORCER` is a command by which nobody enforces network policies on the cluster under test
    any more, and `K8S_START_ENFORCER` one that takes it back."""
    run(*shlex.split(os.environ["K8S_STOP_ENFORCER"]))
    try:
        yield
    finally:
        run(*shlex.split(os.environ["K8S_START_ENFORCER"]))
        with without_policies():  # what is new is looked at at once
            pass
        until(lambda: outcome("network policies are obeyed") == "enforced", 60, "they are enforced again")


def test_every_control_is_enforced() -> None:
    status, findings = verify()
    assert [finding for finding in findings.values() if finding.outcome != "enforced"] == []
    assert status == 0


def test_policies_that_nobody_enforces_are_not_believed() -> None:
    """They are there all the same: the API server takes them, and tells nobody."""
    with nobody_enforces():
        assert read("networkpolicies", "--namespace", "zt-demo")["items"]
        status, findings = verify()
    assert findings["network policies are obeyed"].outcome == "NOT ENFORCED"
    assert {name for name, finding in findings.items() if finding.outcome != "enforced"} <= NETWORK
    assert status == 1


def test_what_is_not_applied_is_not_enforced() -> None:
    with without_policies():
        until(lambda: outcome("network policies are obeyed") == "NOT ENFORCED", 30, "it is noticed")
    until(lambda: outcome("network policies are obeyed") == "enforced", 30, "it is seen again")


@pytest.mark.parametrize("policy", ["zt-accounts", "zt-images"])
def test_a_policy_that_only_warns_is_not_enforced(policy: str) -> None:
    binding = read("validatingadmissionpolicybinding", policy)
    kept = {**binding, "metadata": {"name": policy}}
    controls = {
        "zt-accounts": ["an account is one application's"],
        "zt-images": ["images by their digest", "images from our registry"],
    }[policy]
    apply({**kept, "spec": {**kept["spec"], "validationActions": ["Warn"]}})
    try:
        for control in controls:
            until(lambda control=control: outcome(control) == "NOT ENFORCED", 20, control)  # type: ignore[misc]
    finally:
        apply(kept)
        until(lambda: {outcome(control) for control in controls} == {"enforced"}, 20, "it is enforced again")


def test_where_nothing_rightful_goes_through_nothing_is_proved() -> None:
    kubectl("--namespace", "zt-demo", "scale", "deployment/payments", "--replicas=0")
    try:
        until(lambda: outcome("network policies are obeyed") == "NOT PROVED", 60, "payments is gone")
    finally:
        kubectl("--namespace", "zt-demo", "scale", "deployment/payments", "--replicas=2")
        rolled_out("zt-demo", "deployment/payments")
    assert network_policies()
