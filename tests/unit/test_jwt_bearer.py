"""Callers behind a proxy: a JWT-SVID in the header is checked, decided on, written down, and kept apart.

Everything here is sent as a proxy would send it, in headers; only a token that verifies names anybody.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, WebSocket

from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.bearer import BearerGuard, JwtCaller, NoJwtCaller, jwt_caller
from ztmtls.fastapi import Peer, install
from ztmtls.fastapi_jwt import JwtPeer
from ztmtls.jwt_source import JwtSource, NoBundles
from ztmtls.jwt_svid import JwtBundle, JwtSvid, validate
from ztmtls.reasons import Reason
from ztmtls.testing import CertificateAuthority, WorkloadApi, calling_as

CALLER = "spiffe://zt.example/caller"
STRANGER = "spiffe://zt.example/stranger"
OURS = "spiffe://zt.example/reports"
POLICY = Policy.parse(
    {
        "version": 1,
        "rules": [
            {
                "name": "caller-reads",
                "callers": [CALLER],
                "methods": ["GET"],
                "paths": ["/reports", "/over-mtls", "/things/{id}"],
            },
            {"name": "caller-watches", "callers": [CALLER], "methods": ["WEBSOCKET"], "paths": ["/watch"]},
        ],
    }
)


class Bundles:
    """Validates with the bundle of one authority: what a `JwtSource` does, without a Workload API."""

    def __init__(self, ca: CertificateAuthority) -> None:
        self.ca = ca
        self.problem = ""

    async def validate(self, token: str, audience: str) -> JwtSvid:
        if self.problem:
            raise NoBundles(self.problem)
        domain = self.ca.trust_domain
        bundles = {domain: JwtBundle.from_jwks(domain, self.ca.jwt_bundle())}
        return validate(token, audience, bundles, datetime.now(UTC))


class Service:
    """An application behind the guard, with what reached it and what was written down."""

    def __init__(self) -> None:
        self.ca = CertificateAuthority("zt.example")
        self.bundles = Bundles(self.ca)
        self.log = io.StringIO()
        self.seen: list[dict[str, str]] = []
        self.audit = AuditLog("reports", self.log)
        self.app = self._app()
        self.guarded = BearerGuard(
            self.app, source=self.bundles, audience=OURS, policy=POLICY, audit=self.audit
        )

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        install(app)

        @app.get("/reports")
        async def reports(request: Request, caller: JwtPeer) -> dict[str, Any]:
            self.seen.append(dict(request.headers))
            return {"caller": str(caller.id), "audience": caller.audience, "rule": caller.rule}

        @app.get("/over-mtls")
        async def over_mtls(peer: Peer) -> str:
            return str(peer.id)

        @app.websocket("/watch")
        async def watch(socket: WebSocket, caller: JwtPeer) -> None:
            await socket.accept()
            await socket.send_text(str(caller.id))
            await socket.close()

        return app

    def token(self, spiffe_id: str = CALLER, audience: str = OURS, **more: Any) -> str:
        return self.ca.issue_jwt(spiffe_id, [audience], **more)

    async def get(
        self, path: str = "/reports", *headers: tuple[str, str], app: Any = None, method: str = "GET"
    ) -> httpx.Response:
        transport = httpx.ASGITransport(app or self.guarded)
        async with httpx.AsyncClient(transport=transport, base_url="https://reports") as client:
            return await client.request(method, path, headers=list(headers))

    async def rightful(self) -> None:
        response = await self.get("/reports", bearer(self.token()))
        assert (response.status_code, response.json()["caller"]) == (200, CALLER)
        self.log.truncate(0)
        self.log.seek(0)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


def bearer(token: str, scheme: str = "Bearer") -> tuple[str, str]:
    return ("Authorization", f"{scheme} {token}")


@pytest.fixture
def service() -> Service:
    return Service()


async def test_caller_with_a_token_is_served_and_named(service: Service) -> None:
    response = await service.get("/reports", bearer(service.token()))

    assert response.status_code == 200
    assert response.json() == {"caller": CALLER, "audience": [OURS], "rule": "caller-reads"}
    (line,) = service.lines()
    assert (line["event"], line["decision"], line["reason"]) == ("bearer_request", "allow", None)
    assert (line["caller_id"], line["rule"], line["audience"]) == (CALLER, "caller-reads", OURS)
    assert (line["method"], line["path"]) == ("GET", "/reports")
    assert line["token_expires"].endswith("Z")


async def test_scheme_has_no_case(service: Service) -> None:
    for scheme in ("bearer", "BEARER"):
        assert (await service.get("/reports", bearer(service.token(), scheme))).status_code == 200


async def test_token_goes_no_further(service: Service) -> None:
    token = service.token()

    await service.get("/reports", bearer(token), ("X-Request-Id", "7"))

    assert service.seen[0]["x-request-id"] == "7"
    assert "authorization" not in service.seen[0]
    assert not any(part in service.log.getvalue() for part in token.split("."))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"audience": "spiffe://zt.example/payments"}, Reason.JWT_AUDIENCE),
        ({"ttl": -1}, Reason.JWT_EXPIRED),
        ({"claims": {"sub": None}}, Reason.JWT_SUBJECT),
        ({"header": {"kid": "gone"}}, Reason.JWT_UNKNOWN_KEY),
        ({"spiffe_id": "spiffe://other.example/caller"}, Reason.UNKNOWN_TRUST_DOMAIN),
    ],
)
async def test_token_that_is_no_good_is_refused(
    service: Service, change: Mapping[str, Any], reason: Reason
) -> None:
    await service.rightful()
    token = service.token(**change)

    response = await service.get("/reports", bearer(token))

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["reason"] == reason
    (line,) = service.lines()
    assert (line["event"], line["decision"], line["reason"]) == ("bearer_request", "deny", reason)
    assert line["caller_id"] is None
    assert not any(part in response.text + service.log.getvalue() for part in token.split("."))
    assert len(service.seen) == 1


async def test_request_without_a_token_is_refused(service: Service) -> None:
    await service.rightful()

    response = await service.get("/reports", ("X-Forwarded-User", CALLER), ("X-Spiffe-Id", CALLER))

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["reason"] == Reason.JWT_MISSING
    assert service.lines()[0]["reason"] == Reason.JWT_MISSING


async def test_anything_but_one_bearer_token_is_refused(service: Service) -> None:
    await service.rightful()
    token = service.token()
    for headers in (
        [bearer(token), bearer(token)],
        [bearer(token), ("Authorization", "Basic eDp5")],
        [("Authorization", f"Basic {token}")],
        [("Authorization", token)],
        [("Authorization", "Bearer ")],
        [("Authorization", f"Bearer {token} {token}")],
        [("Authorization", f"Bearer {token},{token}")],
    ):
        response = await service.get("/reports", *headers)
        assert (response.status_code, response.json()["reason"]) == (401, Reason.JWT_MALFORMED)
    assert (await service.get(f"/reports?access_token={token}")).json()["reason"] == Reason.JWT_MISSING
    assert len(service.seen) == 1


async def test_verified_caller_still_needs_a_rule(service: Service) -> None:
    await service.rightful()
    for spiffe_id, method, path, reason in [
        (STRANGER, "GET", "/reports", Reason.CALLER_NOT_ALLOWED),
        (CALLER, "POST", "/reports", Reason.ROUTE_NOT_ALLOWED),
        (CALLER, "GET", "/unlisted", Reason.ROUTE_NOT_ALLOWED),
        (CALLER, "GET", "/things/a%2Fb", Reason.AMBIGUOUS_PATH),
    ]:
        response = await service.get(path, bearer(service.token(spiffe_id)), method=method)
        assert (response.status_code, response.json()["reason"]) == (403, reason)
        assert "www-authenticate" not in response.headers
        line = service.lines()[-1]
        assert (line["decision"], line["reason"], line["caller_id"]) == ("deny", reason, spiffe_id)
    assert len(service.seen) == 1


async def test_service_without_bundles_says_so(service: Service) -> None:
    await service.rightful()
    service.bundles.problem = "the agent is away"

    response = await service.get("/reports", bearer(service.token()))

    assert (response.status_code, response.json()["reason"]) == (503, Reason.NO_JWT_BUNDLES)
    assert service.lines()[0]["reason"] == Reason.NO_JWT_BUNDLES


async def test_failure_of_the_check_lets_nobody_in(service: Service) -> None:
    await service.rightful()

    async def fail(token: str, audience: str) -> JwtSvid:
        raise OSError("unexpected")

    service.bundles.validate = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="unexpected"):
        await service.get("/reports", bearer(service.token()))
    assert len(service.seen) == 1


def test_empty_audience_is_nobody_s(service: Service) -> None:
    with pytest.raises(ValueError, match="empty audience"):
        BearerGuard(service.app, source=service.bundles, audience="", policy=POLICY, audit=service.audit)


# -- Never the peer of a connection -----------------------------------------------------------------


async def test_token_makes_no_peer_of_a_connection(service: Service) -> None:
    await service.rightful()

    response = await service.get("/over-mtls", bearer(service.token()))

    assert (response.status_code, response.json()["reason"]) == (403, Reason.NO_PEER)


async def test_connection_makes_no_caller_by_token(service: Service) -> None:
    await service.rightful()
    async with calling_as(service.app, CALLER, POLICY) as client:
        assert (await client.get("/over-mtls")).json() == CALLER

        for headers in ({}, dict([bearer(service.token())])):
            response = await client.get("/reports", headers=headers)
            assert (response.status_code, response.json()["reason"]) == (403, Reason.JWT_MISSING)


async def test_without_the_guard_a_token_names_nobody(service: Service) -> None:
    await service.rightful()

    response = await service.get("/reports", bearer(service.token()), app=service.app)

    assert (response.status_code, response.json()["reason"]) == (403, Reason.JWT_MISSING)


def test_caller_in_the_scope_is_what_the_guard_put_there() -> None:
    with pytest.raises(NoJwtCaller):
        jwt_caller({"ztmtls.jwt": CALLER})
    with pytest.raises(NoJwtCaller):
        jwt_caller({})


def test_caller_keeps_no_token() -> None:
    assert JwtCaller.__slots__ == ("id", "audience", "expiry", "rule")


# -- WebSockets and the life of the application -----------------------------------------------------


async def open_websocket(
    service: Service, *headers: tuple[str, str], extensions: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """What the application behind the guard sends to somebody who opens ``/watch``."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "websocket",
        "path": "/watch",
        "raw_path": b"/watch",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        "extensions": dict(extensions or {}),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await service.guarded(scope, receive, send)
    return sent


