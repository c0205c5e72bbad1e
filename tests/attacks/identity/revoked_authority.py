"""A stolen SVID, after the authority that signed it was revoked."""

from __future__ import annotations

import asyncio

from tests.attacks.deeds import STATUS, charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target


async def attempt(lab: Lab, target: Target) -> Answer:
    stolen = lab.svid("orders")
    lab.stack.ca.revoke()
    payments = lab.target("payments")
    async with asyncio.timeout(10.0):
        # The news travels: payments knows when it accepts what the new authority has signed.
        while (await lab.attack(payments, STATUS, svid=lab.svid("orders"))).refused:
            await asyncio.sleep(0.05)
    return await lab.attack(target, charge(), svid=stolen)


ATTACK = Attack(
    id="revoked-authority",
    title="Stolen SVID of a revoked authority",
    story="Orders' SVID was stolen; the authority that signed it is revoked, and the thief uses what he has.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    layers=(Layer("authority-withdrawal", "untrusted_authority", {"event": "handshake"}),),
)
