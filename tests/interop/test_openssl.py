"""OpenSSL's own client and server as peers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mtls.conftest import CALLER, DOMAIN, SERVER, STRANGER, Served, until
from ztmtls.client import AsyncClient, ServerRefused, hop
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority

from .conftest import Ended, bundle_file, expired, line_with, pem_file, program, run, running

OTHER_DOMAIN = "other.example"
REQUEST = "GET {path} HTTP/1.1\r\nhost: server\r\nconnection: close\r\n\r\n"


def openssl() -> Path:
    return program("openssl", "install Debian's package openssl")


class Caller:
    """`openssl s_client`, which trusts the server's authority."""

    def __init__(self, served: Served, folder: Path, ca: CertificateAuthority) -> None:
        self._served = served
        self._folder = folder
        self._bundle = bundle_file(folder, "trusted", ca.bundle)

    async def get(self, svid: X509Svid | None, *options: str, path: str = "/thing") -> Ended:
        certificate: list[object] = []
        if svid is not None:
            pem = pem_file(self._folder, "caller", svid)
            certificate = ["-cert", pem, "-key", pem, "-cert_chain", pem]
        return await run(
            openssl(),
            *("s_client", "-connect", f"127.0.0.1:{self._served.port}"),
            *("-CAfile", self._bundle, "-verify_return_error", "-quiet", "-ign_eof"),
            *certificate,
            *options,
            stdin=REQUEST.format(path=path),
        )


@pytest.fixture
async def client(served: Served, tmp_path: Path, ca: CertificateAuthority) -> Caller:
    """`s_client`, after it was seen to be served as the rightful caller."""
    client = Caller(served, tmp_path, ca)
    answer = await client.get(ca.issue(CALLER))
    assert answer.out.startswith("HTTP/1.1 200"), answer
    assert body_of(answer)["hop"]["peer"]["id"] == CALLER
    assert body_of(answer)["hop"]["tls_version"] == "TLSv1.3"
    return client


def body_of(answer: Ended) -> Any:
    return json.loads(answer.out.partition("\r\n\r\n")[2])


async def test_s_client_that_may_not_make_the_call_reads_why(
    client: Caller, ca: CertificateAuthority
) -> None:
    stranger = await client.get(ca.issue(STRANGER))
    elsewhere = await client.get(ca.issue(CALLER), path="/unlisted")

    assert stranger.out.startswith("HTTP/1.1 403")
    assert body_of(stranger)["reason"] == Reason.CALLER_NOT_ALLOWED
    assert elsewhere.out.startswith("HTTP/1.1 403")
    assert body_of(elsewhere)["reason"] == Reason.ROUTE_NOT_ALLOWED


@pytest.mark.parametrize(
    ("who", "alert", "reason"),
    [
        ("nobody", "certificate required", Reason.NO_CERTIFICATE),
        ("another domain", "unknown ca", Reason.UNTRUSTED_AUTHORITY),
        ("another authority", "unknown ca", Reason.UNTRUSTED_AUTHORITY),
        ("expired", "certificate expired", Reason.EXPIRED),
        ("TLS 1.2", "protocol version", Reason.TLS_FAILURE),
    ],
)
async def test_s_client_is_refused_in_the_handshake(
    who: str, alert: str, reason: Reason, client: Caller, served: Served, ca: CertificateAuthority
) -> None:
    svids = {
        "nobody": None,
        "another domain": CertificateAuthority(OTHER_DOMAIN).issue(f"spiffe://{OTHER_DOMAIN}/caller"),
        "another authority": CertificateAuthority(DOMAIN).issue(CALLER),
        "expired": expired(ca, CALLER),
        "TLS 1.2": ca.issue(CALLER),
    }
    handled = len(served.seen)

    answer = await client.get(svids[who], *(["-tls1_2"] if who == "TLS 1.2" else []))

    assert answer.out == ""
    assert f"alert {alert}" in answer.error
    await until(lambda: served.audit("deny"))
    assert served.audit("deny")[-1]["reason"] == reason
    assert len(served.seen) == handled


