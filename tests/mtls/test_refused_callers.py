"""Who a server refuses. Every test first shows the rightful call succeeding on the same server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from ztmtls.authz import exact
from ztmtls.client import RefusedByServer
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Context, X509Svid
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import TlsRefused, client_context, server_context

from .conftest import CALLER, DOMAIN, SERVER, STRANGER, Served, serving, until

LEAF_USAGE = {"digital_signature", "key_encipherment", "key_agreement"}


async def assert_rightful_call_succeeds(served: Served, caller: StaticSource) -> None:
    async with served.client(caller) as client:
        response = await client.post("/thing", content=b"hello")
    assert response.status_code == 200, response.text
    assert response.json()["hop"]["peer"]["id"] == CALLER


async def assert_handshake_refused(served: Served, wrong: StaticSource, reason: Reason) -> None:
    handled = len(served.seen)
    async with served.client(wrong) as client:
        with pytest.raises(httpx.TransportError):
            await client.post("/thing", content=b"hello")
    await until(lambda: served.audit("deny"))
    line = served.audit("deny")[-1]
    assert (line["event"], line["reason"]) == ("handshake", reason)
    assert len(served.seen) == handled, "no handler may run"


class Reckless(StaticSource):
    """Presents what it has, also when that has expired."""

    @property
    def context(self) -> X509Context:
        assert self._snapshot is not None
        return self._snapshot


def presenting(svid: X509Svid, ca: CertificateAuthority) -> StaticSource:
    """A caller that presents `svid`, whatever it is, and trusts the server's domain."""
    return Reckless(ca.context(svid))


async def test_no_client_certificate(served: Served, caller: StaticSource) -> None:
    await assert_rightful_call_succeeds(served, caller)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # an attacker does not care who answers
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
    writer.write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
        await reader.read()
    writer.close()
    assert served.audit("deny")[-1]["reason"] == Reason.NO_CERTIFICATE
    assert len(served.seen) == 1


