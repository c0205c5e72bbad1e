"""A token that was made for another audience."""

from __future__ import annotations

from tests.attacks.deeds import TAKE_ROLE, read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    """A real token of orders, made for the Kubernetes API."""
    token = lab.stack.issuer.token("zt-demo", "orders", audience="https://kubernetes.default.svc")
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


ATTACK = Attack(
    id="other-audience-token",
    title="Web identity for somebody else",
    story="Orders showed a token to another service, which now takes orders' role in AWS with it.",
    target="cloud",
    rightful=read_own_secret,
    attempt=attempt,
    without=lambda lab: lab.weak_cloud("token-audience"),
    first=Layer("token-audience", "InvalidIdentityToken", TAKE_ROLE, told="Incorrect token audience"),
    second=Layer("role-trust", "AccessDenied", TAKE_ROLE),
)
