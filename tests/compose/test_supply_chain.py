"""What the images are made of: told beforehand, allowed to be there, and the same each time."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from tests.compose.project import ROOT, Project, docker, run_python
from ztdev.images import BILLS, bill_of, images
from ztdev.options import SERVICES

INSTALLED = """
import importlib.metadata, json
found = {}
for each in importlib.metadata.distributions():
    told = each.metadata
    classifiers = [text for text in told.get_all("Classifier") or () if text.startswith("License ::")]
    licence = told.get("License-Expression") or " AND ".join(text.split(" :: ")[-1] for text in classifiers)
    found[each.name] = each.version, licence or (told.get("License") or "").split("\\n")[0]
print(json.dumps(found))
"""

#: By their SPDX names, and as older packages write them. The LGPL is psycopg's, which is used as it is.
ALLOWED = {
    *("Apache-2.0", "Apache Software License", "MIT", "MIT-0", "MIT License", "PSF-2.0", "LGPL-3.0-only"),
    *("BSD-2-Clause", "BSD-3-Clause", "3-Clause BSD License", "BSD License"),
    *("Python Software Foundation License", "Mozilla Public License 2.0 (MPL 2.0)"),
}


def installed(service: str) -> dict[str, tuple[str, str]]:
    """Version and licence of every distribution in the image of `service`."""
    found: dict[str, tuple[str, str]] = json.loads(run_python(INSTALLED, image=f"zt-demo/{service}:local"))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def bills(signed: Path) -> Path:
    """The folder with the bill of materials of each image, which was made when they were signed."""
    return BILLS


def listed(bill: Path, kind: str, below: str = "/") -> dict[str, str]:
    """Version of each package of a kind (``pypi``, ``deb``, ``golang``) in a bill of materials, as far as it
    was found `below` a folder."""
    told = json.loads(bill.read_text())
    assert told["bomFormat"] == "CycloneDX"
    packages = [
        each
        for each in told["components"]
        if each.get("purl", "").startswith(f"pkg:{kind}/")
        and any(
            fact["name"] == "syft:location:0:path" and fact["value"].startswith(below)
            for fact in each["properties"]
        )
    ]
    return {normal(each["name"]): each["version"] for each in packages}


@pytest.mark.parametrize("service", SERVICES)
def test_the_bill_of_materials_names_all_that_is_in_the_image(bills: Path, service: str) -> None:
    bill = bills / f"{service}.cdx.json"
    python = listed(bill, "pypi")
    for name, (version, _) in installed(service).items():
        assert python.get(normal(name)) == version, name
    assert {"base-files", "libc6"} <= set(listed(bill, "deb"))


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_in_the_image_is_what_was_locked(bills: Path, service: str) -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {(normal(each["name"]), each["version"]) for each in packages}
    found = set(listed(bills / f"{service}.cdx.json", "pypi", below="/opt/zt/").items())
    assert len(found) > 30
    assert found <= locked


def test_every_image_has_a_bill_of_materials(bills: Path) -> None:
    assert {bill_of(variable) for variable in images()} == set(bills.iterdir())
    assert "github-com/spiffe/spire" in listed(bill_of("SPIRE_AGENT_IMAGE"), "golang")
    assert "ztdev" in listed(bill_of("DEV_IMAGE"), "pypi")


@pytest.mark.parametrize("service", SERVICES)
def test_every_licence_is_one_that_we_know(project: Project, service: str) -> None:
    for name, (_, licence) in installed(service).items():
        parts = re.split(r" AND | OR |; ", licence)
        assert set(parts) <= ALLOWED, (name, licence)


@pytest.mark.timeout(400)
def test_an_image_is_the_same_each_time(project: Project) -> None:
    """Made again from the same tree, without anything that was kept: the same layers, byte by byte."""

    def told(image: str, what: str) -> str:
        return docker("image", "inspect", "--format", what, image).strip()

    again = docker(
        *("build", "--quiet", "--no-cache", "--file", "services/frontend/Dockerfile", "."), timeout=300
    ).strip()
    assert told(again, "{{json .RootFS.Layers}}") == told("zt-demo/frontend:local", "{{json .RootFS.Layers}}")
    if again != told("zt-demo/frontend:local", "{{.Id}}"):
        docker("image", "rm", again)
