"""Our page in a frame of somebody else's (clickjacking)."""

from __future__ import annotations

from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    """A person opens the page."""
    return await _ask(lab, target, "document")


async def attempt(lab: Lab, target: Target) -> Answer:
    """A browser asks for it to be shown in a frame. Succeeds when nothing keeps the browser from that."""
    answer = await _ask(lab, target, "iframe")
    if not answer.refused and "frame-ancestors 'none'" in answer.headers.get("content-security-policy", ""):
        return Answer(reason="content_security_policy", error="the page's policy lets nobody frame it")
    return answer


async def _ask(lab: Lab, target: Target, destination: str) -> Answer:
    headers = [
        ("Host", f"127.0.0.1:{target.port}"),
        ("Sec-Fetch-Dest", destination),
        ("Accept", "application/problem+json" if destination == "iframe" else "text/html"),
    ]
    return await lab.attack(target, {"path": "/", "headers": headers}, tls=False)


ATTACK = Attack(
    id="framed-page",
    title="Clickjacking",
    story="The attacker's page shows ours in a frame that nobody sees, under a button that all press.",
    target="frontend",
    rightful=rightful,
    attempt=attempt,
    layers=(
        Layer("no-framing", "framing_refused", {"event": "door"}),
        Layer("content-policy", "content_security_policy", None),
    ),
)
