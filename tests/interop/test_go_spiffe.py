"""go-spiffe, the reference implementation, as a peer: its identities come from `ztmtls.testing`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.mtls.conftest import CALLER, DOMAIN, SERVER, STRANGER, Served, serving, until
from tests.spire.conftest import source_of
from tests.spire.spire import Spire
from ztmtls.client import AsyncClient, ServerRefused, hop
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi

from .conftest import expired, line_with, program, run, running

OTHER_DOMAIN = "other.example"


def go_peer() -> Path:
    return program("interop/go-peer", "run `make test-interop`, which builds it")


@dataclass(frozen=True)
class Answer:
    """What go-spiffe's client made of one request."""

    status: int
    body: str
    error: str


async def go_get(endpoint: str, *urls: str, peer: str = SERVER) -> list[Answer]:
    environment = os.environ | {"SPIFFE_ENDPOINT_SOCKET": endpoint}
    ended = await run(go_peer(), "get", peer, *urls, env=environment)
    assert ended.status == 0, ended
    return [Answer(**json.loads(line)) for line in ended.out.splitlines()]


@contextlib.asynccontextmanager
async def go_server(endpoint: str, folder: Path, peer: str = CALLER) -> AsyncIterator[str]:
    """A go-spiffe server that lets `peer` in; its URL."""
    log = folder / "go-server.log"
    environment = os.environ | {"SPIFFE_ENDPOINT_SOCKET": endpoint}
    async with running(go_peer(), "serve", peer, log=log, env=environment) as process:
        yield await line_with(process, log, "https://")


@pytest.fixture
async def api() -> AsyncIterator[WorkloadApi]:
    async with WorkloadApi() as api:
        yield api


async def workload(api: WorkloadApi, name: str, spiffe_id: str, ca: CertificateAuthority) -> Workload:
    """A registered workload: every process of this user."""
    workload = await api.add_workload(name, spiffe_id, ca=ca)
    workload.allow(uid=os.getuid())
    return workload


@pytest.fixture
async def go_caller(api: WorkloadApi, ca: CertificateAuthority) -> Workload:
    return await workload(api, "caller", CALLER, ca)


@pytest.fixture
async def go_callee(api: WorkloadApi, ca: CertificateAuthority) -> Workload:
    return await workload(api, "server", SERVER, ca)


def push_expired(workload: Workload, ca: CertificateAuthority) -> None:
    """From now on the workload gets an SVID that ran out an hour ago."""
    workload.push(expired(ca, str(workload.spiffe_id)))


# --- it calls us --------------------------------------------------------------------------------------


async def test_go_client_is_served_and_told_what_it_may_not(served: Served, go_caller: Workload) -> None:
    allowed, denied = await go_get(go_caller.endpoint, f"{served.url}/thing", f"{served.url}/unlisted")

    assert allowed.status == 200
    assert json.loads(allowed.body)["hop"]["peer"]["id"] == CALLER
    assert json.loads(allowed.body)["hop"]["peer"]["serial"] == go_caller.svid.serial
    assert denied.status == 403
    assert json.loads(denied.body)["reason"] == Reason.ROUTE_NOT_ALLOWED


async def test_go_client_that_no_rule_names(
    served: Served, go_caller: Workload, api: WorkloadApi, ca: CertificateAuthority
) -> None:
    stranger = await workload(api, "stranger", STRANGER, ca)
    [right] = await go_get(go_caller.endpoint, f"{served.url}/thing")
    assert right.status == 200

    [wrong] = await go_get(stranger.endpoint, f"{served.url}/thing")

    assert wrong.status == 403
    assert json.loads(wrong.body)["reason"] == Reason.CALLER_NOT_ALLOWED


async def test_go_client_refuses_us_under_another_name(served: Served, go_caller: Workload) -> None:
    [right] = await go_get(go_caller.endpoint, f"{served.url}/thing")
    assert right.status == 200

    [wrong] = await go_get(go_caller.endpoint, f"{served.url}/thing", peer=STRANGER)

    assert f'unexpected ID "{SERVER}"' in wrong.error
    assert len(served.seen) == 1


@pytest.mark.parametrize("who", ["another domain", "another authority", "expired"])
async def test_go_client_is_refused_in_the_handshake(
    who: str, served: Served, go_caller: Workload, api: WorkloadApi, ca: CertificateAuthority
) -> None:
    url = f"{served.url}/thing"
    [right] = await go_get(go_caller.endpoint, url)
    assert right.status == 200
    other = CertificateAuthority(DOMAIN if who == "another authority" else OTHER_DOMAIN)
    wrong_workload = go_caller
    if who == "expired":
        push_expired(go_caller, ca)
    elif who == "another domain":
        wrong_workload = await workload(api, "wrong", f"spiffe://{OTHER_DOMAIN}/caller", other)
        wrong_workload.set_federation(ca)
    else:
        # Signed by an authority of its own, yet it trusts ours: else it would not get that far.
        go_caller.push(other.issue(CALLER), bundle=ca.bundle)

    [wrong] = await go_get(wrong_workload.endpoint, url)

    assert "remote error: tls:" in wrong.error
    await until(lambda: served.audit("deny"))
    expected = Reason.EXPIRED if who == "expired" else Reason.UNTRUSTED_AUTHORITY
    assert served.audit("deny")[-1]["reason"] == expected
    assert len(served.seen) == 1


