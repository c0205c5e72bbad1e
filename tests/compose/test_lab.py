"""Profile `lab`: the containers are attacked at a button of their own page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.attacks.catalogue import load_container_attacks
from tests.compose.project import Project
from tests.waiting import until


@pytest.fixture(scope="module")
def lab(project: Project) -> Iterator[Project]:
    """The project with the lab beside it."""
    project.compose("--profile", "lab", "build", "--quiet", "lab", timeout=600)
    project.compose("up", "--detach", "--wait", "--wait-timeout", "60", "--no-deps", "lab")
    yield project
    project.compose("rm", "--force", "--stop", "lab")


def proofs(project: Project) -> dict[str, Any]:
    """What was proved since the lab was started: the first event of its stream tells."""
    with httpx.stream("GET", f"{project.url}/lab/events", timeout=10) as answer:
        assert answer.status_code == 200
        told = next(line for line in answer.iter_lines() if line.startswith("data: "))
    found: dict[str, Any] = json.loads(told.removeprefix("data: "))["proofs"]
    return found


def press_all(project: Project) -> None:
    """The button that runs them all, as a browser presses it."""
    with httpx.Client(base_url=project.url, timeout=10) as browser:
        page = browser.get("/lab").text
        token = re.search(r'<input type="hidden" name="([^"]+)" value="([^"]+)">', page)
        assert token is not None
        fields = {token[1]: token[2], "attack": "all"}
        answer = browser.post("/lab/press", data=fields, headers={"Origin": project.url})
    assert answer.status_code == 303, answer.text


def test_every_attack_on_the_containers_is_proved_from_the_page(lab: Project) -> None:
    attacks = {attack.id for attack in load_container_attacks()}
    press_all(lab)
    until(lambda: attacks <= proofs(lab).keys(), 120, "every attack has been made")
    for proof in proofs(lab).values():
        assert proof["refused"], proof
        assert proof["seen_without"], proof
        assert not proof["fault"], proof


def test_the_lab_has_the_engine_and_little_else(lab: Project) -> None:
    host = lab.container("lab")["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["Privileged"]
    assert host["PidMode"] == ""
    sources = {mount["Destination"] for mount in lab.container("lab")["Mounts"]}
    assert sources == {"/run/lab", "/var/run/docker.sock"}
