"""A request to CloudFormation is waited for from its beginning, whatever is told of the stack until then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from ztdev.aws.stacks import Stack

AT = "2026-01-01T00:00:00Z"


@pytest.fixture
def told() -> Iterator[tuple[Stack, Stubber, list[str]]]:
    """A stack, and what CloudFormation will answer."""
    client = boto3.client(
        "cloudformation", region_name="eu-central-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    said: list[str] = []
    with Stubber(client) as stubber:
        yield Stack(client, "shop", said.append, every=0.0), stubber, said
        stubber.assert_no_pending_responses()


def status(stubber: Stubber, *words: str) -> None:
    for word in words:
        stack = {"StackName": "shop", "StackStatus": word, "CreationTime": AT}
        stubber.add_response("describe_stacks", {"Stacks": [stack]}, {"StackName": "shop"})


def events(stubber: Stubber, *requests: str) -> None:
    """One event for each, newest first."""
    told = [
        {
            "StackId": "shop",
            "StackName": "shop",
            "EventId": f"{number}-{request}",
            "Timestamp": AT,
            "LogicalResourceId": "shop",
            "ResourceStatus": "UPDATE_IN_PROGRESS",
            "ClientRequestToken": request,
        }
        for number, request in enumerate(requests)
    ]
    stubber.add_response("describe_stack_events", {"StackEvents": told}, {"StackName": "shop"})


def test_a_stack_that_is_still_told_as_it_was_is_not_taken_for_done(told: Any) -> None:
    stack, stubber, said = told
    status(stubber, "UPDATE_COMPLETE")  # as it was before
    events(stubber, "deploy-1", "deploy-1")
    status(stubber, "UPDATE_COMPLETE")
    events(stubber, "deploy-2", "deploy-1")  # begun
    status(stubber, "UPDATE_IN_PROGRESS", "UPDATE_COMPLETE")
    events(stubber, "deploy-2", "deploy-1")
    status(stubber, "UPDATE_COMPLETE")
    assert stack._settle("deploy-2") == "UPDATE_COMPLETE"
    assert said == ["shop: shop update in progress"]


def test_what_somebody_else_has_begun_is_waited_for(told: Any) -> None:
    stack, stubber, _ = told
    status(stubber, "UPDATE_IN_PROGRESS", "UPDATE_ROLLBACK_IN_PROGRESS", "UPDATE_ROLLBACK_COMPLETE")
    assert stack._settle() == "UPDATE_ROLLBACK_COMPLETE"