@contextlib.asynccontextmanager
async def s_server(
    folder: Path, svid: X509Svid, trusted: CertificateAuthority, *options: str
) -> AsyncIterator[str]:
    """`openssl s_server` that demands a certificate and answers each GET with a page; its URL."""
    pem = pem_file(folder, "server", svid)
    log = folder / "s_server.log"
    command = [openssl(), "s_server", "-accept", "127.0.0.1:0", "-www", "-naccept", "100"]
    command += ["-cert", pem, "-key", pem, "-cert_chain", pem]
    command += [
        "-CAfile",
        bundle_file(folder, "callers", trusted.bundle),
        "-Verify",
        "4",
        "-verify_return_error",
    ]
    async with running(*command, *options, log=log) as process:
        address = (await line_with(process, log, "ACCEPT ")).removeprefix("ACCEPT ")
        yield f"https://{address}"


async def get(url: str, source: StaticSource, peer: str = SERVER) -> Any:
    async with AsyncClient(source, peer=peer, base_url=url) as client:
        return await client.get("/")


async def test_s_server_is_called(caller: StaticSource, ca: CertificateAuthority, tmp_path: Path) -> None:
    svid = ca.issue(SERVER)
    async with s_server(tmp_path, svid, ca) as url, AsyncClient(caller, peer=SERVER, base_url=url) as client:
        # It closes after each answer, and offers session tickets, which are not taken up.
        first, second = await client.get("/"), await client.get("/")

    assert first.status_code == second.status_code == 200
    assert "TLSv1.3" in first.text
    assert "Reused, TLS" not in second.text
    assert hop(first).peer.id == SERVER
    assert hop(first).peer.serial == svid.serial


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("another workload", Reason.WRONG_SERVER_IDENTITY),
        ("another domain", Reason.UNTRUSTED_AUTHORITY),
        ("another authority", Reason.UNTRUSTED_AUTHORITY),
        ("expired", Reason.EXPIRED),
        ("without a SPIFFE ID", Reason.NO_URI_SAN),
    ],
)
async def test_s_server_with_a_wrong_identity_is_refused(
    who: str, reason: Reason, caller: StaticSource, ca: CertificateAuthority, tmp_path: Path
) -> None:
    svids = {
        "another workload": ca.issue(STRANGER),
        "another domain": CertificateAuthority(OTHER_DOMAIN).issue(f"spiffe://{OTHER_DOMAIN}/server"),
        "another authority": CertificateAuthority(DOMAIN).issue(SERVER),
        "expired": expired(ca, SERVER),
        "without a SPIFFE ID": ca.issue(SERVER, uris=(), dns_names=["127.0.0.1"]),
    }
    async with s_server(tmp_path, ca.issue(SERVER), ca) as url:
        assert (await get(url, caller)).status_code == 200

    async with s_server(tmp_path, svids[who], ca) as url:
        with pytest.raises(ServerRefused) as refused:
            await get(url, caller)

    assert refused.value.reason == reason


async def test_s_server_that_speaks_tls_1_2_only_is_refused(
    caller: StaticSource, ca: CertificateAuthority, tmp_path: Path
) -> None:
    async with s_server(tmp_path, ca.issue(SERVER), ca) as url:
        assert (await get(url, caller)).status_code == 200

    async with s_server(tmp_path, ca.issue(SERVER), ca, "-tls1_2") as url:
        with pytest.raises(Exception, match=r"(?i)protocol.version") as refused:
            await get(url, caller)
    assert not isinstance(refused.value, AssertionError)


async def test_s_server_that_trusts_others_refuses_us(
    caller: StaticSource, ca: CertificateAuthority, tmp_path: Path
) -> None:
    async with s_server(tmp_path, ca.issue(SERVER), ca) as url:
        assert (await get(url, caller)).status_code == 200

    async with s_server(tmp_path, ca.issue(SERVER), CertificateAuthority(OTHER_DOMAIN)) as url:
        # `RefusedByServer` is one of these; a reset may overtake the alert, and then it is not that.
        with pytest.raises(httpx.ReadError):
            await get(url, caller)
        log = tmp_path / "s_server.log"
        await until(lambda: "certificate verify failed" in log.read_text())
