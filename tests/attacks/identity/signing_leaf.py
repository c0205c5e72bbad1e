"""A workload's certificate that may sign certificates."""

from __future__ import annotations

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    svid = lab.svid("orders", key_usage={"digital_signature", "key_cert_sign"})
    return await lab.attack(target, charge(), svid=svid)


ATTACK = Attack(
    id="signing-leaf",
    title="Leaf that may sign certificates",
    story="A certificate of orders that may sign others is its own: whoever has it makes more of them.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("peer-verification", "leaf_can_sign_certificates", {"event": "handshake"}),),
)
