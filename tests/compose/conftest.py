"""The compose project, started once for all tests, and its images, signed once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.project import ROOT, Project, running
from ztdev import images

PASSWORD = {"COSIGN_PASSWORD": "of a key that lives for one test"}


@pytest.fixture(scope="session")
def project() -> Iterator[Project]:
    with running() as project:
        yield project


def make_key(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(
        [images.tool("cosign"), "generate-key-pair"],
        cwd=folder,
        env=os.environ | PASSWORD,
        capture_output=True,
        check=True,
    )


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours, and in `other` somebody else's."""
    folder = tmp_path_factory.mktemp("keys")
    make_key(folder)
    make_key(folder / "other")
    return folder


@pytest.fixture(scope="session")
def signed(project: Project, keys: Path) -> Path:
    """The public key that the images, which `project` has built, are signed for."""
    command = ["make", "--silent", "sign", f"KEY={keys / 'cosign.key'}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | PASSWORD, check=True, timeout=120)
    return keys / "cosign.pub"
