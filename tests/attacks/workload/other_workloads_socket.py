"""A registered process, at the Workload API socket of another workload."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

OWN, OTHER = "orders", "payments"


async def rightful(lab: Lab, target: Target) -> Answer:
    """It gets the identity that it was registered for."""
    return await _ask(lab, OWN)


async def attempt(lab: Lab, target: Target) -> Answer:
    return await _ask(lab, OTHER)


async def _ask(lab: Lab, socket: str) -> Answer:
    """A process that is registered as orders asks the socket of a workload."""
    workloads = lab.stack.workload_api.workloads
    admitted: list[int] = []

    def admit(pid: int) -> None:
        workloads[OWN].allow(pid=pid)
        admitted.append(pid)

    try:
        return await lab.attacker("agent_client.py", {"socket": workloads[socket].endpoint}, admit=admit)
    finally:
        for pid in admitted:
            await workloads[OWN].disallow(pid=pid)


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The identity is given to every process of this user."""
    workload = lab.stack.workload_api.workloads[OTHER]
    workload.allow(uid=os.getuid())
    try:
        yield lab.target("identity")
    finally:
        await workload.disallow(uid=os.getuid())


ATTACK = Attack(
    id="other-workloads-socket",
    title="Another workload's identity",
    story="Orders was broken into, reaches payments' Workload API socket, and asks there to be payments.",
    target="identity",
    rightful=rightful,
    attempt=attempt,
    without=without,
    first=Layer("process-attestation", "PERMISSION_DENIED", {"event": "attestation", "workload": OTHER}),
)
