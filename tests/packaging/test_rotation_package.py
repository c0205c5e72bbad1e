"""The rotation function's package: what Lambda unpacks."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ztdev.errors import ProgramMissing
from ztdev.functions import CA_FILE, LAMBDA_PLATFORMS, LAMBDA_PYTHON, build, kept

pytestmark = pytest.mark.timeout(300)

MACHINES = {"arm64": "aarch64", "x86_64": "x86_64"}


@pytest.mark.parametrize("architecture", LAMBDA_PLATFORMS)
def test_the_same_package_comes_out_each_time_and_is_for_its_architecture(
    architecture: str, tmp_path: Path
) -> None:
    first = build(tmp_path / "a", architecture=architecture)
    old = os.umask(0o077)
    try:
        second = build(tmp_path / "b", architecture=architecture)
    finally:
        os.umask(old)

    assert first.file.name == second.file.name
    assert first.file.read_bytes() == second.file.read_bytes()
    assert first.sha256[:16] in first.file.name
    with zipfile.ZipFile(first.file) as archive:
        compiled = [name for name in archive.namelist() if ".cpython-" in name]
    suffix = f".cpython-{LAMBDA_PYTHON.replace('.', '')}-{MACHINES[architecture]}-linux-gnu.so"
    assert compiled
    assert all(name.endswith(suffix) for name in compiled)


def test_it_holds_the_function_its_driver_and_the_authorities_and_nothing_else(tmp_path: Path) -> None:
    authorities = tmp_path / "bundle.pem"
    authorities.write_text("-----BEGIN CERTIFICATE-----\n")

    package = build(tmp_path / "build", architecture="arm64", ca_file=authorities)

    with zipfile.ZipFile(package.file) as archive:
        names = archive.namelist()
        assert archive.read(CA_FILE) == authorities.read_bytes()
        assert {entry.external_attr >> 16 for entry in archive.infolist()} <= {0o100644, 0o100755}
    tops = {name.partition("/")[0].partition("-")[0] for name in names}
    assert tops == {"rotate_db_credentials", "psycopg", "psycopg_binary", "psycopg_binary.libs", "database"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", "RECORD"))]


def test_the_one_for_this_machine_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kept(tmp_path / "kept")
    assert made.sha256 == build(tmp_path / "again").sha256
    monkeypatch.setenv("UV", str(tmp_path / "no-uv"))  # neither uv nor the network is needed from now on

    assert kept(tmp_path / "kept") == made

    with pytest.raises(ProgramMissing):
        kept(tmp_path / "elsewhere")


def test_another_content_has_another_name(tmp_path: Path) -> None:
    authorities = tmp_path / "bundle.pem"
    authorities.write_text("one")
    one = build(tmp_path / "build", ca_file=authorities)
    authorities.write_text("two")
    two = build(tmp_path / "build", ca_file=authorities)

    assert one.file.name != two.file.name


def test_it_runs_from_where_it_is_unpacked(tmp_path: Path) -> None:
    """With this machine's wheels, and only botocore from outside, as Lambda has it."""
    with zipfile.ZipFile(build(tmp_path / "build").file) as archive:
        archive.extractall(tmp_path / "task")
    program = (
        "import sys, importlib.util as u; sys.path.insert(0, sys.argv[1]);"
        "import psycopg, rotate_db_credentials.handler as h;"
        "assert psycopg.__file__.startswith(sys.argv[1]), psycopg.__file__;"
        "print(psycopg.pq.__impl__, h.PACKAGED_CA_FILE)"
    )

    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path / "task")],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["binary", str(tmp_path / "task" / CA_FILE)]
