"""Trouble with who the other side is: no certificate, a wrong one, a name read wrongly, a foreign issuer."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import websockets
from cryptography import x509
from cryptography.x509.oid import NameOID

from tests.conformance.clauses import BOTH
from tests.conformance.conftest import PEER, agent, our_side
from tests.conformance.peers import plain_context
from tests.mtls.conftest import CALLER, DOMAIN, POLICY, SERVER, STRANGER, free_port, make_app, serving, until
from tests.mtls.test_refused_callers import (
    LEAF_USAGE,
    assert_handshake_refused,
    assert_rightful_call_succeeds,
    presenting,
)
from tests.mtls.test_refused_servers import impostor
from ztmtls.audit import AuditLog
from ztmtls.authz import path_prefix
from ztmtls.client import AsyncClient, ServerRefused
from ztmtls.guard import Guard
from ztmtls.identity import SCOPE_KEY
from ztmtls.listen import bind
from ztmtls.reasons import Reason
from ztmtls.server import HttpParser, _loop_factory
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority

REPOSITORY = Path(__file__).parents[2]
SHIPPED = [*(REPOSITORY / "libs").glob("*/src"), *(REPOSITORY / "services").glob("*/src")]

# --- nobody's certificate -----------------------------------------------------------------------------


def without_a_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # an attacker does not care who answers
    return context


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_caller_without_a_certificate_of_ours_reaches_no_handler(loop: Any, http: HttpParser) -> None:
    """Servers that were given a CA still let callers in that presented nothing, or anything.

    Here TLS fails, for requests and for WebSockets; and a second request on a good connection is asked
    about like the first.
    """

    async def main() -> None:
        ca, other = CertificateAuthority(DOMAIN), CertificateAuthority(DOMAIN)
        caller = StaticSource(ca.context(ca.issue(CALLER)))
        async with serving(StaticSource(ca.context(ca.issue(SERVER))), http=http) as served:
            async with served.client(caller) as client:
                first = await client.get("/thing")
                second = await client.get("/unlisted")
                third = await client.get("/thing")
            assert [r.status_code for r in (first, second, third)] == [200, 403, 200]
            assert first.json()["hop"]["connection"] == third.json()["hop"]["connection"], "one connection"
            handled = len(served.seen)

            foreign = plain_context(ssl.PROTOCOL_TLS_CLIENT, other.issue(CALLER), None)
            for context in (without_a_certificate(), foreign):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
                answer = b""
                with contextlib.suppress(OSError):
                    writer.write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
                    answer = await reader.read()
                writer.transport.abort()
                assert answer == b""
                with pytest.raises((OSError, websockets.InvalidHandshake)):
                    await websockets.connect(f"wss://127.0.0.1:{served.port}/watch", ssl=context)
            assert len(served.seen) == handled
            reasons = {line["reason"] for line in served.audit("deny") if line["event"] == "handshake"}
            assert reasons == {Reason.NO_CERTIFICATE, Reason.UNTRUSTED_AUTHORITY}

    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        runner.run(main())


async def test_request_that_came_without_tls_is_refused(
    caller: StaticSource, server_source: StaticSource, served: Any
) -> None:
    """An application trusted its transport to have checked the peer, and ran on one that had not.

    Here the guard refuses every request that did not come over a connection which it knows to be verified.
    """
    await assert_rightful_call_succeeds(served, caller)
    seen: list[dict[str, Any]] = []
    guarded = Guard(make_app(seen), source=server_source, policy=POLICY, audit=AuditLog("x", io.StringIO()))
    sock = bind("127.0.0.1", 0, "PORT")
    server = uvicorn.Server(uvicorn.Config(guarded, log_config=None, interface="asgi3"))
    running = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await until(lambda: server.started)
        base = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as client:
            for method, path in (("GET", "/thing"), ("POST", "/thing"), ("GET", "/things/1")):
                response = await client.request(method, path, headers={"x-spiffe-id": CALLER})
                assert (response.status_code, response.json()["reason"]) == (403, Reason.NO_PEER)
    finally:
        server.should_exit = True
        await running
    assert seen == []


@pytest.mark.parametrize(
    "scope",
    [
        {},
        {SCOPE_KEY: None},
        {SCOPE_KEY: {}},
        {SCOPE_KEY: {"peer": CALLER}},
        {"extensions": {"tls": None}},
        {"extensions": {"tls": {"client_cert_name": CALLER}}},
        {"peercert": None},
        {"headers": [(b"x-spiffe-id", CALLER.encode())]},
    ],
)
async def test_missing_peer_certificate_is_no_default_identity(
    server_source: StaticSource, scope: dict[str, Any]
) -> None:
    """A server filled in no certificate, and the check took that for "nothing to check"."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    seen: list[dict[str, Any]] = []
    guard = Guard(make_app(seen), source=server_source, policy=POLICY, audit=AuditLog("x", io.StringIO()))
    await guard({"type": "http", "method": "GET", "path": "/thing", **scope}, receive, send)
    assert sent[0]["status"] == 403
    assert Reason.NO_PEER in sent[1]["body"].decode()
    assert seen == []


