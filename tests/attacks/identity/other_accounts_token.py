"""A web-identity token of another service account."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

from tests.attacks.deeds import TAKE_ROLE, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

ROLE = "zt-demo-orders"


async def rightful(lab: Lab, target: Target) -> Answer:
    return await read_secret(lab, target, "orders", "zt-demo/orders/db")


async def attempt(lab: Lab, target: Target) -> Answer:
    token = lab.stack.issuer.token("zt-demo", "rogue")
    return await read_secret(lab, target, "orders", "zt-demo/orders/db", token=token)


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The trust policy of the role does not look at the subject."""
    iam = lab.stack.cloud.admin_client("iam")
    document = iam.get_role(RoleName=ROLE)["Role"]["AssumeRolePolicyDocument"]
    wider = json.loads(json.dumps(document))
    condition = wider["Statement"][0]["Condition"]["StringEquals"]
    del condition[next(name for name in condition if name.endswith(":sub"))]
    iam.update_assume_role_policy(RoleName=ROLE, PolicyDocument=json.dumps(wider))
    try:
        yield lab.target("cloud")
    finally:
        iam.update_assume_role_policy(RoleName=ROLE, PolicyDocument=json.dumps(document))


ATTACK = Attack(
    id="other-accounts-token",
    title="Web identity of another account",
    story="A pod of the same cluster takes the role of orders with its own service account's token.",
    target="cloud",
    rightful=rightful,
    attempt=attempt,
    without=without,
    first=Layer("role-trust", "AccessDenied", TAKE_ROLE),
)
