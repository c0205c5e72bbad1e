"""The right name, vouched for by nobody we trust."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from cryptography.hazmat.primitives.serialization import Encoding

from tests.attacks.deeds import charge, rightful_charge
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target
from ztdev.options import TRUST_DOMAIN, spiffe_id
from ztmtls.testing import CertificateAuthority

IMITATION = CertificateAuthority(TRUST_DOMAIN)


async def attempt(lab: Lab, target: Target) -> Answer:
    return await lab.attack(target, charge(), svid=IMITATION.issue(spiffe_id("orders")))


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With something left out, OpenSSL is content with the stranger's authority, too."""
    if not left_out:
        yield lab.target("payments")
        return
    authority = IMITATION.active.certificate.public_bytes(Encoding.PEM).decode()
    async with lab.variant(left_out, "payments", {"TOO_MUCH_TRUST": authority}) as target:
        yield target


ATTACK = Attack(
    id="strangers-authority",
    title="Stranger's authority",
    story="The attacker runs an authority of the same name, and makes itself a certificate of orders.",
    target="payments",
    rightful=rightful_charge,
    attempt=attempt,
    door=door,
    layers=(
        Layer("trusted-authorities", "untrusted_authority", {"event": "handshake"}),
        Layer(
            "peer-verification",
            "untrusted_authority",
            {"detail": f"no valid path from {spiffe_id('orders')} to an authority of {TRUST_DOMAIN}"},
        ),
    ),
)
