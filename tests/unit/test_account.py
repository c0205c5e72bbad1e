"""What the manifests for an account are made of, from answers as AWS gives them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from ztdev.kubernetes.account import IMAGES, Missing, newest, outputs

OLD = datetime(2026, 1, 1, tzinfo=UTC)


def client(service: str) -> Any:
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    return boto3.client(service, region_name="eu-central-1", **keys)


@pytest.fixture
def registry() -> Iterator[tuple[Any, Stubber]]:
    """A client whose answers are held against the service's own description."""
    ecr = client("ecr")
    with Stubber(ecr) as stubber:
        yield ecr, stubber


def image(number: int, *, tagged: bool = True) -> dict[str, Any]:
    tags = {"imageTags": [f"v{number}"]} if tagged else {}
    pushed = OLD + timedelta(days=number)
    return {"imageDigest": f"sha256:{number:064x}", "imagePushedAt": pushed, **tags}


def test_the_image_that_was_pushed_last_runs(registry: tuple[Any, Stubber]) -> None:
    """One without a tag was never meant to."""
    ecr, stubber = registry
    for repository in IMAGES.values():
        details = {"imageDetails": [image(2), image(3), image(4, tagged=False), image(1)]}
        stubber.add_response("describe_images", details, {"repositoryName": f"zt-demo/{repository}"})
    assert newest(ecr, "zt-demo") == dict.fromkeys(IMAGES.values(), image(3)["imageDigest"])


def test_every_repository_that_is_empty_is_named(registry: tuple[Any, Stubber]) -> None:
    ecr, stubber = registry
    empty = ("orders", "spire-agent")
    for repository in IMAGES.values():
        asked = {"repositoryName": f"zt-demo/{repository}"}
        if repository == "orders":
            stubber.add_client_error("describe_images", "RepositoryNotFoundException", expected_params=asked)
        else:
            details = [] if repository in empty else [image(1)]
            stubber.add_response("describe_images", {"imageDetails": details}, asked)
    with pytest.raises(Missing, match="zt-demo/orders, zt-demo/spire-agent"):
        newest(ecr, "zt-demo")


def test_a_stack_that_is_not_there_is_named_with_its_template() -> None:
    cloudformation = client("cloudformation")
    with Stubber(cloudformation) as stubber:
        stubber.add_client_error(
            "describe_stacks", "ValidationError", "Stack with id shop-platform does not exist"
        )
        with pytest.raises(Missing, match=r"shop-platform.*platform\.yaml"):
            outputs(cloudformation, "shop-platform", "platform.yaml")
