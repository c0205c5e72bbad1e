"""`calling_as`: an application meets a verified caller and the real guard, without a socket."""

from __future__ import annotations

import io
import json
from typing import Any

from fastapi import FastAPI

from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.fastapi import Hop
from ztmtls.testing import calling_as

FRONTEND = "spiffe://example.test/frontend"
POLICY = Policy.parse(
    {
        "version": 1,
        "rules": [{"name": "reads", "callers": [FRONTEND], "methods": ["GET"], "paths": ["/hop"]}],
    }
)

app = FastAPI()


@app.get("/hop")
async def hop(hop: Hop) -> dict[str, Any]:
    return hop.as_dict()


async def test_the_application_sees_both_ends_and_the_rule() -> None:
    async with calling_as(app, FRONTEND, POLICY, callee_id="spiffe://example.test/orders") as client:
        seen = (await client.get("/hop")).json()

    assert (seen["peer"]["id"], seen["own"]["id"]) == (FRONTEND, "spiffe://example.test/orders")
    assert (seen["side"], seen["rule"]) == ("callee", "reads")


async def test_another_caller_is_refused_by_the_guard() -> None:
    lines = io.StringIO()
    async with calling_as(app, FRONTEND, POLICY) as client:
        assert (await client.get("/hop")).status_code == 200
    async with calling_as(app, f"{FRONTEND}/x", POLICY, audit=AuditLog("orders", lines)) as client:
        answer = await client.get("/hop", headers={"x-spiffe-id": FRONTEND})

    assert (answer.status_code, answer.json()["reason"]) == (403, "caller_not_allowed")
    (line,) = map(json.loads, lines.getvalue().splitlines())
    assert (line["decision"], line["reason"], line["peer_id"]) == (
        "deny",
        "caller_not_allowed",
        f"{FRONTEND}/x",
    )
