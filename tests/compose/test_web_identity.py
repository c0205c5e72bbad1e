"""AWS roles by JWT-SVIDs: each service takes its own with what SPIRE says of it, and no other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.compose.project import Project
from tests.waiting import until

ROLE = "arn:aws:iam::111122223333:role/zt-demo-"

#: Asks SPIRE for a token and STS for a role, as the product does, and tells what came of it.
TAKE = """
import json, os, sys
from dataclasses import replace
from ztmtls.aws_clients import Clients
from ztmtls.aws_credentials import RoleCredentials
from ztmtls.aws_identity import JwtSvidIdentity
from ztmtls.jwt_source import fetch_once
from ztmtls.reasons import Refusal
role, audience = sys.argv[1:]

class Mine(JwtSvidIdentity):
    def read_token(self):
        return fetch_once(self.endpoint, audience).token

mine = Mine(**{**JwtSvidIdentity.from_env().__dict__, "role_arn": role})
try:
    credentials = RoleCredentials(mine, Clients(mine.region)).get()
except Refusal as refusal:
    print(json.dumps({"reason": str(refusal.reason), "detail": refusal.detail}))
else:
    print(json.dumps({"access_key": credentials.access_key}))
"""


def take(project: Project, service: str, role: str, audience: str = "sts.amazonaws.com") -> dict[str, Any]:
    told: dict[str, Any] = json.loads(project.python(service, TAKE, ROLE + role, audience))
    return told


@pytest.fixture(scope="module", autouse=True)
def published(project: Project) -> None:
    """The provider has the keys by which tokens are signed now. It looks every two seconds, and less often
    while the agent is away."""
    until(lambda: "access_key" in take(project, "orders", "orders"), 120, "the keys are published")


@pytest.mark.parametrize("service", ["orders", "payments"])
def test_a_service_takes_its_own_role_and_no_other(project: Project, service: str) -> None:
    assert take(project, service, service)["access_key"].startswith("ASIA")

    for other in {"orders", "payments", "orders-migrate", "payments-migrate"} - {service}:
        refused = take(project, service, other)
        assert refused["reason"] == "web_identity_refused"
        assert f"sub=spiffe://zt.example/ns/zt-demo/sa/{service}" in refused["detail"]


def test_a_token_for_somebody_else_opens_nothing(project: Project) -> None:
    assert "access_key" in take(project, "orders", "orders")
    assert take(project, "orders", "orders", "payments")["reason"] == "web_identity_refused"


def test_no_token_lies_in_a_file(project: Project) -> None:
    for service in ("orders", "payments"):
        config = project.container(service)["Config"]
        names = {variable.partition("=")[0] for variable in config["Env"]}
        assert "AWS_WEB_IDENTITY_TOKEN_FROM" in names
        assert "AWS_WEB_IDENTITY_TOKEN_FILE" not in names
