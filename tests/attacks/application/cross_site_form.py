"""A form that another site sends in a person's name (CSRF)."""

from __future__ import annotations

from tests.attacks.deeds import fill_in
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    return await fill_in(lab, target, "1")


async def attempt(lab: Lab, target: Target) -> Answer:
    """The victim's browser adds its cookie; the token in the form is the attacker's own."""
    return await fill_in(lab, target, "1", origin="https://evil.example", cookie="zt-form=" + "v" * 43)


ATTACK = Attack(
    id="cross-site-form",
    title="Cross-site request forgery",
    story="A person who shops here opens the attacker's page, which sends our order form by itself.",
    target="frontend",
    rightful=rightful,
    attempt=attempt,
    first=Layer("form-origin", "csrf_failed", {"event": "form"}),
)
