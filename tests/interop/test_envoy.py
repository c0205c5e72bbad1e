"""Envoy as a sidecar, before a service and behind one, with SDS from a SPIRE agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from tests.mtls.conftest import CALLER, SERVER, STRANGER, Served, free_port, serving, until
from tests.spire.conftest import source_of
from tests.spire.load import load_on
from tests.spire.spire import TRUST_DOMAIN, Spire
from ztmtls.client import AsyncClient, ServerRefused, hop
from ztmtls.listen import PlainServer, bind
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority

from .conftest import bundle_file, expired, pem_file
from .envoy import (
    Config,
    egress,
    envoy,
    envoy_with,
    identity_from_agent,
    identity_from_files,
    ingress,
    only_tls,
)

US = f"unix:path:{os.path.realpath('/proc/self/exe')}"


def by_sds(spiffe_id: str, peer: str) -> Config:
    return only_tls("TLSv1_3", identity_from_agent(spiffe_id, TRUST_DOMAIN, peer))


async def register_envoy(spire: Spire, spiffe_id: str, **options: Any) -> None:
    await spire.register(spiffe_id, selector=f"unix:path:{envoy()}", **options)


# --- Envoy behind us: we call a service that knows no TLS ---------------------------------------------


@contextlib.asynccontextmanager
async def plain_application() -> AsyncIterator[int]:
    """An application without TLS; it repeats what Envoy says of the caller. Its port."""
    app = FastAPI(openapi_url=None)

    @app.api_route("/thing", methods=["GET", "POST"])
    async def thing(request: Request) -> dict[str, Any]:
        body = await request.body()
        return {"caller": request.headers.get("x-forwarded-client-cert"), "body": len(body)}

    with bind("127.0.0.1", 0, "PORT") as sock:
        server = PlainServer(app, sock)
        await server.start()
        try:
            yield int(sock.getsockname()[1])
        finally:
            await server.stop()


@contextlib.asynccontextmanager
async def envoy_before_an_application(
    identity: Config, folder: Path, spire: Spire | None = None
) -> AsyncIterator[str]:
    """Its URL."""
    port = free_port()
    agent = spire.folder / "agent.sock" if spire is not None else None
    async with (
        plain_application() as application,
        envoy_with(ingress(port, application, identity), folder, agent),
    ):
        yield f"https://127.0.0.1:{port}"


async def test_envoy_serves_us_and_refuses_another_caller(spire: Spire, tmp_path: Path) -> None:
    await register_envoy(spire, SERVER)
    await spire.register(CALLER, selector=US)
    await spire.register(STRANGER, selector=US)
    async with (
        envoy_before_an_application(by_sds(SERVER, CALLER), tmp_path, spire) as url,
        source_of(spire, CALLER) as source,
        source_of(spire, STRANGER) as stranger,
        AsyncClient(source, peer=SERVER, base_url=url) as client,
    ):
        response = await client.post("/thing", content=b"x" * 100_000)
        assert response.status_code == 200
        assert f"URI={CALLER}" in response.json()["caller"].split(";")
        assert response.json()["body"] == 100_000
        assert hop(response).peer.id == SERVER

        async with AsyncClient(stranger, peer=SERVER, base_url=url) as other:
            # `RefusedByServer` is one of these; a reset may overtake the alert, and then it is not that.
            with pytest.raises(httpx.ReadError):
                await other.get("/thing")
        assert (await client.get("/thing")).status_code == 200


async def test_we_refuse_an_envoy_with_another_identity(spire: Spire, tmp_path: Path) -> None:
    await register_envoy(spire, SERVER)
    await spire.register(CALLER, selector=US)
    async with (
        envoy_before_an_application(by_sds(SERVER, CALLER), tmp_path, spire) as url,
        source_of(spire, CALLER) as source,
        AsyncClient(source, peer=SERVER, base_url=url) as right,
        AsyncClient(source, peer=STRANGER, base_url=url) as wrong,
    ):
        assert (await right.get("/thing")).status_code == 200

        with pytest.raises(ServerRefused) as refused:
            await wrong.get("/thing")

    assert refused.value.reason is Reason.WRONG_SERVER_IDENTITY


@pytest.mark.parametrize("fault", ["another domain", "expired", "TLS 1.2"])
async def test_we_refuse_an_envoy(
    fault: str, caller: StaticSource, ca: CertificateAuthority, tmp_path: Path
) -> None:
    other = CertificateAuthority("other.example")
    svids = {
        "another domain": other.issue("spiffe://other.example/server"),
        "expired": expired(ca, SERVER),
        "TLS 1.2": ca.issue(SERVER),
    }
    reasons = {"another domain": Reason.UNTRUSTED_AUTHORITY, "expired": Reason.EXPIRED}
    bundle = bundle_file(tmp_path, "callers", ca.bundle)
    right = identity_from_files(pem_file(tmp_path, "right", ca.issue(SERVER)), bundle, CALLER)
    async with (
        envoy_before_an_application(only_tls("TLSv1_3", right), tmp_path) as url,
        AsyncClient(caller, peer=SERVER, base_url=url) as client,
    ):
        assert (await client.get("/thing")).status_code == 200
    wrong = identity_from_files(pem_file(tmp_path, "wrong", svids[fault]), bundle, CALLER)

    async with (
        envoy_before_an_application(
            only_tls("TLSv1_2" if fault == "TLS 1.2" else "TLSv1_3", wrong), tmp_path
        ) as url,
        AsyncClient(caller, peer=SERVER, base_url=url) as client,
    ):
        with pytest.raises(httpx.TransportError) as refused:
            await client.get("/thing")

    if fault in reasons:
        assert isinstance(refused.value, ServerRefused)
        assert refused.value.reason == reasons[fault]


async def test_nothing_fails_while_envoy_and_we_rotate(spire: Spire, tmp_path: Path) -> None:
    await register_envoy(spire, SERVER, ttl=20)
    await spire.register(CALLER, selector=US, ttl=20)
    async with (
        envoy_before_an_application(by_sds(SERVER, CALLER), tmp_path, spire) as url,
        source_of(spire, CALLER) as source,
        AsyncClient(source, peer=SERVER, base_url=url) as client,
        load_on(client) as load,
    ):
        await until(lambda: len(load.caller_serials) >= 3 and len(load.server_serials) >= 3, timeout=60)

    assert load.failed == {}


# --- Envoy before us: a program that knows no TLS calls us --------------------------------------------


@contextlib.asynccontextmanager
async def envoy_before_us(
    served: Served, identity: Config, folder: Path, spire: Spire | None = None, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A plain client of an Envoy that calls us."""
    port = free_port()
    agent = spire.folder / "agent.sock" if spire is not None else None
    async with (
        envoy_with(egress(port, served.port, identity, options), folder, agent),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        yield client


async def test_we_serve_envoy_and_tell_it_what_it_may_not(spire: Spire, tmp_path: Path) -> None:
    await register_envoy(spire, CALLER)
    await spire.register(SERVER, selector=US)
    async with (
        source_of(spire, SERVER) as source,
        serving(source) as served,
        envoy_before_us(served, by_sds(CALLER, SERVER), tmp_path, spire) as client,
    ):
        allowed = await client.post("/thing", content=b"x" * 100_000)
        assert allowed.status_code == 200
        assert allowed.json()["hop"]["peer"]["id"] == CALLER
        assert allowed.json()["body"] == 100_000

        denied = await client.get("/unlisted")
        assert denied.status_code == 403
        assert denied.json()["reason"] == Reason.ROUTE_NOT_ALLOWED


async def test_envoy_that_no_rule_names(spire: Spire, tmp_path: Path) -> None:
    await register_envoy(spire, CALLER)
    await register_envoy(spire, STRANGER)
    await spire.register(SERVER, selector=US)
    async with source_of(spire, SERVER) as source, serving(source) as served:
        async with envoy_before_us(served, by_sds(CALLER, SERVER), tmp_path, spire) as client:
            assert (await client.get("/thing")).status_code == 200

        async with envoy_before_us(served, by_sds(STRANGER, SERVER), tmp_path, spire) as client:
            denied = await client.get("/thing")

    assert denied.status_code == 403
    assert denied.json()["reason"] == Reason.CALLER_NOT_ALLOWED


async def test_envoy_refuses_us_under_another_name(spire: Spire, tmp_path: Path) -> None:
    await register_envoy(spire, CALLER)
    await spire.register(SERVER, selector=US)
    async with source_of(spire, SERVER) as source, serving(source) as served:
        async with envoy_before_us(served, by_sds(CALLER, SERVER), tmp_path, spire) as client:
            assert (await client.get("/thing")).status_code == 200

        async with envoy_before_us(served, by_sds(CALLER, STRANGER), tmp_path, spire) as client:
            refused = await client.get("/thing")

    assert refused.status_code == 503
    assert served.audit("deny")[-1]["event"] == "handshake"
    assert "alert" in served.audit("deny")[-1]["detail"]
    assert len(served.seen) == 1


@pytest.mark.parametrize("fault", ["another domain", "expired", "TLS 1.2", "no certificate"])
async def test_we_refuse_an_envoy_that_calls(
    fault: str, served: Served, ca: CertificateAuthority, tmp_path: Path
) -> None:
    bundle = bundle_file(tmp_path, "servers", ca.bundle)
    right = identity_from_files(pem_file(tmp_path, "right", ca.issue(CALLER)), bundle, SERVER)
    async with envoy_before_us(served, only_tls("TLSv1_3", right), tmp_path) as client:
        assert (await client.get("/thing")).status_code == 200
    svids = {
        "another domain": CertificateAuthority("other.example").issue("spiffe://other.example/caller"),
        "expired": expired(ca, CALLER),
        "TLS 1.2": ca.issue(CALLER),
        "no certificate": ca.issue(CALLER),
    }
    reasons = {
        "another domain": Reason.UNTRUSTED_AUTHORITY,
        "expired": Reason.EXPIRED,
        "TLS 1.2": Reason.TLS_FAILURE,
        "no certificate": Reason.NO_CERTIFICATE,
    }
    wrong = identity_from_files(pem_file(tmp_path, "wrong", svids[fault]), bundle, SERVER)
    if fault == "no certificate":
        del wrong["tls_certificates"]

    version = "TLSv1_2" if fault == "TLS 1.2" else "TLSv1_3"
    async with envoy_before_us(served, only_tls(version, wrong), tmp_path) as client:
        refused = await client.get("/thing")

    assert refused.status_code == 503
    await until(lambda: served.audit("deny"))
    assert served.audit("deny")[-1]["reason"] == reasons[fault]
    assert len(served.seen) == 1


async def test_nothing_fails_while_we_and_envoy_rotate(spire: Spire, tmp_path: Path) -> None:
    """Envoy keeps connections when its SVID changes, so it must be told to end them before the SVID does."""
    await register_envoy(spire, CALLER, ttl=20)
    await spire.register(SERVER, selector=US, ttl=20)
    async with (
        source_of(spire, SERVER) as source,
        serving(source) as served,
        envoy_before_us(
            served, by_sds(CALLER, SERVER), tmp_path, spire, max_connection_duration="4s"
        ) as client,
    ):
        callers: set[str] = set()
        statuses: set[int] = set()

        async with asyncio.timeout(60):
            while len(callers) < 3 or source.context.generation < 3:
                response = await client.get("/thing")
                statuses.add(response.status_code)
                if response.status_code == 200:
                    callers.add(response.json()["hop"]["peer"]["serial"])
                await asyncio.sleep(0.02)

    assert statuses == {200}


async def test_connection_that_envoy_keeps_past_the_end_of_its_svid_is_refused_once(
    spire: Spire, tmp_path: Path
) -> None:
    await register_envoy(spire, CALLER, ttl=12)
    await spire.register(SERVER, selector=US)
    async with (
        source_of(spire, SERVER) as source,
        serving(source) as served,
        envoy_before_us(served, by_sds(CALLER, SERVER), tmp_path, spire) as client,
    ):
        first = await client.get("/thing")
        assert first.status_code == 200

        async with asyncio.timeout(30):
            while (response := await client.get("/thing")).status_code == 200:
                assert response.json()["hop"]["connection"] == first.json()["hop"]["connection"]
                await asyncio.sleep(0.02)

        assert response.status_code == 401
        assert response.json()["reason"] == Reason.EXPIRED
        renewed = await client.get("/thing")
        assert renewed.status_code == 200
        assert renewed.json()["hop"]["peer"]["serial"] != first.json()["hop"]["peer"]["serial"]