# --- we call it ---------------------------------------------------------------------------------------


async def test_go_server_is_called_and_may_rotate(
    caller: StaticSource, go_callee: Workload, tmp_path: Path
) -> None:
    async with (
        go_server(go_callee.endpoint, tmp_path) as url,
        AsyncClient(caller, peer=SERVER, base_url=url) as client,
    ):
        first = await client.get("/")
        second = await client.post("/", content=b"x" * 100_000)
        assert first.text == f"{CALLER} sent 0 bytes"
        assert second.text == f"{CALLER} sent 100000 bytes"
        assert hop(second).peer.id == SERVER
        assert hop(second).peer.serial == go_callee.svid.serial
        assert hop(first).connection == hop(second).connection

        rotated = go_callee.rotate()
        await go_callee.wait_for_delivery()

        async def newcomer_sees_it() -> bool:
            async with AsyncClient(caller, peer=SERVER, base_url=url) as newcomer:
                return hop(await newcomer.get("/")).peer.serial == rotated.serial

        async with asyncio.timeout(10):
            while not await newcomer_sees_it():
                pass


async def test_go_server_refuses_us(
    caller: StaticSource, ca: CertificateAuthority, go_callee: Workload, tmp_path: Path
) -> None:
    stranger = StaticSource(ca.context(ca.issue(STRANGER)))
    async with go_server(go_callee.endpoint, tmp_path) as url:
        async with AsyncClient(caller, peer=SERVER, base_url=url) as client:
            assert (await client.get("/")).status_code == 200
        async with AsyncClient(stranger, peer=SERVER, base_url=url) as client:
            # `RefusedByServer` is one of these; a reset may overtake the alert, and then it is not that.
            with pytest.raises(httpx.ReadError):
                await client.get("/")
        log = tmp_path / "go-server.log"
        await until(lambda: f'unexpected ID "{STRANGER}"' in log.read_text())


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("another workload", Reason.WRONG_SERVER_IDENTITY),
        ("another domain", Reason.UNTRUSTED_AUTHORITY),
        ("expired", Reason.EXPIRED),
    ],
)
async def test_go_server_with_a_wrong_identity_is_refused(
    who: str,
    reason: Reason,
    caller: StaticSource,
    ca: CertificateAuthority,
    api: WorkloadApi,
    go_callee: Workload,
    tmp_path: Path,
) -> None:
    async with (
        go_server(go_callee.endpoint, tmp_path) as url,
        AsyncClient(caller, peer=SERVER, base_url=url) as client,
    ):
        assert (await client.get("/")).status_code == 200
    wrong = go_callee
    if who == "another workload":
        wrong = await workload(api, "wrong", STRANGER, ca)
    elif who == "another domain":
        other = CertificateAuthority(OTHER_DOMAIN)
        wrong = await workload(api, "wrong", f"spiffe://{OTHER_DOMAIN}/server", other)
    else:
        push_expired(go_callee, ca)

    async with (
        go_server(wrong.endpoint, tmp_path) as url,
        AsyncClient(caller, peer=SERVER, base_url=url) as client,
    ):
        with pytest.raises(ServerRefused) as refused:
            await client.get("/")

    assert refused.value.reason == reason


# --- both under SPIRE ---------------------------------------------------------------------------------


async def test_both_ways_under_one_spire(spire: Spire, tmp_path: Path) -> None:
    """We are the server towards Go and the caller of Go; SPIRE tells us apart by our programs' paths."""
    ours, theirs = SERVER, CALLER
    await spire.register(ours, selector=f"unix:path:{os.path.realpath('/proc/self/exe')}")
    await spire.register(theirs, selector=f"unix:path:{go_peer()}")

    async with source_of(spire, ours) as source, serving(source) as served:
        [answer] = await go_get(spire.endpoint, f"{served.url}/thing", peer=ours)
        assert answer.status == 200, answer
        assert json.loads(answer.body)["hop"]["peer"]["id"] == theirs

        async with (
            go_server(spire.endpoint, tmp_path, peer=ours) as url,
            AsyncClient(source, peer=theirs, base_url=url) as client,
        ):
            response = await client.get("/")
        assert response.text == f"{ours} sent 0 bytes"
        assert hop(response).peer.id == theirs