# --- the wrong server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rogue", ["another workload", "another CA", "expired"])
async def test_another_workload_at_the_servers_address_gets_no_byte(
    ca: CertificateAuthority, caller: StaticSource, server_source: StaticSource, rogue: str
) -> None:
    """A good chain was enough, so any workload of the domain could stand in for the one that was meant.

    Here the client that talked to the right server refuses the next one on the same address in the
    handshake, and says whom it expected and who came.
    """
    other = CertificateAuthority(DOMAIN)
    svid, reason = {
        "another workload": (ca.issue(STRANGER), Reason.WRONG_SERVER_IDENTITY),
        "another CA": (other.issue(SERVER), Reason.UNTRUSTED_AUTHORITY),
        "expired": (ca.issue(SERVER, ttl=-1), Reason.EXPIRED),
    }[rogue]
    port = free_port()
    async with AsyncClient(caller, peer=SERVER, base_url=f"https://127.0.0.1:{port}") as client:
        async with serving(server_source, port=port):
            assert (await client.post("/thing", content=b"secret")).status_code == 200
        async with impostor(ca, svid, port) as state:
            with pytest.raises(ServerRefused) as refused:
                await client.post("/thing", content=b"secret " * 10_000)
    assert refused.value.reason is reason
    assert state.received == 0
    if rogue == "another workload":
        assert SERVER in refused.value.detail
        assert STRANGER in refused.value.detail


async def test_connection_to_one_server_is_not_used_for_another_at_the_same_address(
    served: Any, caller: StaticSource
) -> None:
    """A pool keyed by host and port handed one expected peer's connection to a call meant for another."""
    async with served.client(caller) as right, served.client(caller, "spiffe://zt.example/else") as wrong:
        assert (await right.get("/thing")).status_code == 200
        with pytest.raises(ServerRefused) as refused:
            await wrong.get("/thing")
        assert refused.value.reason is Reason.WRONG_SERVER_IDENTITY
        assert (await right.get("/thing")).status_code == 200


def keywords(folder: Path) -> list[tuple[str, ast.keyword]]:
    """Every keyword argument of every call in the Python files below `folder`."""
    found = []
    for path in folder.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        found += [(f"{path}:{call.lineno}", keyword) for call in calls for keyword in call.keywords]
    return found


def test_nothing_that_is_shipped_turns_verification_off() -> None:
    """SVIDs name no host, so people switched off all verification to get going."""
    assert any(keyword.arg == "verify" for folder in SHIPPED for _, keyword in keywords(folder)), "it finds"
    off = [
        place
        for folder in SHIPPED
        for place, keyword in keywords(folder)
        if keyword.arg == "verify"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is False
    ]
    named = [
        str(path)
        for folder in SHIPPED
        for path in folder.rglob("*.py")
        if any(word in path.read_text() for word in ("CERT_NONE", "CERT_OPTIONAL", "_create_unverified"))
    ]
    assert off + named == []


