"""Which servers a client refuses, before one byte of the request leaves."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from ztmtls.authz import path_prefix, trust_domain
from ztmtls.client import AsyncClient, Client, NoIdentityError, ServerRefused
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import GenerationContext

from .conftest import CALLER, DOMAIN, SERVER, STRANGER, Served


@dataclass
class Impostor:
    port: int = 0
    received: int = 0


@asynccontextmanager
async def impostor(ca: CertificateAuthority, svid: X509Svid, port: int = 0) -> AsyncIterator[Impostor]:
    """A TLS server that presents `svid` and counts the application bytes it is sent."""
    state = Impostor()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                state.received += len(data)
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    context = GenerationContext.build("callee", ca.context(svid), None)
    context.verify_mode = ssl.CERT_NONE  # an impostor takes any caller
    server = await asyncio.start_server(handle, "127.0.0.1", port, ssl=context)
    state.port = server.sockets[0].getsockname()[1]
    async with server:
        yield state


async def assert_server_refused(port: int, caller: StaticSource, reason: Reason) -> ServerRefused:
    async with AsyncClient(caller, peer=SERVER, base_url=f"https://127.0.0.1:{port}") as client:
        with pytest.raises(ServerRefused) as refused:
            await client.post("/thing", content=b"secret " * 1000)
    assert refused.value.reason is reason
    return refused.value


async def test_right_server_is_accepted(served: Served, caller: StaticSource) -> None:
    async with served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200


async def test_federated_authority_can_not_vouch_for_the_server(
    served: Served, ca: CertificateAuthority
) -> None:
    friend = CertificateAuthority("friend.example")
    caller = StaticSource(ca.context(ca.issue(CALLER), federates_with=[friend]))
    await test_right_server_is_accepted(served, caller)
    async with impostor(friend, friend.issue(SERVER)) as rogue:
        await assert_server_refused(rogue.port, caller, Reason.UNTRUSTED_AUTHORITY)
        assert rogue.received == 0


@pytest.mark.parametrize(
    ("authorizer", "accepted"),
    [
        (trust_domain(DOMAIN), True),
        (path_prefix("spiffe://zt.example/ns/zt-demo"), True),
        (path_prefix("spiffe://zt.example/ns/zt"), False),
        (trust_domain("other.example"), False),
    ],
)
async def test_authorizers_decide_about_servers(
    served: Served, caller: StaticSource, authorizer: object, accepted: bool
) -> None:
    async with served.client(caller, authorizer) as client:
        if accepted:
            assert (await client.get("/thing")).status_code == 200
        else:
            with pytest.raises(ServerRefused):
                await client.get("/thing")


async def test_blocking_client_refuses_alike(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    def call(port: int) -> int:
        with Client(caller, peer=SERVER, base_url=f"https://127.0.0.1:{port}") as client:
            return client.get("/thing").status_code

    assert await asyncio.to_thread(call, served.port) == 200
    async with impostor(ca, ca.issue(STRANGER)) as rogue:
        with pytest.raises(ServerRefused) as refused:
            await asyncio.to_thread(call, rogue.port)
        assert refused.value.reason is Reason.WRONG_SERVER_IDENTITY
        assert rogue.received == 0


async def test_plain_http_is_not_spoken(served: Served, caller: StaticSource) -> None:
    async with served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get(f"http://127.0.0.1:{served.port}/thing")


async def test_redirects_are_not_followed(served: Served, caller: StaticSource) -> None:
    async with served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200
        with pytest.raises(TypeError, match="no redirects"):
            await client.get("/thing", follow_redirects=True)


async def test_proxy_variables_have_no_effect(
    served: Served, caller: StaticSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200


async def test_client_without_an_identity_sends_nothing(served: Served, caller: StaticSource) -> None:
    async with served.client(caller) as client:
        assert (await client.get("/thing")).status_code == 200
        caller.deny()
        with pytest.raises(NoIdentityError) as refused:
            await client.get("/thing")
    assert refused.value.reason is Reason.IDENTITY_DENIED
    assert len(served.seen) == 1
