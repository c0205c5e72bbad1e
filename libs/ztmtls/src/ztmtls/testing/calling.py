"""A client of an ASGI application as a verified caller: everything that a server does, but the sockets."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import httpx

from ztmtls.asgi import ASGIApp, Receive, Scope, Send
from ztmtls.audit import AuditLog
from ztmtls.authz import Policy, PolicyFile
from ztmtls.guard import Guard
from ztmtls.identity import RequestIdentity, set_request_identity
from ztmtls.ids import SpiffeId
from ztmtls.source import StaticSource
from ztmtls.tls import Connection
from ztmtls.verify import verify_peer

from .ca import CertificateAuthority


def calling_as(
    app: ASGIApp,
    caller_id: SpiffeId | str,
    policy: Policy | PolicyFile,
    *,
    callee_id: SpiffeId | str | None = None,
    audit: AuditLog | None = None,
) -> httpx.AsyncClient:
    """A client that calls `app` as `caller_id`, on one connection. Needs the extra `client`.

        async with calling_as(app, "spiffe://example.test/frontend", load_policy("policy.yaml")) as client:
            assert (await client.get("/orders")).status_code == 200

    `app` is behind the same guard as in `ztmtls.server.serve`: `policy` decides, and each decision is a
    line of `audit`. The caller's certificate, of a new authority, is verified as in a handshake. `callee_id`
    is who `app` is, by default a workload of the caller's trust domain.
    """
    caller = SpiffeId.parse(str(caller_id))
    ca = CertificateAuthority(caller.trust_domain)
    source = StaticSource(ca.context(ca.issue(callee_id or f"{caller.trust_domain.id}/callee")))
    peer = verify_peer(ca.issue(caller).chain, source.context.bundles, datetime.now(UTC))
    connection = Connection("callee", source.context, peer, None, "TLSv1.3", "TLS_AES_256_GCM_SHA384")
    guarded = Guard(app, source=source, policy=policy, audit=audit or AuditLog("callee", io.StringIO()))

    async def on_that_connection(scope: Scope, receive: Receive, send: Send) -> None:
        set_request_identity(scope, RequestIdentity(connection))
        await guarded(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(on_that_connection), base_url="https://callee")
