"""A form that another site sends in a person's name (CSRF)."""

from __future__ import annotations

from urllib.parse import urlencode

from tests.attacks.lab import Answer, Attack, Lab, Layer, Target
from ztdev.shop import order_form


async def rightful(lab: Lab, target: Target) -> Answer:
    page = await lab.attack(target, {"path": "/"}, tls=False)
    form = order_form(page.body)
    assert form is not None
    cookie = page.headers["set-cookie"].partition(";")[0]
    return await _send(lab, target, form.fields, f"http://127.0.0.1:{target.port}", [("Cookie", cookie)])


async def attempt(lab: Lab, target: Target) -> Answer:
    """The victim's browser adds its cookie; the token in the form is the attacker's own."""
    page = await lab.attack(target, {"path": "/"}, tls=False)
    form = order_form(page.body)
    assert form is not None
    victims = "zt-form=" + "v" * 43
    return await _send(lab, target, form.fields, "https://evil.example", [("Cookie", victims)])


async def _send(
    lab: Lab, target: Target, fields: dict[str, str], origin: str, headers: list[tuple[str, str]]
) -> Answer:
    first = next(name for name in fields if name.startswith("quantity."))
    request = {
        "method": "POST",
        "path": "/orders",
        "headers": [
            ("Host", f"127.0.0.1:{target.port}"),
            ("Origin", origin),
            ("Accept", "application/problem+json"),
            ("Content-Type", "application/x-www-form-urlencoded"),
            *headers,
        ],
        "body": urlencode(fields | {first: "1"}),
    }
    return await lab.attack(target, request, tls=False)


ATTACK = Attack(
    id="cross-site-form",
    title="Cross-site request forgery",
    story="A person who shops here opens the attacker's page, which sends our order form by itself.",
    target="frontend",
    rightful=rightful,
    attempt=attempt,
    first=Layer("form-origin", "csrf_failed", {"event": "form"}),
)
