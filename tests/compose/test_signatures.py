"""`make up VERIFY=cosign.pub`: what was signed runs, and nothing else, and nothing else gets an identity."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.compose.project import ROOT, EngineFault, Project, docker
from tests.compose.test_containers import ask
from ztdev import images
from ztdev.images import ImagesRefused, verify
from ztdev.ports import choose_free_ports
from ztdev.shop import Visitor

PASSWORD = {"COSIGN_PASSWORD": "of a key that lives for one test"}


def make_key(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(
        [images.tool("cosign"), "generate-key-pair"],
        cwd=folder,
        env=os.environ | PASSWORD,
        capture_output=True,
        check=True,
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours, and in `other` somebody else's."""
    folder = tmp_path_factory.mktemp("keys")
    make_key(folder)
    make_key(folder / "other")
    return folder


@pytest.fixture(scope="module")
def signed(project: Project, keys: Path) -> Path:
    """The public key that the images, which `project` has built, are signed for."""
    command = ["make", "--silent", "sign", f"KEY={keys / 'cosign.key'}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | PASSWORD, check=True, timeout=120)
    return keys / "cosign.pub"


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


class Verified(Project):
    """A project whose images are pinned to their content."""

    pinned: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | dict(self.pinned)


def test_what_was_signed_runs_and_has_its_identities_alone(project: Project, signed: Path) -> None:
    (port,) = choose_free_ports(1)
    verified = Verified(f"{project.name}-signed", port)
    verified.pinned = verify(str(signed))
    try:
        verified.up()
        with Visitor(verified.url) as visitor:
            assert visitor.order()["order"]["status"] == "paid"
        for service, variable in (("orders", "ORDERS_IMAGE"), ("spire-server", "SPIRE_SERVER_IMAGE")):
            assert verified.container(service)["Image"] == verified.pinned[variable]

        right = {
            "com.docker.compose.project": verified.name,
            "com.docker.compose.service": "payments",
            "com.docker.compose.oneoff": "False",
        }
        status, said = ask(verified, verified.pinned["PAYMENTS_IMAGE"], **right)
        assert status == 0, said
        # The same by its name is not known to be the same: a name can be given to anything.
        status, said = ask(verified, "zt-demo/payments:local", **right)
        assert status != 0, said
    finally:
        verified.compose("down", "--volumes", "--timeout", "10")


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
