"""Orders reads the database password of payments."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.attacks.clouds import Document, wider_permissions
from tests.attacks.deeds import read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target

ROLE, POLICY = "zt-demo-orders", "read-own-database-secret"


async def rightful(lab: Lab, target: Target) -> Answer:
    return await read_secret(lab, target, "orders", "zt-demo/orders/db")


async def attempt(lab: Lab, target: Target) -> Answer:
    return await read_secret(lab, target, "orders", "zt-demo/payments/db")


def _every_secret(document: Document) -> None:
    document["Statement"][0]["Resource"] = "*"


def _key_for_every_secret(document: Document) -> None:
    del document["Statement"][1]["Condition"]["StringEquals"]["kms:EncryptionContext:SecretARN"]


WIDER = {"secret-role": _every_secret, "secret-key": _key_for_every_secret}


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """The role of orders may read every secret; and may use the key for every secret."""
    changes = [WIDER[control] for control in left_out]
    async with wider_permissions(lab.stack.cloud, ROLE, POLICY, *changes):
        yield lab.target("cloud")


ATTACK = Attack(
    id="other-services-secret",
    title="Another service's secret",
    story="Orders was broken into, and reads payments' database password with the role that orders has.",
    target="cloud",
    rightful=rightful,
    attempt=attempt,
    door=door,
    layers=(
        Layer("secret-role", "AccessDeniedException", {"event": "cloud", "action": "GetSecretValue"}),
        Layer(
            "secret-key",
            "AccessDeniedException",
            {"event": "cloud", "action": "GetSecretValue", "detail": "Access to KMS is not allowed"},
            told="Access to KMS is not allowed",
        ),
    ),
)
