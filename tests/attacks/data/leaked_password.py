"""A search for passwords and tokens in logs, files, command lines and environments."""

from __future__ import annotations

import asyncio
from itertools import chain

from tests.attacks.lab import Answer, Attack, Lab, Layer, NotProved, Target
from tests.attacks.searches import files_of, processes_of, search, shared_files
from ztdev.options import DATABASE_SERVICES

#: Looks for a new version of the secret every second.
EAGER = {"DB_SECRET_MAX_AGE_SECONDS": "1"}
CANARY = b"a password that was written down"


async def rightful(lab: Lab, target: Target) -> Answer:
    """The search finds what is there."""
    planted = lab.stack.state.logs / "canary.log"
    planted.write_bytes(b"connecting with " + CANARY)
    try:
        return search(files_of(lab, target), [CANARY])
    finally:
        planted.unlink()


async def attempt(lab: Lab, target: Target) -> Answer:
    """The passwords before and after a rotation, which payments takes up now."""
    passwords = await _passwords(lab)
    mark = len(target.lines())
    await lab.stack.rotations.rotate("payments")
    await target.find(mark, timeout=20.0, event="credentials", decision="allow")
    passwords |= await _passwords(lab)
    held = lab.stack.state.path / "tokens"  # where they belong, readable by nobody else
    tokens = {file.read_bytes().strip() for file in held.rglob("*") if file.is_file()}
    if len(passwords) < 5 or len(tokens) < 2:
        raise NotProved(f"{len(passwords)} passwords and {len(tokens)} tokens to look for: some are missing")
    places = (place for place in files_of(lab, target) if held not in place.parents)
    everywhere = chain(places, shared_files(), processes_of(lab))
    return await asyncio.to_thread(search, everywhere, passwords | tokens)


async def _passwords(lab: Lab) -> set[bytes]:
    names = [f"zt-demo/{service}/{which}" for service in DATABASE_SERVICES for which in ("db", "db-owner")]
    values = [await lab.stack.cloud.secret_value(name) for name in names]
    return {str(value["password"]).encode() for value in values}


ATTACK = Attack(
    id="leaked-password",
    title="Password in the logs",
    story="Somebody who may read logs and process lists looks for database passwords and tokens in them.",
    target="payments",
    door=lambda lab, left_out: lab.variant(left_out, "payments", EAGER),
    rightful=rightful,
    attempt=attempt,
    layers=(
        Layer("silent-logs", "nothing_found", {"event": "credentials", "decision": "allow", "reason": None}),
    ),
)
