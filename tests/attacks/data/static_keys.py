"""An access key of AWS that does not run out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from tests.attacks.deeds import read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, Target

USER, POLICY = "zt-demo-orders-deploy", "read-the-secret"
SECRET = "zt-demo/orders/db"

#: As somebody would find one in a repository: well-formed, and worth nothing, since there is no such user.
FOUND = {"AccessKeyId": "AKIAQ3EGFOUNDINAREPO", "SecretAccessKey": "x" * 40}


async def attempt(lab: Lab, target: Target) -> Answer:
    keys = await asyncio.to_thread(_existing_key, lab) or FOUND
    return await read_secret(lab, target, "orders", SECRET, keys=keys)


def _existing_key(lab: Lab) -> dict[str, str] | None:
    iam = lab.stack.cloud.admin_client("iam")
    if USER not in [user["UserName"] for user in iam.list_users()["Users"]]:
        return None
    made = iam.create_access_key(UserName=USER)["AccessKey"]
    return {name: made[name] for name in FOUND}


@contextlib.asynccontextmanager
async def without(lab: Lab) -> AsyncIterator[Target]:
    """The template has a user for the service, as many have, whose key never runs out."""
    iam = lab.stack.cloud.admin_client("iam")
    statement = {"Effect": "Allow", "Action": ["secretsmanager:*", "kms:Decrypt"], "Resource": "*"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})

    def make() -> None:
        iam.create_user(UserName=USER)
        iam.put_user_policy(UserName=USER, PolicyName=POLICY, PolicyDocument=document)

    def remove() -> None:
        for key in iam.list_access_keys(UserName=USER)["AccessKeyMetadata"]:
            iam.delete_access_key(UserName=USER, AccessKeyId=key["AccessKeyId"])
        iam.delete_user_policy(UserName=USER, PolicyName=POLICY)
        iam.delete_user(UserName=USER)

    await asyncio.to_thread(make)
    try:
        yield lab.target("cloud")
    finally:
        await asyncio.to_thread(remove)


ATTACK = Attack(
    id="static-keys",
    title="Static AWS keys",
    story="An access key of orders' cloud account, found in an old commit, reads orders' database password.",
    target="cloud",
    rightful=read_own_secret,
    attempt=attempt,
    without=without,
    first=Layer("no-static-keys", "UnrecognizedClientException", {"event": "cloud"}),
)
