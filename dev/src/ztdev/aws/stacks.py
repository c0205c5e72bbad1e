"""CloudFormation stacks: brought to what a template says, from whatever state they are in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from ztdev.errors import StackError

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient

#: Is called with a line for each thing that happens.
Say = Callable[[str], None]

#: What a stack is in when it can be updated. Another end must be cleared away first, or repaired by hand.
_UPDATABLE = {"CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE"}
#: What never was, or isn't any more: it is deleted, and made anew.
_STILLBORN = {"ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED", "REVIEW_IN_PROGRESS"}

_NO_CHANGES = ("didn't contain changes", "No updates are to be performed", "no changes")


class StackFailed(StackError):
    """A stack was refused, or did not become what its template says. The text holds the reasons given."""


class Stack:
    """One stack, by its name.

    Args:
        client: CloudFormation's, in the account and region meant.
        name: the stack's.
        say: is told what happens to each resource.
        every: seconds between two looks.
        within: seconds that something may take before it counts as failed.
    """

    def __init__(
        self,
        client: CloudFormationClient,
        name: str,
        say: Say = lambda _: None,
        *,
        every: float = 5.0,
        within: float = 3600.0,
    ) -> None:
        self.name = name
        self._client = client
        self._say = say
        self._every = every
        self._within = within

    def status(self) -> str | None:
        """CloudFormation's word for it; None when there is no such stack."""
        found = self._describe()
        return None if found is None else str(found["StackStatus"])

    def outputs(self) -> dict[str, str]:
        """Its outputs, empty when there is no such stack."""
        found = self._describe() or {}
        return {each["OutputKey"]: each["OutputValue"] for each in found.get("Outputs", [])}

    def parameters(self) -> dict[str, str]:
        """The parameters that it was last deployed with, empty when there is no such stack."""
        found = self._describe() or {}
        return {each["ParameterKey"]: each["ParameterValue"] for each in found.get("Parameters", [])}

    def resources(self, kind: str) -> list[str]:
        """What identifies each resource of a kind (``AWS::S3::Bucket``); none when there is no stack."""
        if self._describe() is None:
            return []
        found = self._client.describe_stack_resources(StackName=self.name)["StackResources"]
        there = [each for each in found if each["ResourceType"] == kind]
        return [each["PhysicalResourceId"] for each in there if each["ResourceStatus"] != "DELETE_COMPLETE"]

    def deploy(
        self, template: Path, parameters: Mapping[str, str], tags: Mapping[str, str], role: str | None = None
    ) -> dict[str, str]:
        """Make the stack, or bring it to what `template` and `parameters` say, and return its outputs.

        What somebody else has begun is waited for; a stack that was never made is cleared away first; one
        that is what it should be is left alone. CloudFormation acts as `role` (ARN) from then on, to delete
        the stack, too; None: as whoever asks, or as it did before.

        Raises:
            StackFailed: it did not get there. Rolled back, it is what it was before.
        """
        try:
            text = template.read_text()
        except OSError as error:
            raise StackFailed(f"{template} cannot be read: {error.strerror}.") from error
        status = self._settle()
        if status in _STILLBORN:
            self._say(f"{self.name}: clearing away what was never made")
            self.delete()
        change = f"deploy-{datetime.now(UTC):%Y%m%d%H%M%S%f}"
        asked: dict[str, Any] = {
            "StackName": self.name,
            "ChangeSetName": change,
            "ChangeSetType": "UPDATE" if status in _UPDATABLE else "CREATE",
            "TemplateBody": text,
            "Parameters": [
                {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()
            ],
            "Capabilities": ["CAPABILITY_NAMED_IAM"],
            "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
        }
        if role is not None:
            asked["RoleARN"] = role
        try:
            self._client.create_change_set(**asked)
            if not self._has_changes(change):
                self._say(f"{self.name}: nothing to change")
                return self.outputs()
            self._client.execute_change_set(
                StackName=self.name, ChangeSetName=change, ClientRequestToken=change
            )
        except ClientError as error:
            raise StackFailed(f"{self.name}: {template.name} is refused: {_message(error)}") from error
        status = self._settle(change)
        if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
            raise StackFailed(f"{self.name} ended as {status}:\n" + "\n".join(self._reasons(change)))
        return self.outputs()

    def delete(self) -> None:
        """Delete the stack and all that it has made; one that is not there is deleted.

        Raises:
            StackFailed: something of it stays. The text says what, and why.
        """
        if self._settle() is None:
            return
        request = f"delete-{datetime.now(UTC):%Y%m%d%H%M%S%f}"
        self._client.delete_stack(StackName=self.name, ClientRequestToken=request)
        status = self._settle(request)
        if status is not None:
            raise StackFailed(f"{self.name} ended as {status}:\n" + "\n".join(self._reasons(request)))

    def _describe(self) -> dict[str, Any] | None:
        try:
            found: list[Any] = self._client.describe_stacks(StackName=self.name)["Stacks"]
        except ClientError as error:
            if "does not exist" in _message(error):
                return None
            raise
        return found[0] if found and found[0]["StackStatus"] != "DELETE_COMPLETE" else None

    def _has_changes(self, change: str) -> bool:
        deadline = time.monotonic() + self._within
        while time.monotonic() < deadline:
            found = self._client.describe_change_set(StackName=self.name, ChangeSetName=change)
            if found["Status"] == "CREATE_COMPLETE":
                return True
            if found["Status"] == "FAILED":
                why = found.get("StatusReason", "(no reason given)")
                self._client.delete_change_set(StackName=self.name, ChangeSetName=change)
                if any(text in why for text in _NO_CHANGES):
                    return False
                raise StackFailed(f"{self.name}: {why}")
            time.sleep(min(self._every, 1.0))
        raise StackFailed(f"{self.name}: what changes is not known after {self._within:.0f} s")

    def _settle(self, request: str | None = None) -> str | None:
        """Wait while something happens to the stack, and tell what; then its status. What goes on for too
        long is its status, too.

        With `request`, what that asked for has to begin first: CloudFormation answers before it does, and
        until then tells of the stack as it was.
        """
        told: set[str] = set()
        begun = request is None
        deadline = time.monotonic() + self._within
        while True:
            status = self.status()
            if request is not None and status is not None:
                for event in self._events(request):
                    begun = True
                    if event["EventId"] not in told:
                        told.add(event["EventId"])
                        self._tell(event)
                status = self.status() if begun else status
            under_way = (
                status is not None and status.endswith("_IN_PROGRESS") and status != "REVIEW_IN_PROGRESS"
            )
            if status is None or (begun and not under_way) or time.monotonic() > deadline:
                return status
            time.sleep(self._every)

    def _events(self, request: str) -> list[Any]:
        """What has happened because of a request, oldest first."""
        pages = self._client.get_paginator("describe_stack_events").paginate(StackName=self.name)
        found: list[Any] = []
        try:
            for page in pages:
                recent = [each for each in page["StackEvents"] if each.get("ClientRequestToken") == request]
                found += recent
                if found and len(recent) < len(page["StackEvents"]):
                    break
        except ClientError as error:
            if "does not exist" not in _message(error):  # it has been deleted meanwhile
                raise
        return found[::-1]

    def _tell(self, event: Mapping[str, Any]) -> None:
        reason = event.get("ResourceStatusReason", "")
        failed = event["ResourceStatus"].endswith("_FAILED")
        text = (
            f"{self.name}: {event['LogicalResourceId']} {event['ResourceStatus'].lower().replace('_', ' ')}"
        )
        self._say(f"{text}: {reason}" if failed and reason else text)

    def _reasons(self, request: str) -> list[str]:
        """Why it failed: of each resource that did, and was not merely given up because of another."""
        reasons = [
            f"    {event['LogicalResourceId']}: {event['ResourceStatusReason']}"
            for event in self._events(request)
            if event["ResourceStatus"].endswith("_FAILED")
            and event.get("ResourceStatusReason")
            and "cancelled" not in event["ResourceStatusReason"]
        ]
        return reasons or ["    (no reason given)"]


def _message(error: ClientError) -> str:
    return str(error.response["Error"].get("Message", error))
