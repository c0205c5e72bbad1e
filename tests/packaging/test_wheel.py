"""What is published: the wheel and what it needs, each extra alone, in environments that hold nothing else.

The environments are made from uv.lock, out of uv's cache where it has the packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "libs" / "ztmtls"
# What needs more than its package says.
NEEDS_MORE = {"testing.calling": ("client",), "testing.harness": ("client", "jwt")}


def uv(*arguments: str, **environment: str) -> None:
    found = shutil.which("uv") or ROOT / ".tools" / "uv" / "bin" / "uv"
    keep = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        [found, *arguments], cwd=ROOT, env=keep | environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


def build(package: Path, to: Path) -> Path:
    uv("build", "--quiet", str(package), "--out-dir", str(to))
    [wheel] = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(LIBRARY, tmp_path_factory.mktemp("dist"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [path] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(path).decode())


def test_the_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(wheel: Path) -> None:
    source = LIBRARY / "src"
    package = {str(p.relative_to(source)) for p in source.rglob("*.py")} | {
        "ztmtls/py.typed",
        "ztmtls/policy.schema.json",
    }
    outside = {name for name in names(wheel) if ".dist-info/" not in name}
    assert outside == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names(wheel))


def test_the_licence_is_that_of_the_repository() -> None:
    assert (LIBRARY / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_holds_the_examples_and_the_changelog(wheel: Path) -> None:
    [archive] = wheel.parent.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    examples = {f"examples/{path.name}" for path in (LIBRARY / "examples").glob("*.*")}
    assert examples | {"CHANGELOG.md", "LICENSE", "README.md"} <= held
    assert not any("__pycache__" in name or name.startswith("tests") for name in held)


def test_the_metadata_says_what_it_is(wheel: Path) -> None:
    said = metadata(wheel)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["License-File"] == "LICENSE"
    assert said["Requires-Python"] == ">=3.11"
    assert said["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert not [c for c in said.get_all("Classifier", []) if c.startswith("License ::")]  # PEP 639


@pytest.mark.parametrize("service", ["orders", "payments"])
def test_a_service_brings_its_policy(service: str, tmp_path: Path) -> None:
    held = names(build(ROOT / "services" / service, tmp_path))
    assert {f"{service}/policy.yaml", f"{service}/py.typed"} <= held


def modules() -> dict[tuple[str, ...], set[str]]:
    """The modules by the extras that they need; what the README's table does not name belongs to the core."""
    source = LIBRARY / "src" / "ztmtls"
    every = {
        ".".join(path.relative_to(source).with_suffix("").parts)
        for path in source.rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    table = (LIBRARY / "README.md").read_text().split("## Modules")[1].split("\n## ")[0]
    extras: dict[str, tuple[str, ...]] = {"listen": ("server",)}  # what `server` and `probes` are made of
    for line in table.splitlines():
        if line.startswith("| `"):
            _, first, *_, last, _ = line.split("|")
            extras |= dict.fromkeys(re.findall(r"`(\w+)`", first), tuple(re.findall(r"`(\w+)`", last)))
    found: dict[tuple[str, ...], set[str]] = {}
    for module in every:
        needed = NEEDS_MORE.get(module, extras.get(module.partition(".")[0], ()))
        found.setdefault(needed, set()).add(module)
    return found


def test_each_extra_is_needed_by_a_module(wheel: Path) -> None:
    needed = {extra for extras in modules() for extra in extras}
    assert needed == set(metadata(wheel).get_all("Provides-Extra", []))


@pytest.mark.parametrize("extras", sorted(modules()), ids=lambda extras: "+".join(extras) or "none")
def test_the_named_extras_are_enough_for_a_module(
    extras: tuple[str, ...], wheel: Path, tmp_path: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    uv(
        *("sync", "--quiet", "--frozen", "--no-dev", "--package", "ztmtls", "--no-install-project"),
        *(word for extra in extras for word in ("--extra", extra)),
        UV_PROJECT_ENVIRONMENT=str(tmp_path / "venv"),
    )
    uv("pip", "install", "--quiet", "--no-deps", "--python", str(python), str(wheel))
    wanted = sorted(set().union(*(found for needed, found in modules().items() if {*needed} <= {*extras})))

    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module('ztmtls.' + name)"
    done = subprocess.run(
        [python, "-I", "-c", program, *wanted], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
