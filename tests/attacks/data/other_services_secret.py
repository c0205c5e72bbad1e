"""Orders reads the database password of payments."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

from tests.attacks.deeds import read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

ROLE, POLICY = "zt-demo-orders", "read-own-database-secret"


async def rightful(lab: Lab, target: Target) -> Answer:
    return await read_secret(lab, target, "orders", "zt-demo/orders/db")


async def attempt(lab: Lab, target: Target) -> Answer:
    return await read_secret(lab, target, "orders", "zt-demo/payments/db")


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The role of orders may read every secret."""
    iam = lab.stack.cloud.admin_client("iam")
    document = iam.get_role_policy(RoleName=ROLE, PolicyName=POLICY)["PolicyDocument"]
    wider = json.loads(json.dumps(document))
    wider["Statement"][0]["Resource"] = "*"
    iam.put_role_policy(RoleName=ROLE, PolicyName=POLICY, PolicyDocument=json.dumps(wider))
    try:
        yield lab.target("cloud")
    finally:
        iam.put_role_policy(RoleName=ROLE, PolicyName=POLICY, PolicyDocument=json.dumps(document))


ATTACK = Attack(
    id="other-services-secret",
    title="Another service's secret",
    story="Orders was broken into, and reads payments' database password with the role that orders has.",
    target="cloud",
    rightful=rightful,
    attempt=attempt,
    without=without,
    first=Layer("secret-role", "AccessDeniedException", {"event": "cloud", "action": "GetSecretValue"}),
    second=Layer(
        "secret-key",
        "AccessDeniedException",
        {"event": "cloud", "action": "GetSecretValue", "detail": "Access to KMS is not allowed"},
        told="Access to KMS is not allowed",
    ),
)