async def test_websocket_needs_a_token_too(service: Service) -> None:
    accepted = await open_websocket(service, bearer(service.token()))
    assert [m["type"] for m in accepted] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert accepted[1]["text"] == CALLER

    for headers, reason in (
        ([], Reason.JWT_MISSING),
        ([bearer(service.token(STRANGER))], Reason.CALLER_NOT_ALLOWED),
    ):
        (closed,) = await open_websocket(service, *headers)
        assert (closed["type"], closed["code"], closed["reason"]) == ("websocket.close", 1008, reason)
    start, body = await open_websocket(service, extensions={"websocket.http.response": {}})
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert json.loads(body["body"])["reason"] == Reason.JWT_MISSING

    decisions = [(line["decision"], line["method"], line["reason"]) for line in service.lines()]
    assert decisions == [
        ("allow", "WEBSOCKET", None),
        ("deny", "WEBSOCKET", Reason.JWT_MISSING),
        ("deny", "WEBSOCKET", Reason.CALLER_NOT_ALLOWED),
        ("deny", "WEBSOCKET", Reason.JWT_MISSING),
    ]


async def test_start_and_stop_of_the_application_pass_through(service: Service) -> None:
    started: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope["type"])

    guarded = BearerGuard(app, source=service.bundles, audience=OURS, policy=POLICY, audit=service.audit)

    await guarded({"type": "lifespan"}, None, None)  # type: ignore[arg-type]

    assert started == ["lifespan"]
    assert service.lines() == []


# -- With a Workload API on both sides --------------------------------------------------------------


async def test_token_of_one_workload_opens_the_service_of_another(
    workload_api: WorkloadApi, service: Service
) -> None:
    async with workload_api as api:
        for name, spiffe_id in (("caller", CALLER), ("reports", OURS)):
            (await api.add_workload(name, spiffe_id, ca=service.ca)).allow(pid=os.getpid())
        async with (
            JwtSource(api.workloads["caller"].endpoint) as theirs,
            JwtSource(api.workloads["reports"].endpoint) as ours,
        ):
            guarded = BearerGuard(service.app, source=ours, audience=OURS, policy=POLICY, audit=service.audit)
            for_us, for_others = await theirs.fetch(OURS), await theirs.fetch("spiffe://zt.example/payments")

            accepted = await service.get("/reports", bearer(for_us.token), app=guarded)
            refused = await service.get("/reports", bearer(for_others.token), app=guarded)

    assert (accepted.status_code, accepted.json()["caller"]) == (200, CALLER)
    assert (refused.status_code, refused.json()["reason"]) == (401, Reason.JWT_AUDIENCE)
