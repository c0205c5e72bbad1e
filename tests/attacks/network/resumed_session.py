"""A TLS session that is taken up again after its SVID has run out."""

from __future__ import annotations

from tests.attacks.deeds import STATUS, charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """Two connections: the second one offers the session of the first instead of a certificate that holds.

    A session belongs to one identity of payments: where that was replaced in between it says nothing, and all
    is done again.
    """
    while True:
        mark = len(target.lines())
        svid = lab.svid("orders", ttl=2.0)
        late = charge() | {"not_before": svid.not_after.timestamp() + 0.05, "resume": True}
        answer = await lab.attack(target, STATUS, late, svid=svid)
        if not answer.refused:
            return answer
        first = await target.find(mark, event="request", decision="allow")
        second = await target.find(mark, event="handshake", decision="deny")
        if first["generation"] == second["generation"]:
            return answer


ATTACK = Attack(
    id="resumed-session",
    title="Resumed TLS session",
    story="The attacker had orders' SVID for two seconds, kept the TLS session, and takes it up again later: "
    "no certificate is looked at then.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(
        Layer("no-session-tickets", "expired", {"event": "handshake"}),
        Layer("no-resumption", "session_resumed", {"event": "handshake"}),
        Layer("peer-verification", "expired", {"event": "handshake"}),
    ),
)
