"""Stacks deployed into the stand-in for AWS: made, left alone, changed, refused, resumed and deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ztdev.aws.cloud import LocalCloud
from ztdev.aws.stacks import Stack, StackFailed

from .clouds import cloud_alone

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

SECRET = """
Parameters:
  Text: {Type: String, Default: a description}
Resources:
  Key:
    Type: AWS::KMS::Key
    Properties: {Description: !Ref Text}
  Secret:
    Type: AWS::SecretsManager::Secret
    Properties: {Name: deployed/secret, Description: !Ref Text, SecretString: x}
Outputs:
  Arn: {Value: !GetAtt Secret.Id}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cloud(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCloud]:
    async with cloud_alone(tmp_path_factory.mktemp("aws")) as cloud:
        yield cloud


class Told:
    """A stack, and what was said of it."""

    def __init__(self, cloud: LocalCloud, name: str, folder: Path) -> None:
        self.said: list[str] = []
        self.client = cloud.admin_client("cloudformation")
        self.stack = Stack(self.client, name, self.said.append, every=0.05)
        self._template = folder / "template.yaml"

    async def deploy(self, template: str = SECRET, **parameters: str) -> dict[str, str]:
        self._template.write_text(template)
        return await asyncio.to_thread(self.stack.deploy, self._template, parameters, {"project": "zt-demo"})

    async def delete(self) -> None:
        await asyncio.to_thread(self.stack.delete)


@pytest_asyncio.fixture(loop_scope="module")
async def told(cloud: LocalCloud, tmp_path: Path, request: Any) -> AsyncIterator[Told]:
    told = Told(cloud, request.node.name.replace("_", "-"), tmp_path)
    yield told
    await told.delete()


async def test_a_stack_is_made_and_its_outputs_are_given(told: Told) -> None:
    outputs = await told.deploy()
    assert outputs["Arn"].startswith("arn:aws:secretsmanager:")
    assert told.stack.status() == "CREATE_COMPLETE"
    assert any("Secret create complete" in line for line in told.said)


async def test_what_is_as_it_should_be_is_left_alone(told: Told) -> None:
    outputs = await told.deploy()
    told.said.clear()
    assert await told.deploy() == outputs
    assert told.said == [f"{told.stack.name}: nothing to change"]


async def test_a_change_is_made_in_place(told: Told, cloud: LocalCloud) -> None:
    outputs = await told.deploy()
    assert await told.deploy(Text="another") == outputs
    secret = cloud.admin_client("secretsmanager").describe_secret(SecretId=outputs["Arn"])
    assert secret["Description"] == "another"


async def test_what_is_refused_says_why_and_what_there_was_stays(told: Told) -> None:
    outputs = await told.deploy()
    with pytest.raises(StackFailed, match="SuchThing"):
        await told.deploy(SECRET.replace("AWS::KMS::Key", "AWS::No::SuchThing"))
    assert told.stack.outputs() == outputs


async def test_a_stack_that_was_never_made_is_made_the_next_time(told: Told) -> None:
    """The first attempt ends in the middle; the next one needs nobody to clear up."""
    with pytest.raises(StackFailed):
        await told.deploy(SECRET.replace("AWS::KMS::Key", "AWS::No::SuchThing"))
    assert (await told.deploy())["Arn"]


async def test_what_is_not_there_is_deleted_already(told: Told) -> None:
    await told.delete()
    await told.deploy()
    await told.delete()
    assert told.stack.status() is None
    await told.delete()


async def test_what_takes_too_long_counts_as_failed(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await told.deploy())["Arn"]
    patient = Stack(told.client, told.stack.name, every=0.01, within=0.05)
    monkeypatch.setattr(patient, "status", lambda: "UPDATE_IN_PROGRESS")
    with pytest.raises(StackFailed, match="UPDATE_IN_PROGRESS"):
        await asyncio.wait_for(asyncio.to_thread(patient.delete), 10)
