"""The session for programs written for `requests`: no way around our own TLS."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests
from starlette.applications import Starlette
from starlette.responses import RedirectResponse
from starlette.routing import Route

from tests.mtls.conftest import CALLER, SERVER, STRANGER, Served, serving
from ztmtls import Reason, StaticSource
from ztmtls.audit import AuditLog
from ztmtls.requests import NoIdentityError, RefusedByServer, ServerRefused, Session, hop
from ztmtls.testing import CertificateAuthority


@pytest.fixture
def session(caller: StaticSource) -> Iterator[Session]:
    with Session(caller, peer=SERVER) as session:
        yield session


async def get(session: requests.Session, url: str, **more: object) -> requests.Response:
    return await asyncio.to_thread(session.get, url, **more)  # type: ignore[arg-type]


async def test_both_sides_know_each_other(served: Served, session: Session) -> None:
    response = await get(session, f"{served.url}/thing")

    assert response.json()["hop"]["peer"]["id"] == CALLER
    assert hop(response).peer.id == SERVER


async def test_connections_are_used_again(served: Served, session: Session) -> None:
    first, second = [await get(session, f"{served.url}/thing") for _ in range(2)]
    assert hop(first).connection == hop(second).connection


async def test_a_new_identity_means_a_new_connection(
    served: Served, session: Session, ca: CertificateAuthority, caller: StaticSource
) -> None:
    before = await get(session, f"{served.url}/thing")

    caller.set(ca.context(ca.issue(CALLER)))
    after = await get(session, f"{served.url}/thing")

    assert hop(before).connection != hop(after).connection
    assert after.json()["hop"]["peer"]["serial"] == caller.context.svid.serial != hop(before).own.serial


async def test_a_server_with_another_identity_receives_nothing(
    served: Served, caller: StaticSource, session: Session
) -> None:
    assert (await get(session, f"{served.url}/thing")).ok
    audit = io.StringIO()

    with (
        Session(caller, peer=STRANGER, audit=AuditLog("caller", audit)) as wrong,
        pytest.raises(ServerRefused) as refused,
    ):
        await get(wrong, f"{served.url}/thing")

    assert refused.value.reason is Reason.WRONG_SERVER_IDENTITY
    assert json.loads(audit.getvalue())["reason"] == Reason.WRONG_SERVER_IDENTITY
    assert len(served.seen) == 1


@pytest.mark.parametrize("verify", [False, "/etc/ssl/certs/ca-certificates.crt"])
async def test_verify_changes_nothing(
    served: Served, session: Session, caller: StaticSource, verify: object
) -> None:
    assert (await get(session, f"{served.url}/thing", verify=verify)).ok
    with Session(caller, peer=STRANGER) as wrong, pytest.raises(ServerRefused):
        await get(wrong, f"{served.url}/thing", verify=verify)


async def test_an_unknown_authority_is_refused(
    served: Served, session: Session, ca: CertificateAuthority, caller: StaticSource
) -> None:
    assert (await get(session, f"{served.url}/thing")).ok
    impostor = CertificateAuthority("zt.example")
    async with serving(StaticSource(impostor.context(impostor.issue(SERVER)))) as other:
        with pytest.raises(ServerRefused) as refused:
            await get(session, f"{other.url}/thing")
        assert refused.value.reason is Reason.UNTRUSTED_AUTHORITY
        assert other.seen == []


async def test_a_pooled_connection_is_left_when_its_server_is_no_longer_acceptable(
    served: Served, session: Session, ca: CertificateAuthority, caller: StaticSource
) -> None:
    assert (await get(session, f"{served.url}/thing")).ok
    ca.prepare()
    ca.activate()
    ca.revoke(ca.authorities[0])
    caller.set(ca.context(ca.issue(CALLER)))

    with pytest.raises(ServerRefused) as refused:
        await get(session, f"{served.url}/thing")

    assert refused.value.reason is Reason.UNTRUSTED_AUTHORITY
    assert len(served.seen) == 1


async def test_a_server_that_refuses_our_certificate_says_so(
    served: Served, session: Session, ca: CertificateAuthority
) -> None:
    assert (await get(session, f"{served.url}/thing")).ok
    impostor = CertificateAuthority("zt.example")
    unknown = StaticSource(ca.context(impostor.issue(CALLER)))

    with Session(unknown, peer=SERVER) as wrong, pytest.raises(RefusedByServer) as refused:
        await get(wrong, f"{served.url}/thing")

    assert refused.value.reason is Reason.REFUSED_BY_SERVER


async def test_a_refusal_that_was_being_handled_is_no_cause_of_what_fails_next(
    served: Served, session: Session, caller: StaticSource
) -> None:
    async def say_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"this is no TLS\r\n")
        writer.close()

    def ask_while_handling_a_refusal(url: str) -> None:
        with Session(caller, peer=STRANGER) as wrong:
            try:
                wrong.get(f"{served.url}/thing")
            except ServerRefused:
                session.get(url)

    assert (await get(session, f"{served.url}/thing")).ok
    async with await asyncio.start_server(say_hello, "127.0.0.1", 0) as plain:
        url = f"https://127.0.0.1:{plain.sockets[0].getsockname()[1]}"
        with pytest.raises(requests.exceptions.SSLError) as failed:
            await asyncio.to_thread(ask_while_handling_a_refusal, url)
    assert not isinstance(failed.value, ServerRefused)


async def test_without_an_identity_nothing_is_sent(
    served: Served, session: Session, caller: StaticSource
) -> None:
    assert (await get(session, f"{served.url}/thing")).ok
    caller.deny()
    with pytest.raises(NoIdentityError) as refused:
        await get(session, f"{served.url}/thing")
    assert refused.value.reason is Reason.IDENTITY_DENIED
    assert len(served.seen) == 1


async def test_plain_http_is_refused(served: Served, session: Session) -> None:
    assert (await get(session, f"{served.url}/thing")).ok
    with pytest.raises(requests.exceptions.InvalidSchema):
        await get(session, served.url.replace("https", "http"))


async def test_redirects_are_not_followed(server_source: StaticSource, session: Session) -> None:
    app = Starlette(routes=[Route("/thing", lambda request: RedirectResponse("https://127.0.0.1:1/"))])
    async with serving(server_source, app=app) as served:
        response = await get(session, f"{served.url}/thing", allow_redirects=True)
        assert response.status_code == 307


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(502)

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


async def test_proxies_are_not_used(
    served: Served, session: Session, proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = proxy
    with pytest.raises(requests.exceptions.ProxyError):
        await asyncio.to_thread(requests.get, "https://127.0.0.1:1/", proxies={"https": address})
    assert asked  # the proxy is there

    monkeypatch.setenv("HTTPS_PROXY", address)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert (await get(session, f"{served.url}/thing")).ok
    with pytest.raises(requests.exceptions.ProxyError):
        await get(session, f"{served.url}/thing", proxies={"https": address})
    assert len(asked) == 1
