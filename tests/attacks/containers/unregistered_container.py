"""A container that nobody registered, at the agent's socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.attacks.containers.container_lab import ContainerLab
from tests.attacks.lab import Answer, Attack, Layer, LeftOut, Target

#: The same program as on one machine.
CLIENT = (Path(__file__).parents[1] / "agent_client.py").read_text()


async def rightful(lab: ContainerLab, target: Target) -> Answer:
    """The service's own container has its identity: it serves."""
    state = (await lab.container("payments"))["State"]["Health"]["Status"]
    return Answer(status=200 if state == "healthy" else 503, body=state)


async def attempt(lab: ContainerLab, target: Target) -> Answer:
    """The very image of payments, on the same engine."""
    errand = {"socket": "unix:///run/spire/agent.sock"}
    return await lab.run(CLIENT, errand, target.place, "zt-demo/payments:local")


@contextlib.asynccontextmanager
async def door(lab: ContainerLab, left_out: LeftOut) -> AsyncIterator[Target]:
    """Started by hand, held as payments is; with something left out, with the label that tells a container of
    the service from any other one of its image."""
    label = ("--label", "com.docker.compose.oneoff=False") if left_out else ()
    place = (*await lab.held_as("payments"), *label)
    yield Target("spire-agent", 0, partial(_refusals, lab), tells_reason=False, place=place)


def _refusals(lab: ContainerLab) -> list[dict[str, Any]]:
    """What the agent wrote about whom it refused."""
    text = lab.project.compose("logs", "--no-color", "--no-log-prefix", "spire-agent")
    return [
        {"decision": "deny", "message": "No identity issued"}
        for line in text.splitlines()
        if "No identity issued" in line
    ]


ATTACK = Attack(
    id="unregistered-container",
    title="Unregistered container",
    story="Somebody starts payments' image by hand, beside the real one, to be payments.",
    target="identity",
    door=door,
    rightful=rightful,
    attempt=attempt,
    layers=(
        Layer(
            "container-attestation",
            "PERMISSION_DENIED",
            {"message": "No identity issued"},
            told="no identity issued",
        ),
    ),
)
