"""A search for the private key of an SVID in files."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.attacks.deeds import rightful_status
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target
from tests.attacks.searches import files_of, search, shared_files
from ztmtls.svid import X509Svid

WORKLOAD = "payments"


async def rightful(lab: Lab, target: Target) -> Answer:
    """The search finds what is there."""
    planted = lab.stack.state.home / "canary.pem"
    svid = lab.stack.workload_api.workloads[WORKLOAD].svid
    planted.write_bytes(svid.pem())
    try:
        return search(files_of(lab, target), _forms(svid))
    finally:
        planted.unlink()


async def attempt(lab: Lab, target: Target) -> Answer:
    """The key before a rotation and the one after it, in every file that payments could have written."""
    workload = lab.stack.workload_api.workloads[WORKLOAD]
    before = workload.svid
    after = workload.rotate()
    await _taken_up(lab, target, after)
    places = chain(files_of(lab, target), shared_files(), _open_files(lab))
    return await asyncio.to_thread(search, places, [*_forms(before), *_forms(after)])


async def _taken_up(lab: Lab, target: Target, svid: X509Svid) -> None:
    """Call until `target` presents `svid`, as its own line says: then it has loaded the key."""
    async with asyncio.timeout(20.0):
        while not any(line.get("own_serial") == svid.serial for line in target.lines()):
            await rightful_status(lab, target)


def _forms(svid: X509Svid) -> list[bytes]:
    """How a key could be written down: PEM in both usual forms, DER, and the number itself."""
    key = svid.key
    assert isinstance(key, EllipticCurvePrivateKey)
    number = key.private_numbers().private_value.to_bytes(32, "big")
    pems = [
        key.private_bytes(Encoding.PEM, form, NoEncryption()).splitlines()[1]
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL)
    ]
    return [number, *pems]


def _open_files(lab: Lab) -> Iterator[Path]:
    """What the service has open that is a file of a disk."""
    folder = Path(f"/proc/{lab.stack.process(WORKLOAD).pid}/fd")
    for descriptor in folder.iterdir():
        try:
            if os.readlink(descriptor).startswith("/") and descriptor.is_file():
                yield descriptor
        except FileNotFoundError:  # closed meanwhile
            continue


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With something left out, the key goes by way of a file that stays, as with most libraries."""
    if not left_out:
        yield lab.target(WORKLOAD)
        return
    try:
        async with lab.variant(left_out, WORKLOAD) as target:
            yield target
    finally:
        for file in lab.stack.state.home.glob("*.pem"):
            file.unlink()


ATTACK = Attack(
    id="key-on-disk",
    title="Private key on a disk",
    story="Somebody with a copy of the disk looks for the private key of payments' SVID.",
    target="payments",
    rightful=rightful,
    attempt=attempt,
    door=door,
    layers=(
        Layer("keys-in-memory", "nothing_found", {"event": "request", "decision": "allow", "reason": None}),
    ),
)
