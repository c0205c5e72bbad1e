"""A registered process, at the Workload API socket of another workload."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from tests.attacks.deeds import ask_workload_api
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target

OWN, OTHER = "orders", "payments"


async def rightful(lab: Lab, target: Target) -> Answer:
    """It gets the identity that it was registered for."""
    return await ask_workload_api(lab, OWN, registered_as=OWN)


async def attempt(lab: Lab, target: Target) -> Answer:
    """A process that is registered as orders asks the socket of payments."""
    return await ask_workload_api(lab, OTHER, registered_as=OWN)


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With something left out, the identity is given to every process of this user, as a `unix:uid` selector
    alone would."""
    workload = lab.stack.workload_api.workloads[OTHER]
    if left_out:
        workload.allow(uid=os.getuid())
    try:
        yield lab.target("identity")
    finally:
        if left_out:
            await workload.disallow(uid=os.getuid())


ATTACK = Attack(
    id="other-workloads-socket",
    title="Another workload's identity",
    story="Orders was broken into, reaches payments' Workload API socket, and asks there to be payments.",
    target="identity",
    rightful=rightful,
    attempt=attempt,
    door=door,
    layers=(Layer("process-attestation", "PERMISSION_DENIED", {"event": "attestation", "workload": OTHER}),),
)
