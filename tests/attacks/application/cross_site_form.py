"""A form that another site sends in a person's name (CSRF)."""

from __future__ import annotations

from tests.attacks.deeds import fill_in
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def rightful(lab: Lab, target: Target) -> Answer:
    return await fill_in(lab, target, "1")


#: Each has one thing wrong only: the page it was sent from, the cookie, the token in the form.
WRONG: tuple[dict[str, str], ...] = (
    {"origin": "https://evil.example"},
    {"cookie": ""},
    {"cookie": "zt-form=" + "v" * 43},
    {"token": "0" * 64},
)


async def attempt(lab: Lab, target: Target) -> Answer:
    """The victim's browser sends what the attacker's page made. Succeeds when one of them is taken."""
    answers = [await fill_in(lab, target, "1", **wrong) for wrong in WRONG]
    return next((answer for answer in answers if not answer.refused), answers[-1])


ATTACK = Attack(
    id="cross-site-form",
    title="Cross-site request forgery",
    story="A person who shops here opens the attacker's page, which sends our order form by itself.",
    target="frontend",
    rightful=rightful,
    attempt=attempt,
    layers=(Layer("form-origin", "csrf_failed", {"event": "form"}),),
)
