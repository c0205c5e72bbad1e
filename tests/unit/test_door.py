"""TLS to a load balancer that has no certificate to show."""

from __future__ import annotations

import asyncio
import ssl
from datetime import timedelta

import httpx
import pytest
from cryptography import x509

from ztdev.ports import choose_free_ports
from ztmtls.door import DoorContext
from ztmtls.server import serve_public
from ztmtls.source import NoIdentity, StaticSource, X509Source
from ztmtls.testing import CertificateAuthority

pytestmark = pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")

FRONTEND = "spiffe://zt.example/ns/zt-demo/sa/frontend"


def balancer(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """As an application load balancer calls: it checks nothing, and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    return context


def presented(server: ssl.SSLContext, client: ssl.SSLContext) -> x509.Certificate:
    """The certificate that `server` presents."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(back, there)
    theirs = server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for end in (ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    der = ours.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_it_says_who_it_is_and_asks_nobody(version: ssl.TLSVersion) -> None:
    ca = CertificateAuthority("zt.example")
    svid = ca.issue(FRONTEND)
    context = DoorContext.of(StaticSource(ca.context(svid)))
    assert presented(context, balancer(version)).serial_number == svid.leaf.serial_number


def test_every_connection_has_the_newest_certificate() -> None:
    ca = CertificateAuthority("zt.example")
    source = StaticSource(ca.context(ca.issue(FRONTEND)))
    context = DoorContext.of(source)
    before = presented(context, balancer()).serial_number
    newer = ca.issue(FRONTEND, ttl=timedelta(minutes=5))
    source.set(ca.context(newer))
    assert presented(context, balancer()).serial_number == newer.leaf.serial_number != before


def test_what_is_older_than_tls_1_2_is_refused() -> None:
    ca = CertificateAuthority("zt.example")
    context = DoorContext.of(StaticSource(ca.context(ca.issue(FRONTEND))))
    with pytest.raises(ssl.SSLError):
        presented(context, balancer(ssl.TLSVersion.TLSv1_1))


def test_without_an_identity_no_handshake_ends_well() -> None:
    context = DoorContext.of(X509Source("unix:///nowhere/agent.sock"))
    with pytest.raises(NoIdentity):
        context.newest()
    with pytest.raises(ssl.SSLError):
        presented(context, balancer())


async def test_pages_are_served_over_it() -> None:
    async def page(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"a page"})  # type: ignore[operator]

    ca = CertificateAuthority("zt.example")
    source = StaticSource(ca.context(ca.issue(FRONTEND)))
    (port,) = choose_free_ports(1)
    serving = asyncio.create_task(
        serve_public(page, host="127.0.0.1", port=port, source=source)  # type: ignore[arg-type]
    )
    try:
        async with httpx.AsyncClient(verify=balancer()) as client:
            answer = await eventually(client, f"https://127.0.0.1:{port}/")
            assert answer.text == "a page"
        with pytest.raises(httpx.HTTPError):
            await httpx.AsyncClient().get(f"http://127.0.0.1:{port}/")
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def eventually(client: httpx.AsyncClient, url: str) -> httpx.Response:
    async with asyncio.timeout(10):
        while True:
            try:
                return await client.get(url)
            except httpx.ConnectError:
                await asyncio.sleep(0.05)
