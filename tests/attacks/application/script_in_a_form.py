"""A script where the page shows again what a person typed (cross-site scripting)."""

from __future__ import annotations

from dataclasses import replace

from tests.attacks.deeds import fill_in
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

#: A script of its own, and one of the field that holds what was typed, should only the quotes get through.
SCRIPT, HANDLER = "<script>alert(1)</script>", '" autofocus onfocus="alert(1)'


async def rightful(lab: Lab, target: Target) -> Answer:
    """What is typed by mistake is shown again, to be corrected."""
    answer = await fill_in(lab, target, "many")
    return replace(answer, status=200 if 'value="many"' in answer.body else 500)


async def attempt(lab: Lab, target: Target) -> Answer:
    """Succeeds when the page holds a script, and nothing keeps the browser from running it."""
    answer = await fill_in(lab, target, f'{HANDLER}">{SCRIPT}')
    if SCRIPT not in answer.body and HANDLER not in answer.body:
        return replace(answer, reason="invalid_request", body="")
    policy = answer.headers.get("content-security-policy", "")
    if "script-src 'self'" in policy.split("; "):
        return Answer(
            reason="content_security_policy", error="the page's policy runs no script that is in it"
        )
    return replace(answer, status=200)


ATTACK = Attack(
    id="script-in-a-form",
    title="Cross-site scripting",
    story="A script is typed into the order form, which shows it again and says that it is no number.",
    target="frontend",
    rightful=rightful,
    attempt=attempt,
    layers=(
        Layer("escaping", "invalid_request", {"event": "form"}),
        Layer("content-policy", "content_security_policy", None),
    ),
)
