"""Doors of the attacks on the cloud: the stand-in as it is, another one that is weak, and wider permissions.

What is changed in the stand-in that the stack uses is put back, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.attacks.lab import Lab, LeftOut, Target
from ztdev.aws.cloud import LocalCloud

Document = dict[str, Any]


@contextlib.asynccontextmanager
async def stand_in(lab: Lab, left_out: LeftOut) -> AsyncIterator[Target]:
    """The stand-in; with something left out, another one without it."""
    if not left_out:
        yield lab.target("cloud")
        return
    (control,) = left_out
    async with lab.weak_cloud(control) as (_, target):
        yield target


@contextlib.asynccontextmanager
async def wider_trust(cloud: LocalCloud, role: str, claim: str) -> AsyncIterator[None]:
    """The trust policy of `role` does not look at `claim` (``sub``, ``aud``) of a token."""
    iam = cloud.admin_client("iam")

    def drop(document: Document) -> None:
        condition = document["Statement"][0]["Condition"]["StringEquals"]
        del condition[next(name for name in condition if name.endswith(f":{claim}"))]

    def read() -> Document:
        found: Document = iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]
        return found

    def write(document: Document) -> None:
        iam.update_assume_role_policy(RoleName=role, PolicyDocument=json.dumps(document))

    async with _changed(read, write, drop):
        yield


@contextlib.asynccontextmanager
async def wider_permissions(
    cloud: LocalCloud, role: str, policy: str, *changes: Callable[[Document], None]
) -> AsyncIterator[None]:
    """The inline policy `policy` of `role`, with `changes` made to it."""
    iam = cloud.admin_client("iam")

    def read() -> Document:
        found: Document = iam.get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
        return found

    def write(document: Document) -> None:
        iam.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=json.dumps(document))

    async with _changed(read, write, *changes):
        yield


@contextlib.asynccontextmanager
async def _changed(
    read: Callable[[], Document], write: Callable[[Document], None], *changes: Callable[[Document], None]
) -> AsyncIterator[None]:
    document = await asyncio.to_thread(read)
    changed: Document = json.loads(json.dumps(document))
    for change in changes:
        change(changed)
    try:
        await asyncio.to_thread(write, changed)
        yield
    finally:
        await asyncio.to_thread(write, document)
