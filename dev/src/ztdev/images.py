"""What docker-compose.yml runs: which images by their content, what is in them, and who says so.

    python -m ztdev.images sbom                      build/sbom: a bill of materials of each image (CycloneDX)
    python -m ztdev.images sign --key cosign.key     build/images.json, and its signature beside it
    python -m ztdev.images verify --key cosign.pub   check both; print what pins each image to its content

An image's id is the digest of its configuration, which names every layer by digest: whoever has the id has
the content. So the signature of one list of ids is one of every image, and needs no registry. With what
`verify` prints in its environment, compose runs ids instead of tags, and SPIRE gives identities to these ids
alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from ztdev.errors import ProgramMissing, StackError
from ztdev.files import replace_file

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / ".tools"
BILLS = ROOT / "build" / "sbom"
LIST = ROOT / "build" / "images.json"
SIGNATURE = LIST.with_name("images.sigstore.json")

_NAMED = re.compile(r"\$\{([A-Z_]+_IMAGE):-([^}]+)\}")


class ImagesRefused(StackError):
    """What is here is not what was signed. The text begins with the reason: ``images_unsigned`` (no list, or
    no signature), ``images_signature`` (another key, or another list), ``images_changed`` (the engine or the
    folder has not what the list names)."""


def images() -> dict[str, str]:
    """The images that run without a profile: the variable in docker-compose.yml for one, and its tag."""
    services: Mapping[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    texts = [service["image"] for service in services.values() if "profiles" not in service]
    found = {match[1]: match[2] for text in texts if (match := _NAMED.fullmatch(text))}
    if len(found) < len(set(texts)):
        raise StackError(f"docker-compose.yml names an image without a variable: {sorted(set(texts))}")
    return found


def bill_of(variable: str) -> Path:
    """Where the bill of materials of an image is."""
    return BILLS / f"{variable.removesuffix('_IMAGE').lower().replace('_', '-')}.cdx.json"


def write_bills(found: Mapping[str, str]) -> None:
    """What each image holds, its Debian packages and Python distributions, as `syft` finds it. `found` are
    the images' ids or tags, by their variables."""
    BILLS.mkdir(parents=True, exist_ok=True)

    def write(variable: str) -> Path:
        write_bill(found[variable], bill_of(variable))
        return bill_of(variable)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bill in pool.map(write, found):
            print(bill.relative_to(ROOT), flush=True)


def write_bill(image: str, bill: Path) -> None:
    """What an image of the engine holds, by its id or tag, into the file `bill`."""
    _run(
        *(tool("syft"), "scan", f"docker:{image}", "--quiet", "--output", f"cyclonedx-json={bill}"),
        SYFT_CHECK_FOR_APP_UPDATE="false",
        SYFT_FILE_METADATA_SELECTION="none",  # packages; which files are in the image its id says
    )


def sign(key: str) -> None:
    """Write down each image's id, with the digest of its bill of materials, and sign that by `key`: a file,
    or what else cosign takes. It asks for the password, or reads COSIGN_PASSWORD."""
    named = images()
    ids = {variable: _id(name) for variable, name in named.items()}
    write_bills(ids)
    listed = {
        variable: {"name": name, "id": ids[variable], "sbom": _digest(bill_of(variable))}
        for variable, name in named.items()
    }
    sign_list(listed, key)
    print(f"{LIST.relative_to(ROOT)}: {len(listed)} images, signed in {SIGNATURE.relative_to(ROOT)}")


def sign_list(listed: Mapping[str, Mapping[str, str]], key: str) -> None:
    """Write `listed` into `LIST`, and its signature by `key` into `SIGNATURE`."""
    SIGNATURE.unlink(missing_ok=True)
    replace_file(LIST, json.dumps({"images": listed}, indent=2).encode() + b"\n", 0o644)
    # No public log: nobody else has to know what is built here.
    offline = ("--use-signing-config=false", "--tlog-upload=false", "--yes")
    command = (tool("cosign"), "sign-blob", "--key", key, *offline, "--bundle", str(SIGNATURE), str(LIST))
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0:  # it asks and tells
        raise StackError(f"{LIST.relative_to(ROOT)} is not signed.")


def verify(key: str) -> dict[str, str]:
    """The id of each image, by its variable, once the list of them has proved to be signed by `key`.

    Raises:
        ImagesRefused: nothing may run.
    """
    if not LIST.is_file() or not SIGNATURE.is_file():
        raise ImagesRefused(
            f"images_unsigned: {LIST} or {SIGNATURE.name} is not there. Whoever has the key makes them: "
            "make sign KEY=cosign.key"
        )
    signed = LIST.read_bytes()
    command = (tool("cosign"), "verify-blob", "--key", key, "--insecure-ignore-tlog=true")
    try:
        _run(*command, "--bundle", str(SIGNATURE), "-", given=signed)
    except StackError as error:
        why = re.search(r"^Error: (.*)", str(error), re.MULTILINE)
        raise ImagesRefused(
            f"images_signature: {LIST} is not signed by {key} ({why[1] if why else error})"
        ) from None
    listed = json.loads(signed)["images"]
    if {variable: image["name"] for variable, image in listed.items()} != images():
        raise ImagesRefused("images_changed: docker-compose.yml names other images than the signed list does")
    for variable, image in listed.items():
        bill = bill_of(variable)
        if not bill.is_file() or _digest(bill) != image["sbom"]:
            raise ImagesRefused(f"images_changed: {bill} is not the bill of materials that was signed")
        try:
            there = _id(image["id"])
        except StackError:
            there = ""
        if there != image["id"]:
            raise ImagesRefused(f"images_changed: the engine has no image {image['id']} ({image['name']})")
    return {variable: image["id"] for variable, image in listed.items()}


def _id(image: str) -> str:
    return _run("docker", "image", "inspect", "--format", "{{.Id}}", image).strip()


def _digest(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def tool(name: str) -> str:
    """The program `name` that `make .tools/NAME/.built` has built."""
    program = TOOLS / name / name
    if not program.is_file():
        raise ProgramMissing(f"{name} is not built yet: make .tools/{name}/.built")
    return str(program)


def _run(*command: str, given: bytes | None = None, **environment: str) -> str:
    try:
        done = subprocess.run(
            command, input=given, env=os.environ | environment, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise ProgramMissing(f"{command[0]} is not there.") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise StackError(f"{Path(command[0]).name} {command[1]}: {said}")
    return done.stdout.decode()


def main() -> int:
    """Run the command that is named."""
    parser = argparse.ArgumentParser(
        prog="python -m ztdev.images", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sbom", help="write a bill of materials of each image into build/sbom")
    for name, text in (
        ("sign", "write the list of images, and sign it"),
        ("verify", "check it, and print it"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--key", required=True, help="of cosign: a file, or the address of a key service"
        )
    arguments = parser.parse_args()
    try:
        if arguments.command == "sbom":
            write_bills(images())
        elif arguments.command == "sign":
            sign(arguments.key)
        else:
            print(*(f"{variable}={image}" for variable, image in verify(arguments.key).items()), sep="\n")
    except StackError as error:
        print(error, file=sys.stderr)
        return int(error.exit_status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
