"""`make up VERIFY=cosign.pub`: what was signed runs, and nothing else, and nothing else gets an identity."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.conftest import PASSWORD
from tests.compose.project import ROOT, EngineFault, Project, docker
from ztdev import images
from ztdev.images import ImagesRefused, verify


@pytest.fixture
def kept(signed: Path) -> Iterator[None]:
    """What was signed is put back afterwards."""
    files = (images.LIST, images.SIGNATURE, *images.BILLS.iterdir())
    before = {file: file.read_bytes() for file in files}
    yield
    for file, content in before.items():
        file.write_bytes(content)


def reason(key: Path) -> str:
    with pytest.raises(ImagesRefused) as refused:
        verify(str(key))
    return str(refused.value).partition(":")[0]


def test_what_is_signed_names_every_image_by_its_content(signed: Path) -> None:
    found = verify(str(signed))
    assert set(found) == set(images.images())
    for variable, name in images.images().items():
        assert found[variable] == docker("image", "inspect", "--format", "{{.Id}}", name).strip()


def test_anything_else_is_refused(signed: Path, keys: Path, kept: None) -> None:
    assert verify(str(signed))
    assert reason(keys / "other" / "cosign.pub") == "images_signature"

    bill = next(images.BILLS.glob("orders*"))
    content = bill.read_bytes()
    bill.write_bytes(content + b" ")
    assert reason(signed) == "images_changed"
    bill.write_bytes(content)

    told = json.loads(images.LIST.read_text())
    told["images"]["ORDERS_IMAGE"]["id"] = told["images"]["PAYMENTS_IMAGE"]["id"]
    images.LIST.write_text(json.dumps(told))
    assert reason(signed) == "images_signature"

    images.SIGNATURE.unlink()
    assert reason(signed) == "images_unsigned"


def test_an_image_that_the_engine_has_not_is_refused(
    signed: Path, kept: None, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PASSWORD.items():
        monkeypatch.setenv(name, value)
    told = json.loads(images.LIST.read_text())["images"]
    told["ORDERS_IMAGE"]["id"] = "sha256:" + "0" * 64
    images.sign_list(told, str(keys / "cosign.key"))
    assert reason(signed) == "images_changed"


def test_make_up_refuses_before_anything_starts(signed: Path, keys: Path, project: Project) -> None:
    other = keys / "other" / "cosign.pub"
    name = f"{project.name}-refused"
    done = subprocess.run(
        ["make", "up", f"VERIFY={other}"],
        cwd=ROOT,
        env=os.environ | {"COMPOSE_PROJECT_NAME": name},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "images_signature" in done.stderr
    with pytest.raises(EngineFault):
        docker("network", "inspect", f"{name}_edge")
