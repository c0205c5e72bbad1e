"""A request that says in two ways where it ends (request smuggling)."""

from __future__ import annotations

import uuid
from typing import Any

from tests.attacks.deeds import booked, charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

#: The parser that lets such a request through; the other one refuses it by itself.
PARSER = {"HTTP": "h11"}


#: One request to nobody's path, which ends at once for who reads the chunks, and much later for who counts.
OUTER = "POST /nothing HTTP/1.1", "Host: payments", "Transfer-Encoding: chunked"


async def attempt(lab: Lab, target: Target) -> Answer:
    """In what the one takes for a body, the other finds a charge. Succeeds when that is booked."""
    order = uuid.uuid4()
    body = "0\r\n\r\n" + request_text(charge(order=order))
    raw = "\r\n".join([*OUTER, f"Content-Length: {len(body)}", "", body])
    requests = {"raw": raw, "method": "POST"}, {"raw": "", "method": "POST"}  # and wait for a second answer
    answer = await lab.attack(target, *requests, svid=lab.svid("orders"))
    if not answer.refused or await booked(lab, str(order)):
        return Answer(status=201, body="the charge in the body is booked")
    return answer


def request_text(request: dict[str, Any]) -> str:
    """The bytes of a request, as text."""
    headers = [("Host", "payments"), *request["headers"], ("Content-Length", len(request["body"]))]
    fields = [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([f"POST {request['path']} HTTP/1.1", *fields, "", request["body"]])


ATTACK = Attack(
    id="smuggled-request",
    title="Smuggled request",
    story="A request ends in one place for a proxy and in another for payments; what is in between slips by.",
    target="payments",
    door=lambda lab, left_out: lab.variant(left_out, "payments", PARSER),
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("one-end", "malformed_request", {"event": "request"}),),
)
