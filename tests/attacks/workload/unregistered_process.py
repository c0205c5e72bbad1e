"""A process that nobody registered, at payments' Workload API socket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

WORKLOAD = "payments"


async def rightful(lab: Lab, target: Target) -> Answer:
    workload = lab.stack.workload_api.workloads[WORKLOAD]
    return await lab.attacker(
        "agent_client.py", {"socket": workload.endpoint}, admit=lambda pid: workload.allow(pid=pid)
    )


async def attempt(lab: Lab, target: Target) -> Answer:
    endpoint = lab.stack.workload_api.workloads[WORKLOAD].endpoint
    return await lab.attacker("agent_client.py", {"socket": endpoint})


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The identity is given to every process of this user, as by a `unix:uid` selector alone."""
    workload = lab.stack.workload_api.workloads[WORKLOAD]
    workload.allow(uid=os.getuid())
    try:
        yield lab.target("identity")
    finally:
        await workload.disallow(uid=os.getuid())


ATTACK = Attack(
    id="unregistered-process",
    title="Unregistered process at the Workload API",
    story="A process on the same machine, of the same user, asks payments' socket for payments' identity.",
    target="identity",
    rightful=rightful,
    attempt=attempt,
    without=without,
    first=Layer("process-attestation", "PERMISSION_DENIED", {"event": "attestation", "workload": WORKLOAD}),
)
