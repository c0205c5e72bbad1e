"""A process that nobody registered, at payments' Workload API socket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from tests.attacks.deeds import ask_workload_api
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target

WORKLOAD = "payments"


async def rightful(lab: Lab, target: Target) -> Answer:
    """One that was registered gets it."""
    return await ask_workload_api(lab, WORKLOAD, registered_as=WORKLOAD)


async def attempt(lab: Lab, target: Target) -> Answer:
    return await ask_workload_api(lab, WORKLOAD)


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With something left out, the identity is given to every process of this user, as a `unix:uid` selector
    alone would."""
    workload = lab.stack.workload_api.workloads[WORKLOAD]
    if left_out:
        workload.allow(uid=os.getuid())
    try:
        yield lab.target("identity")
    finally:
        if left_out:
            await workload.disallow(uid=os.getuid())


ATTACK = Attack(
    id="unregistered-process",
    title="Unregistered process at the Workload API",
    story="A process on the same machine, of the same user, asks payments' socket for payments' identity.",
    target="identity",
    rightful=rightful,
    attempt=attempt,
    door=door,
    layers=(
        Layer("process-attestation", "PERMISSION_DENIED", {"event": "attestation", "workload": WORKLOAD}),
    ),
)