# --- how a SPIFFE ID is read --------------------------------------------------------------------------

COMMON_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "caller")])
BASE = CALLER.removesuffix("/caller")


@pytest.mark.parametrize(
    ("reason", "shape"),
    [
        (Reason.MULTIPLE_URI_SANS, {"uris": [CALLER, "https://example.com/"]}),
        (Reason.MULTIPLE_URI_SANS, {"uris": [CALLER, CALLER]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{BASE}/%63aller"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{CALLER}/"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{BASE}//caller"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{BASE}/x/../caller"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [CALLER.replace("spiffe", "SPIFFE")]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [CALLER.replace("zt.example", "zt.example:443")]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{CALLER}?x=1"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{STRANGER}, URI:{CALLER}"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{STRANGER}\n{CALLER}".encode()]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": [f"{STRANGER}\0{CALLER}".encode()]}),
        (Reason.UNKNOWN_TRUST_DOMAIN, {"uris": ["spiffe://zt.evil/ns/zt-demo/sa/caller"]}),
        (Reason.NO_URI_SAN, {"uris": [], "subject": COMMON_NAME}),
        (Reason.LEAF_IS_CA, {"is_ca": True}),
        (Reason.LEAF_CAN_SIGN_CERTIFICATES, {"key_usage": LEAF_USAGE | {"key_cert_sign"}}),
    ],
    ids=lambda value: (
        str(value) if isinstance(value, Reason) else str(value.get("uris") or next(iter(value)))
    ),
)
async def test_spiffe_id_is_not_read_from_text(
    served: Any, caller: StaticSource, ca: CertificateAuthority, reason: Reason, shape: dict[str, Any]
) -> None:
    """Printed names, the first of several, or a URI that was put right first, passed for an ID.

    Here the one URI is taken as it stands or refused, and a log line stays one line whatever it says.
    """
    await assert_rightful_call_succeeds(served, caller)
    await assert_handshake_refused(served, presenting(ca.issue(CALLER, **shape), ca), reason)
    text = served.audit_stream.getvalue()
    assert text.count("\n") == len(served.audit())
    assert text.replace("\n", "").isprintable()


async def test_longer_name_does_not_pass_for_a_shorter_one(
    ca: CertificateAuthority, caller: StaticSource, server_source: StaticSource
) -> None:
    """`startswith` took ``…/caller-evil`` for ``…/caller``."""
    evil = presenting(ca.issue(f"{CALLER}-evil"), ca)
    async with serving(server_source) as served:
        await assert_rightful_call_succeeds(served, caller)
        async with served.client(evil) as client:
            response = await client.get("/thing")
        assert (response.status_code, response.json()["reason"]) == (403, Reason.CALLER_NOT_ALLOWED)
    async with serving(server_source, allowed_peers=path_prefix(CALLER)) as served:
        await assert_rightful_call_succeeds(served, caller)
        await assert_handshake_refused(served, evil, Reason.CALLER_NOT_ALLOWED)


# --- whose authority ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", BOTH)
async def test_foreign_authority_can_not_name_our_workloads_nor_ours_theirs(
    ca: CertificateAuthority, role: str
) -> None:
    """The bundles of all domains went into one trust store, so any of their owners could act as any service.

    Here an authority vouches for the IDs of its own domain only, towards servers and towards clients.
    """
    friend = CertificateAuthority("friend.example")
    theirs = "spiffe://friend.example/peer"
    async with agent(ca, federates_with=[friend]) as workload, our_side(workload) as ours:
        assert await ours.verdict(role, ca.issue(PEER)) == PEER
        assert await ours.verdict(role, friend.issue(theirs)) == theirs

        assert await ours.verdict(role, friend.issue(PEER)) is Reason.UNTRUSTED_AUTHORITY
        assert await ours.verdict(role, ca.issue(theirs)) is Reason.UNTRUSTED_AUTHORITY
