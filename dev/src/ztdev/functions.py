"""Packages of the Lambda function: zip files, made without Docker, the same bytes from the same lock file.

    python -m ztdev.functions build --ca-file global-bundle.pem      # for Lambda; `make package` does this

What goes in is the function's source, its locked dependencies as wheels for the target, and the authorities
of the database's certificate. botocore stays out: Lambda's Python has it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ztdev.aws.environment import find_uv
from ztdev.errors import StackError
from ztdev.state import checkout

NAME = "rotate-db-credentials"

#: As in infra/workload.yaml.
LAMBDA_PYTHON = "3.14"

#: What Lambda calls an architecture, and the wheels that run on it (Amazon Linux 2023 has glibc 2.34).
LAMBDA_PLATFORMS = {"arm64": "aarch64-manylinux_2_28", "x86_64": "x86_64-manylinux_2_28"}

#: Where the function looks for the authorities (`rotate_db_credentials.handler`).
CA_FILE = "database-ca.pem"

#: Written by installers: not needed to run, and not the same each time.
_NOT_PACKAGED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", ".lock"}

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say


@dataclass(frozen=True)
class Package:
    """A finished package. `file` is named after its content, so that CloudFormation deploys a new one."""

    file: Path
    size: int
    sha256: str


def build(into: Path, *, architecture: str | None = None, ca_file: Path | None = None) -> Package:
    """Make the package in the directory `into`.

    Args:
        architecture: ``arm64`` or ``x86_64`` for Lambda; None for this machine and its Python.
        ca_file: PEM file with the authorities of the database's certificate, to go in.

    Raises:
        StackError: it cannot be made; the message says why.
    """
    root = _checkout()
    source = _source(root)
    with tempfile.TemporaryDirectory(prefix="package-") as directory:
        tree = Path(directory) / "tree"
        _install(root, tree, architecture)
        shutil.copytree(source, tree, dirs_exist_ok=True)
        if ca_file is not None:
            shutil.copyfile(ca_file, tree / CA_FILE)
        zipped = Path(directory) / "package.zip"
        _zip(tree, zipped)
        return _named(zipped, into, f"{NAME}-{architecture or 'local'}")


def _named(zipped: Path, into: Path, name: str) -> Package:
    """The finished package in the directory `into`, named after its content."""
    content = zipped.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    into.mkdir(parents=True, exist_ok=True)
    file = into / f"{name}-{digest[:16]}.zip"
    shutil.copyfile(zipped, unfinished := file.with_suffix(f".{os.getpid()}"))
    unfinished.replace(file)
    return Package(file, len(content), digest)


def kept(keep: Path, architecture: str | None = None) -> Package:
    """The package as `build` makes it: the one that is kept in the directory `keep` if it was made of the
    same sources and the same lock file, so that nothing is fetched twice.

    Raises:
        StackError: as `build`.
    """
    root = _checkout()
    target = architecture or f"{sys.version} {platform.machine()}"
    digest = hashlib.sha256(target.encode())
    for made_of in (Path(__file__), root / "uv.lock", *sorted(_source(root).rglob("*.py"))):
        digest.update(made_of.read_bytes())
    folder = keep / digest.hexdigest()[:16]
    for there in folder.glob("*.zip"):
        content = there.read_bytes()
        return Package(there, len(content), hashlib.sha256(content).hexdigest())
    return build(folder, architecture=architecture)


def with_authorities(package: Package, ca_file: Path, into: Path) -> Package:
    """The package with the authorities of the database's certificate in it, made in the directory `into`."""
    with tempfile.TemporaryDirectory(prefix="package-") as directory:
        zipped = Path(directory) / "package.zip"
        shutil.copyfile(package.file, zipped)
        with zipfile.ZipFile(zipped, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            _add(archive, CA_FILE, ca_file.read_bytes(), mode=0o644)
        return _named(zipped, into, package.file.name.rpartition("-")[0])


def _checkout() -> Path:
    root = checkout()
    if root is None:
        raise StackError("The function can only be packaged in the checkout.")
    return root


def _source(root: Path) -> Path:
    return root / "functions" / "rotate_db_credentials" / "src"


def _install(root: Path, tree: Path, architecture: str | None) -> None:
    """The locked dependencies, checked against their hashes; wheels only."""
    requirements = tree.with_name("requirements.txt")
    _uv(
        root,
        "export",
        "--frozen",
        "--package",
        NAME,
        "--no-dev",
        "--no-emit-workspace",
        "--prune",
        "botocore",
        "--no-header",
        "--no-annotate",
        "--output-file",
        str(requirements),
    )
    target = (
        ["--python", sys.executable]
        if architecture is None
        else ["--python-version", LAMBDA_PYTHON, "--python-platform", LAMBDA_PLATFORMS[architecture]]
    )
    _uv(
        root,
        "pip",
        "install",
        "--target",
        str(tree),
        *target,
        "--only-binary",
        ":all:",
        "--no-deps",
        "--require-hashes",
        "--requirements",
        str(requirements),
    )


def _uv(root: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        [find_uv(), "--quiet", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = "\n".join(f"    {line}" for line in done.stderr.splitlines()[-8:])
        raise StackError(f"The rotation function cannot be packaged. `uv {arguments[0]}` said:\n{said}")


def _zip(tree: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(_packaged(tree)):
            mode = 0o755 if path.suffix == ".so" else 0o644
            _add(archive, path.relative_to(tree).as_posix(), path.read_bytes(), mode)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = (stat.S_IFREG | mode) << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3  # whatever made it: Unix
    archive.writestr(entry, content)


def _packaged(tree: Path) -> Iterator[Path]:
    for path in tree.rglob("*"):
        parts = path.relative_to(tree).parts
        if path.is_file() and not ("__pycache__" in parts or parts[0] == "bin" or path.name in _NOT_PACKAGED):
            yield path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ztdev.functions", description="Package the rotation function for Lambda."
    )
    parser.add_argument("into", type=Path)
    parser.add_argument("--architecture", choices=LAMBDA_PLATFORMS, action="append")
    parser.add_argument("--ca-file", type=Path, help="authorities of the database's certificate (PEM)")
    arguments = parser.parse_args()
    try:
        for architecture in arguments.architecture or LAMBDA_PLATFORMS:
            package = build(arguments.into, architecture=architecture, ca_file=arguments.ca_file)
            print(f"{package.file}  {package.size / 1e6:.1f} MB  sha256 {package.sha256}")
    except (StackError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.ca_file is None:
        print(f"Without --ca-file there is no {CA_FILE} in it: give the stack a RotationCaFile, in a layer.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
