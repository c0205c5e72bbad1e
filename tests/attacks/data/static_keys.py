"""An access key of AWS that does not run out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator

from tests.attacks.controls import ROOT
from tests.attacks.deeds import read_own_secret, read_secret
from tests.attacks.lab import Answer, Attack, Lab, Layer, LeftOut, Target

USER, POLICY = "zt-demo-orders-deploy", "read-the-secret"
SECRET = "zt-demo/orders/db"
TEMPLATE = ROOT / "infra" / "workload.yaml"

#: Who set the account up; on AWS that is a person of the account, with a session that runs out.
ADMINISTRATORS = {"stand-in-administrator"}

#: As somebody would find one in a repository: well-formed, and worth nothing, since there is no such user.
FOUND = {"AccessKeyId": "AKIAQ3EGFOUNDINAREPO", "SecretAccessKey": "x" * 40}


async def attempt(lab: Lab, target: Target) -> Answer:
    """With a key of each user that there is; with one that was found, where there is none."""
    if made := re.findall(r"AWS::IAM::(?:User|AccessKey)\b", TEMPLATE.read_text()):
        return Answer(status=200, body=f"the template makes {made}")
    answer = await read_secret(lab, target, "orders", SECRET, keys=FOUND)
    for keys in await asyncio.to_thread(_keys_of_all_users, lab):
        answer = await read_secret(lab, target, "orders", SECRET, keys=keys)
        if not answer.refused:
            break
    return answer


def _keys_of_all_users(lab: Lab) -> list[dict[str, str]]:
    """A key for each user but the administrators, as whoever has taken over the account's pipeline makes."""
    iam = lab.stack.cloud.admin_client("iam")
    users = {
        user["UserName"] for page in iam.get_paginator("list_users").paginate() for user in page["Users"]
    }
    made = [iam.create_access_key(UserName=user)["AccessKey"] for user in sorted(users - ADMINISTRATORS)]
    return [{name: key[name] for name in FOUND} for key in made]


@contextlib.asynccontextmanager
async def door(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """With something left out, there is a user for the service, as many have, whose key never runs out."""
    iam = lab.stack.cloud.admin_client("iam")
    statement = {"Effect": "Allow", "Action": ["secretsmanager:*", "kms:Decrypt"], "Resource": "*"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})

    def make() -> None:
        iam.create_user(UserName=USER)
        iam.put_user_policy(UserName=USER, PolicyName=POLICY, PolicyDocument=document)

    def remove() -> None:
        with contextlib.suppress(iam.exceptions.NoSuchEntityException):
            for key in iam.list_access_keys(UserName=USER)["AccessKeyMetadata"]:
                iam.delete_access_key(UserName=USER, AccessKeyId=key["AccessKeyId"])
            with contextlib.suppress(iam.exceptions.NoSuchEntityException):
                iam.delete_user_policy(UserName=USER, PolicyName=POLICY)
            iam.delete_user(UserName=USER)

    try:
        if left_out:
            await asyncio.to_thread(make)
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
    door=door,
    layers=(Layer("no-static-keys", "UnrecognizedClientException", {"event": "cloud"}),),
)
