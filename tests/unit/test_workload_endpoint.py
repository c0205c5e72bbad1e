"""Addresses of the Workload API. The standard's own cases are in `tests/conformance/test_ep.py`."""

from __future__ import annotations

import pytest

from ztmtls.reasons import Reason
from ztmtls.workload_endpoint import InvalidEndpoint, parse_endpoint


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:/run/agent.sock", "unix:/run/agent.sock"),
        ("unix:///run/agent.sock", "unix:/run/agent.sock"),
        ("tcp://[fe80::1]:8081", "ipv6:[fe80::1]:8081"),
    ],
)
def test_good_addresses_become_grpc_targets(address: str, target: str) -> None:
    assert parse_endpoint(address) == target


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("unix:////run/agent.sock", "absolute path"),  # gRPC would connect to authority "run"
        ("tcp://[fe80::1%eth0]:8081", "IP address"),
        ("tcp://[fe80::1%25eth0]:8081", "IP address"),
    ],
)
def test_addresses_that_would_mean_something_else_to_grpc_are_refused(address: str, why: str) -> None:
    with pytest.raises(InvalidEndpoint, match=why) as caught:
        parse_endpoint(address)
    assert caught.value.reason is Reason.INVALID_ENDPOINT
