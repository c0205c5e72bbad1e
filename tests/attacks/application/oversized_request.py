"""A request that is larger than any should be."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """Once with its length, and once in chunks, which don't tell it. Succeeds when one of them is taken."""
    request, svid = charge(), lab.svid("orders")
    body = request["body"] + " " * (2 << 20)
    lines = [
        "POST /payments HTTP/1.1",
        "Host: payments",
        *(f"{name}: {value}" for name, value in request["headers"]),
        "Transfer-Encoding: chunked",
    ]
    chunked = "\r\n".join([*lines, "", f"{len(body):x}", body, "0", "", ""])
    answers = [
        await lab.attack(target, each, svid=svid)
        for each in (request | {"body": body}, {"raw": chunked, "method": "POST"})
    ]
    return next((answer for answer in answers if not answer.refused), answers[-1])


ATTACK = Attack(
    id="oversized-request",
    title="Oversized request",
    story="Orders was broken into, and sends payments a charge of two megabytes to use up its memory.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("body-limit", "too_large", {"event": "request"}),),
)
