"""A request that says in two ways where it ends (request smuggling)."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

#: The parser that lets such a request through; the other one refuses it by itself.
PARSER = {"HTTP": "h11"}


async def attempt(lab: Lab, target: Target) -> Answer:
    """Who goes by the length takes the last bytes for a second request."""
    request = charge()
    body = request["body"]
    lines = [
        "POST /payments HTTP/1.1",
        "Host: payments",
        *(f"{name}: {value}" for name, value in request["headers"]),
        "Content-Length: 4",
        "Transfer-Encoding: chunked",
    ]
    raw = "\r\n".join([*lines, "", f"{len(body):x}", body, "0", "", ""])
    return await lab.attack(target, {"raw": raw, "method": "POST"}, svid=lab.svid("orders"))


ATTACK = Attack(
    id="smuggled-request",
    title="Smuggled request",
    story="A request ends in one place for a proxy and in another for payments; what is in between slips by.",
    target="payments",
    against=lambda lab: lab.variant(None, "payments", PARSER),
    without=lambda lab: lab.variant("one-end", "payments", PARSER),
    rightful=rightful_charge,
    attempt=attempt,
    first=Layer("one-end", "malformed_request", {"event": "request"}),
)
