"""Trouble with connections: those that are open too long, sessions taken up again, a rejection misread."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import time

import httpx
import pytest

from tests.conformance.peers import plain_context
from tests.mtls.conftest import CALLER, DOMAIN, SERVER, Served, serving, until
from tests.mtls.test_live_closing import Raw, SlowApp, ask, change_authority, closed_after, connect
from tests.mtls.test_refused_callers import presenting
from tests.spire.load import Load, load_on
from ztmtls.client import Client, NoIdentityError, RefusedByServer
from ztmtls.live import LiveLimits
from ztmtls.reasons import Reason
from ztmtls.source import Source, StaticSource, X509Source
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority, WorkloadApi
from ztmtls.testing.ca import with_other_key

from .conftest import identity, leaf_of, service

# --- connections that go on ---------------------------------------------------------------------------

LIMITS = LiveLimits(splay=0.5, grace=0.5)
CLOSED_WITHIN = 5.0


def held(source: Source) -> StaticSource:
    """A caller that goes on with what it has now, whatever becomes of it."""
    return StaticSource(source.context)


async def last_answer(raw: Raw) -> float:
    """Ask on and on; when the last request was sent that was not refused nor met the end."""
    served = 0.0
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            sent = time.time()
            if (await ask(raw))[0] != 200:
                break
            served = sent
    raw[1].close()
    return served


async def moved_on(load: Load) -> None:
    """Wait until what was under way has ended: a handshake goes on with the bundle that it began with."""
    before = load.served
    await until(lambda: load.served > before + 20, 15)


def authorities(source: X509Source) -> int:
    return source.status().authorities[DOMAIN]


async def test_open_connections_do_not_outlive_svid_authorization_or_authority(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    """TLS checks certificates in the handshake only: kept connections went on for hours with expired ones.

    Here no request is served under a certificate that has run out, a caller whose entry was deleted ends
    with its last SVID, connections under a removed authority are closed, streams too; and none of this
    fails a request of a caller that follows.
    """
    async with (
        identity(api, ca, "server", SERVER) as (server_workload, server),
        identity(api, ca, "caller", CALLER) as (caller_workload, caller),
        serving(server, live_limits=LIMITS) as served,
        served.client(caller) as client,
        load_on(client) as load,
    ):
        rotation = api.keep_rotating(ca, svid_ttl=6.0)
        for workload in (server_workload, caller_workload):
            workload.rotate(ttl=6.0)
        await until(lambda: caller.context.svid.serial == caller_workload.svid.serial)

        # The SVID: a steady caller that keeps its connection, and the one that follows.
        expires = caller.context.svid.expires
        assert await last_answer(await connect(served, held(caller))) <= expires
        assert time.time() >= expires
        await until(lambda: len(load.caller_serials) > 3 and len(load.server_serials) > 3, 30)

        # The authority: nobody asks anything on this connection.
        await rotation.stop()
        caller_workload.rotate(ttl=600)
        server_workload.rotate(ttl=600)
        left = await connect(served, presenting(ca.issue(CALLER, ttl=600), ca))
        assert (await ask(left))[0] == 200
        former = ca.active
        ca.prepare()
        await until(lambda: authorities(server) == authorities(caller) == 2)
        await moved_on(load)
        ca.activate()
        serials = {server_workload.rotate(ttl=600).serial, caller_workload.rotate(ttl=8).serial}
        await until(lambda: serials <= load.server_serials | load.caller_serials)
        await moved_on(load)
        ca.retire(former)
        assert await closed_after(left) < CLOSED_WITHIN
        await moved_on(load)
        assert load.failed == {}

        # The authorization: the entry is gone, and with it the caller at the end of what it still has.
        expires, connection = caller.context.svid.expires, await connect(served, held(caller))
        caller_workload.redact()
        assert await last_answer(connection) <= expires
        with pytest.raises(NoIdentityError):
            await client.get("/thing")

    lines = [line for line in served.audit("allow") if line["event"] == "request"]
    assert len(lines) > 100
    for line in lines:
        assert line["time"] <= line["peer_not_after"], line


async def read_to_its_end(response: httpx.Response) -> None:
    async for _ in response.aiter_lines():
        pass


async def test_stream_does_not_outlive_the_svid_and_opens_again(
    api: WorkloadApi, ca: CertificateAuthority, server_source: StaticSource
) -> None:
    """An event stream is one request that has no end, so nothing ever asked again who reads it."""
    slow = SlowApp()
    async with (
        identity(api, ca, "caller", CALLER, ttl=3) as (workload, caller),
        serving(server_source, app=slow.app, live_limits=LIMITS) as served,
        served.client(caller) as client,
    ):
        expires = caller.context.svid.expires
        async with client.stream("GET", "/things/events") as response:
            assert response.status_code == 200
            workload.rotate(ttl=600)
            with pytest.raises(httpx.TransportError):
                await read_to_its_end(response)
        assert expires <= time.time() < expires + CLOSED_WITHIN
        async with client.stream("GET", "/things/events") as response:
            assert await anext(response.aiter_lines()) == "data: tick"


# --- sessions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("meanwhile", ["nothing", "own SVID rotated", "caller's authority removed"])
async def test_resumed_session_does_not_skip_expiry_and_authority_checks(
    ca: CertificateAuthority, server_source: StaticSource, meanwhile: str
) -> None:
    """Clients with an expired certificate got in by resuming a session that was made while it was good.

    Here there are no tickets: each connection is a full handshake, and that one is refused.
    """
    removed = meanwhile == "caller's authority removed"
    svid = ca.issue(CALLER, ttl=600 if removed else 2)
    context = plain_context(ssl.PROTOCOL_TLS_CLIENT, svid, None)
    async with serving(server_source) as served:

        def connect(session: ssl.SSLSession | None) -> tuple[bytes, bool, ssl.SSLSession | None]:
            """The first bytes of an answer, whether the session was resumed, and the session to keep."""

            raw = socket.create_connection(("127.0.0.1", served.port))
            with context.wrap_socket(raw, session=session) as tls:
                answer = b""
                with contextlib.suppress(OSError):
                    tls.sendall(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
                    answer = tls.recv(12)
                return answer, bool(tls.session_reused), tls.session

        answer, _, session = await asyncio.to_thread(connect, None)
        assert answer == b"HTTP/1.1 200"
        assert session is None or not session.has_ticket
        answer, resumed, session = await asyncio.to_thread(connect, session)
        assert (answer, resumed) == (b"HTTP/1.1 200", False)
        handled = len(served.seen)

        if removed:
            change_authority(ca, server_source)
        else:
            await until(lambda: time.time() > svid.expires)
        if meanwhile == "own SVID rotated":
            server_source.set(ca.context(ca.issue(SERVER)))

        answer, resumed, _ = await asyncio.to_thread(connect, session)
        assert (answer, resumed) == (b"", False)
        assert len(served.seen) == handled
        line = served.audit("deny")[-1]
        assert line["event"] == "handshake"
        assert line["reason"] == (Reason.UNTRUSTED_AUTHORITY if removed else Reason.EXPIRED)


# --- a rejection that looks like a broken network -----------------------------------------------------


@pytest.mark.parametrize("rejected", ["expired", "another CA"])
@pytest.mark.parametrize("blocking", [False, True], ids=["async", "blocking"])
async def test_rejection_of_our_certificate_is_no_network_fault_and_is_not_retried(
    ca: CertificateAuthority, server_source: StaticSource, caller: StaticSource, rejected: str, blocking: bool
) -> None:
    """Under TLS 1.3 the server's no arrives after the client's handshake, as an error of the first read.

    Callers took that for a network fault and tried for ever. Here it is said to be a refusal of our
    certificate, and a POST is sent once.
    """
    other = CertificateAuthority(DOMAIN)
    wrong = presenting(ca.issue(CALLER, ttl=-1) if rejected == "expired" else other.issue(CALLER), ca)
    body = b"x" * (1 << 20)

    async def post(served: Served, source: Source) -> int:
        if not blocking:
            async with served.client(source) as client:
                return (await client.post("/thing", content=body)).status_code

        def call() -> int:
            with Client(source, peer=SERVER, base_url=served.url) as client:
                return client.post("/thing", content=body).status_code

        return await asyncio.to_thread(call)

    async with serving(server_source) as served:
        assert await post(served, caller) == 200
        with pytest.raises(RefusedByServer) as refused:
            await post(served, wrong)
        assert refused.value.reason is Reason.REFUSED_BY_SERVER
        await until(lambda: served.audit("deny"))
    assert [line["event"] for line in served.audit("deny")] == ["handshake"], "one attempt"
    assert len(served.seen) == 1


# --- the certificate that is served -------------------------------------------------------------------


async def test_server_presents_each_new_svid_and_keeps_the_old_one_when_an_update_is_broken(
    api: WorkloadApi, ca: CertificateAuthority
) -> None:
    """Servers presented for ever what they had at first; reloaders took broken pairs, or hung at a stop.

    Here each rotation is served within 5 s without a restart, a key that does not fit changes nothing and is
    logged, and a stop in the middle of an update is a stop.
    """
    workload = await api.add_workload("server", SERVER, ca=ca)
    async with service(workload.endpoint, workload=workload) as running:
        await running.answers("/readyz", 200)

        async def presented(wanted: X509Svid) -> None:
            async with asyncio.timeout(5):
                while await leaf_of(running, ca) != wanted.leaf:
                    pass

        await presented(workload.svid)
        for _ in range(3):
            await presented(workload.rotate())
        good = workload.svid
        workload.push_raw(workload.build_response(with_other_key(ca.issue(SERVER))))
        await until(lambda: "update discarded" in running.said)
        await presented(good)
        await presented(workload.rotate())

        workload.rotate()
        running.process.send_signal(signal.SIGTERM)
        workload.rotate()
        assert await running.ended(5) == 0
    assert "Task was destroyed" not in running.said
    assert "Traceback" not in running.said
