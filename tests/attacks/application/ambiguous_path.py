"""A path that a proxy, the policy and the router may read differently."""

from __future__ import annotations

import uuid

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    key = uuid.uuid4().hex
    hidden = {"path": f"/payments%2fby-key%2f{key}"}
    return await lab.attack(target, charge(key=key), hidden, svid=lab.svid("orders"))


ATTACK = Attack(
    id="ambiguous-path",
    title="Path with two meanings",
    story="A request hides its slashes, so that a filter in between sees another path than payments does.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("one-meaning-paths", "ambiguous_path", {"event": "request"}),),
)
