"""A project beside the others, of images that were signed, with lives so short that all of them run out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.project import Project, beside
from tests.compose.test_containers import ask
from tests.orders_meanwhile import an_order_is_paid
from tests.waiting import until
from ztdev.images import verify

#: Lives so short that somebody can wait until all have run out. There is no condition to wait for: it is time
#: itself that must pass.
SHORT_LIVES = {"SVID_TTL": "10s", "AGENT_TTL": "20s", "CA_TTL": "40s"}
LONGER_THAN_ANY_LIFE = 50.0


@pytest.fixture(scope="module")
def pinned(signed: Path) -> dict[str, str]:
    """What pins each image to its content."""
    return verify(str(signed))


@pytest.fixture(scope="module")
def other(project: Project, pinned: dict[str, str]) -> Iterator[Project]:
    with beside(project, "signed", pinned | SHORT_LIVES) as other:
        yield other


def test_what_was_signed_runs_and_has_its_identities_alone(other: Project, pinned: dict[str, str]) -> None:
    assert an_order_is_paid(other.url)
    for service, variable in (("orders", "ORDERS_IMAGE"), ("spire-server", "SPIRE_SERVER_IMAGE")):
        assert other.container(service)["Image"] == pinned[variable]

    right = {
        "com.docker.compose.project": other.name,
        "com.docker.compose.service": "payments",
        "com.docker.compose.oneoff": "False",
    }
    status, said = ask(other, pinned["PAYMENTS_IMAGE"], **right)
    assert status == 0, said
    # The same by its name is not known to be the same: a name can be given to anything.
    status, said = ask(other, "zt-demo/payments:local", **right)
    assert status != 0, said


def test_a_machine_that_slept_until_everything_had_run_out(other: Project) -> None:
    """No certificate is valid any more, the agent's and the authority's neither."""
    assert an_order_is_paid(other.url)
    other.compose("pause")
    time.sleep(LONGER_THAN_ANY_LIFE)
    other.compose("unpause")
    began = time.monotonic()
    until(lambda: an_order_is_paid(other.url), 120, "an order after the sleep")
    print(f"the first order was paid {time.monotonic() - began:.0f} s after the machine woke up")