async def test_certificate_of_another_ca_with_the_same_domain_name(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    await assert_rightful_call_succeeds(served, caller)
    other = CertificateAuthority(DOMAIN)
    await assert_handshake_refused(served, presenting(other.issue(CALLER), ca), Reason.UNTRUSTED_AUTHORITY)


async def test_a_refused_caller_is_told_so_in_tls(served: Served, ca: CertificateAuthority) -> None:
    other = CertificateAuthority(DOMAIN)
    async with served.client(presenting(other.issue(CALLER), ca)) as client:
        with pytest.raises(RefusedByServer) as refused:
            await client.post("/thing", content=b"x" * 100_000)
    assert refused.value.reason is Reason.REFUSED_BY_SERVER


async def test_workload_of_a_federated_domain_passes_tls_and_is_stopped_by_the_policy(
    ca: CertificateAuthority, caller: StaticSource, server_source: StaticSource
) -> None:
    friend = CertificateAuthority("friend.example")
    server_source.set(ca.context(*server_source.context.svids, federates_with=[friend]))
    async with serving(server_source) as served:
        await assert_rightful_call_succeeds(served, caller)
        source = StaticSource(
            friend.context(friend.issue("spiffe://friend.example/ns/zt-demo/sa/caller"), federates_with=[ca])
        )
        async with served.client(source) as client:
            response = await client.get("/thing")
        assert response.status_code == 403
        assert response.json()["reason"] == Reason.CALLER_NOT_ALLOWED


async def test_federated_authority_can_not_vouch_for_our_domain(
    ca: CertificateAuthority, caller: StaticSource, server_source: StaticSource
) -> None:
    friend = CertificateAuthority("friend.example")
    server_source.set(ca.context(*server_source.context.svids, federates_with=[friend]))
    async with serving(server_source) as served:
        await assert_rightful_call_succeeds(served, caller)
        await assert_handshake_refused(
            served, presenting(friend.issue(CALLER), ca), Reason.UNTRUSTED_AUTHORITY
        )
        await assert_handshake_refused(
            served,
            presenting(ca.issue("spiffe://friend.example/ns/zt-demo/sa/caller"), ca),
            Reason.UNTRUSTED_AUTHORITY,
        )


async def test_id_of_a_domain_without_a_bundle(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    await assert_rightful_call_succeeds(served, caller)
    await assert_handshake_refused(
        served,
        presenting(ca.issue("spiffe://zt.examp1e/ns/zt-demo/sa/caller"), ca),
        Reason.UNKNOWN_TRUST_DOMAIN,
    )


@pytest.mark.parametrize(
    ("reason", "shape"),
    [
        (Reason.EXPIRED, {"not_before": timedelta(hours=-2), "not_after": timedelta(hours=-1)}),
        (Reason.NOT_YET_VALID, {"not_before": timedelta(hours=1), "not_after": timedelta(hours=2)}),
        (Reason.NO_URI_SAN, {"uris": [], "dns_names": ["caller.zt.example"]}),
        (Reason.LEAF_CAN_SIGN_CRLS, {"key_usage": LEAF_USAGE | {"crl_sign"}}),
        (Reason.LEAF_WITHOUT_DIGITAL_SIGNATURE, {"key_usage": None}),
        (Reason.ROOT_PATH_ID, {"uris": ["spiffe://zt.example"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": ["spiffe://ZT.example/ns/zt-demo/sa/caller"]}),
        (Reason.INVALID_SPIFFE_ID, {"uris": ["https://zt.example/ns/zt-demo/sa/caller"]}),
    ],
    ids=lambda value: str(value) if isinstance(value, Reason) else next(iter(value)),
)
async def test_certificate_that_breaks_the_svid_profile(
    served: Served, caller: StaticSource, ca: CertificateAuthority, reason: Reason, shape: dict[str, Any]
) -> None:
    await assert_rightful_call_succeeds(served, caller)
    now = datetime.now(UTC)
    shape = {k: now + v if isinstance(v, timedelta) else v for k, v in shape.items()}
    await assert_handshake_refused(served, presenting(ca.issue(CALLER, **shape), ca), reason)


async def test_dns_name_beside_the_one_spiffe_id_does_not_matter(
    served: Served, ca: CertificateAuthority
) -> None:
    await assert_rightful_call_succeeds(
        served, presenting(ca.issue(CALLER, dns_names=["anything.example"]), ca)
    )


async def test_verified_workload_that_no_rule_names(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    await assert_rightful_call_succeeds(served, caller)
    async with served.client(presenting(ca.issue(STRANGER), ca)) as client:
        response = await client.post("/thing", content=b"hello")
    assert response.status_code == 403
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["reason"] == Reason.CALLER_NOT_ALLOWED
    line = served.audit("deny")[-1]
    assert (line["reason"], line["peer_id"], line["path"]) == (Reason.CALLER_NOT_ALLOWED, STRANGER, "/thing")
    assert len(served.seen) == 1


@pytest.mark.parametrize(
    ("method", "path", "reason"),
    [
        ("GET", "/unlisted", Reason.ROUTE_NOT_ALLOWED),
        ("DELETE", "/thing", Reason.ROUTE_NOT_ALLOWED),
        ("POST", "/things/1", Reason.ROUTE_NOT_ALLOWED),
        ("GET", "/thing/", Reason.ROUTE_NOT_ALLOWED),
        ("GET", "/things/", Reason.ROUTE_NOT_ALLOWED),
        ("GET", "/things/a/b", Reason.ROUTE_NOT_ALLOWED),
        ("GET", "/things/a%2fb", Reason.AMBIGUOUS_PATH),
        ("GET", "/things/%2e%2e/unlisted", Reason.AMBIGUOUS_PATH),
        ("GET", "//thing", Reason.AMBIGUOUS_PATH),
        ("GET", "/docs", Reason.ROUTE_NOT_ALLOWED),
    ],
)
async def test_right_caller_on_a_route_no_rule_allows(
    served: Served, caller: StaticSource, method: str, path: str, reason: Reason
) -> None:
    await assert_rightful_call_succeeds(served, caller)
    async with served.client(caller) as client:
        response = await client.request(method, httpx.URL(served.url + path))
    assert (response.status_code, response.json()["reason"]) == (403, reason)
    assert served.audit("deny")[-1]["reason"] == reason
    assert len(served.seen) == 1


async def test_plain_http_to_the_mtls_port(served: Served, caller: StaticSource) -> None:
    await assert_rightful_call_succeeds(served, caller)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        answer = await reader.read()
    assert b"HTTP" not in answer
    writer.close()
    await until(lambda: served.audit("deny"))
    assert served.audit("deny")[-1]["reason"] == Reason.NOT_TLS
    assert len(served.seen) == 1


async def test_forged_identity_headers_change_nothing(
    served: Served, caller: StaticSource, ca: CertificateAuthority
) -> None:
    await assert_rightful_call_succeeds(served, caller)
    forged = {
        "X-Forwarded-Client-Cert": f"URI={CALLER}",
        "X-SPIFFE-ID": CALLER,
        "X-Client-Verify": "SUCCESS",
        "X-Forwarded-For": "127.0.0.1",
        "Forwarded": "for=127.0.0.1;proto=https",
    }
    async with served.client(presenting(ca.issue(STRANGER), ca)) as client:
        response = await client.get("/thing", headers=forged)
    assert (response.status_code, response.json()["reason"]) == (403, Reason.CALLER_NOT_ALLOWED)
    async with served.client(caller) as client:
        response = await client.get("/thing", headers={"X-SPIFFE-ID": STRANGER})
    assert response.json()["hop"]["peer"]["id"] == CALLER


async def test_outer_allow_list_refuses_in_the_handshake(
    ca: CertificateAuthority, caller: StaticSource, server_source: StaticSource
) -> None:
    async with serving(server_source, allowed_peers=exact(CALLER)) as served:
        await assert_rightful_call_succeeds(served, caller)
        await assert_handshake_refused(served, presenting(ca.issue(STRANGER), ca), Reason.CALLER_NOT_ALLOWED)


async def test_tls_1_2_is_not_spoken(served: Served, caller: StaticSource) -> None:
    await assert_rightful_call_succeeds(served, caller)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # an attacker does not care who answers
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        await asyncio.open_connection("127.0.0.1", served.port, ssl=context)


async def test_blocking_sockets_pass_no_byte_before_our_own_check(
    ca: CertificateAuthority, caller: StaticSource, server_source: StaticSource
) -> None:
    """A handshake that OpenSSL would finish inside a read must not skip the verification."""
    context = server_context(server_source, authorizer=exact(CALLER))

    def answer(listener: ssl.SSLSocket) -> bytes:
        peer, _ = listener.accept()
        with peer:
            return peer.recv(100)

    def serve_once(source: StaticSource, on_connect: bool) -> bytes:
        with (
            socket.create_server(("127.0.0.1", 0)) as plain,
            context.wrap_socket(plain, server_side=True, do_handshake_on_connect=on_connect) as listener,
            ThreadPoolExecutor(1) as pool,
        ):
            answered = pool.submit(answer, listener)
            with socket.create_connection(listener.getsockname()) as raw, contextlib.suppress(OSError):
                client = client_context(source, exact(SERVER)).wrap_socket(raw)
                client.sendall(b"hello")
                client.close()
            return answered.result(10)

    assert await asyncio.to_thread(serve_once, caller, True) == b"hello"
    for on_connect in (True, False):
        with pytest.raises(TlsRefused):
            await asyncio.to_thread(serve_once, presenting(ca.issue(STRANGER), ca), on_connect)
