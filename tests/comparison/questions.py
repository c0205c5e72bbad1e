"""What is asked of both libraries. Each question is a coroutine function that returns the answer in words.

The rightful case comes first in each: an answer counts only where the library works.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import grpc

from tests.conformance.peers import DEADLINE, HOST, call, plain_context, plain_server, tcp_front
from ztmtls.svid import X509Svid
from ztmtls.testing import CertificateAuthority, WorkloadApi, with_other_key
from ztmtls.testing import Workload as Agent

from .sides import LONG, CannotStart, Side, Workload

DOMAIN, PARTNER = "zt.example", "partner.example"
OURS, PEER = f"spiffe://{DOMAIN}/ours", f"spiffe://{DOMAIN}/peer"
SIGNATURE = "digital_signature"

Question = Callable[[Side], Awaitable[str]]
QUESTIONS: dict[str, dict[str, Question]] = {}


def question(section: str, text: str) -> Callable[[Question], Question]:
    def add(asked: Question) -> Question:
        QUESTIONS.setdefault(section, {})[text] = asked
        return asked

    return add


@contextlib.asynccontextmanager
async def agent(partner: CertificateAuthority | None = None) -> AsyncIterator[Agent]:
    """The agent's side of one workload, with a partner's trust domain if there is one."""
    async with WorkloadApi() as api:
        federates_with = [] if partner is None else [partner]
        found = await api.add_workload(
            "ours", OURS, ca=CertificateAuthority(DOMAIN), federates_with=federates_with
        )
        found.allow(uid=os.geteuid())
        yield found


async def accepts(workload: Workload, svid: X509Svid) -> bool:
    return bool((await call(workload.port, svid)).line)


# --- peers --------------------------------------------------------------------------------------------

PEERS = "Peers that a server is asked to accept"
Make = Callable[[CertificateAuthority, CertificateAuthority], X509Svid]


def peer(text: str, make: Make, authorizer: str = f"id={PEER}") -> None:
    """Ask for a server's verdict on the peer that `make` makes of our authority and the partner's."""

    async def asked(side: Side) -> str:
        partner = CertificateAuthority(PARTNER)
        async with agent(partner) as ours, side.workload(ours.endpoint, authorizer) as workload:
            assert await accepts(workload, ours.ca.issue(PEER)), "the rightful peer"
            return "accepted" if await accepts(workload, make(ours.ca, partner)) else "refused"

    question(PEERS, text)(asked)


MEMBER = f"domain={DOMAIN}"
peer("rightful peer", lambda ca, _: ca.issue(PEER))
peer("signed by an unknown authority", lambda *_: CertificateAuthority(DOMAIN).issue(PEER))
peer(
    "expired",
    lambda ca, _: ca.issue(
        PEER,
        not_before=datetime.now(UTC) - timedelta(hours=2),
        not_after=datetime.now(UTC) - timedelta(hours=1),
    ),
)
peer("another SPIFFE ID than the authorizer allows", lambda ca, _: ca.issue(f"spiffe://{DOMAIN}/other"))
peer("our SPIFFE ID, signed by the authority of a federated trust domain", lambda _, p: p.issue(PEER))
peer("leaf that is a CA", lambda ca, _: ca.issue(PEER, is_ca=True))
peer("leaf with keyCertSign", lambda ca, _: ca.issue(PEER, key_usage={SIGNATURE, "key_cert_sign"}))
peer("leaf with cRLSign", lambda ca, _: ca.issue(PEER, key_usage={SIGNATURE, "crl_sign"}))
peer("SPIFFE ID without a path", lambda ca, _: ca.issue(f"spiffe://{DOMAIN}"), MEMBER)
peer(
    "SPIFFE ID of a trust domain whose bundle we don't have",
    lambda ca, _: ca.issue("spiffe://unknown.example/peer"),
    "any",
)
peer(
    "certificate without a SPIFFE ID, no authorizer given",
    lambda ca, _: ca.issue(PEER, uris=[], dns_names=["peer.zt.example"]),
    "none",
)


# --- updates ------------------------------------------------------------------------------------------

UPDATES = "Updates of the Workload API"


def update(text: str, send: Callable[[Agent], int | None]) -> None:
    """Ask what becomes of a bad update; `send` returns the serial that shows it was taken, if any does."""

    async def asked(side: Side) -> str:
        async with agent(CertificateAuthority(PARTNER)) as ours, side.workload(ours.endpoint) as workload:
            first = ours.rotate().leaf.serial_number
            assert (await workload.until(lambda s: s.serial == first)).serial == first, "a good update"
            bad = send(ours)
            found = await workload.until(lambda s: s.closed or s.failures > 0 or s.serial == bad, 10)
            if not found.closed and bad is not None and found.serial == bad:
                return "taken"
            last = ours.rotate().leaf.serial_number
            found = await workload.until(lambda s: s.closed or s.serial == last)
            if found.closed:
                return "source closed for good"
            return "next update taken" if found.serial == last else "no further update taken"

    question(UPDATES, text)(asked)


def no_svids(ours: Agent) -> None:
    message = ours.build_response()
    del message.svids[:]
    ours.push_raw(message)


def other_name(ours: Agent) -> int:
    svid = ours.ca.issue(OURS)
    message = ours.build_response(svid)
    message.svids[0].spiffe_id = f"spiffe://{DOMAIN}/somebody-else"
    ours.push_raw(message)
    return svid.leaf.serial_number


def pushed(ours: Agent, svid: X509Svid) -> int:
    ours.push(svid)
    return svid.leaf.serial_number


def stopped(ours: Agent) -> None:
    ours.end(grpc.StatusCode.INVALID_ARGUMENT)


def past(ca: CertificateAuthority) -> X509Svid:
    now = datetime.now(UTC)
    return ca.issue(OURS, not_before=now - timedelta(hours=2), not_after=now - timedelta(hours=1))


update("no SVID in it", no_svids)
update("an empty federated bundle", lambda ours: ours.push(federated={PARTNER: b""}))
update("a federated bundle that can't be read", lambda ours: ours.push(federated={PARTNER: b"\x30\x01"}))
update("field `spiffe_id` names somebody else than the certificate", other_name)
update(
    "private key that does not belong to the certificate",
    lambda o: pushed(o, with_other_key(o.ca.issue(OURS))),
)
update("SVID that has expired", lambda ours: pushed(ours, past(ours.ca)))
update("stream ended with `INVALID_ARGUMENT`", stopped)


@question(UPDATES, "identity withdrawn with `PERMISSION_DENIED`, after six denied calls")
async def withdrawn(side: Side) -> str:
    async with agent() as ours, side.workload(ours.endpoint) as workload:
        assert (await workload.until(lambda s: s.serial is not None)).serial, "an identity"
        before = ours.calls["FetchX509SVID"]
        ours.redact()
        await ours.wait_for_calls(before + 6, LONG)
        return "offered on" if (await workload.state()).serial is not None else "no longer offered"


@question(UPDATES, "socket is not there yet at the start")
async def late(side: Side) -> str:
    async with agent() as ours:
        async with side.workload(ours.endpoint) as workload:
            assert (await workload.until(lambda s: s.serial is not None)).serial, "with the socket"
        await ours.stop()
        try:
            async with side.workload(ours.endpoint) as workload:
                await ours.start()
                found = await workload.until(lambda s: s.serial is not None)
                return "waited for" if found.serial else "no identity"
        except CannotStart:
            return "fails at once"


@question(UPDATES, "endpoint `tcp://127.0.0.1:port`")
async def over_tcp(side: Side) -> str:
    async with agent() as ours, tcp_front(str(ours.path)) as port:
        try:
            async with side.workload(f"tcp://127.0.0.1:{port}") as workload:
                found = await workload.until(lambda s: s.serial is not None)
                return "works" if found.serial else "no identity"
        except CannotStart:
            return "refused"


# --- rotation -----------------------------------------------------------------------------------------

ROTATION = "Rotation under a running server"


@question(ROTATION, "own SVID renewed: new connections get")
async def renewed(side: Side) -> str:
    async with agent() as ours, side.workload(ours.endpoint, f"id={PEER}") as workload:
        old = ours.svid.leaf.serial_number
        svid = ours.ca.issue(PEER)
        leaf = (await call(workload.port, svid)).leaf
        assert leaf is not None
        assert leaf.serial_number == old
        new = ours.rotate().leaf.serial_number
        assert (await workload.until(lambda s: s.serial == new)).serial == new
        leaf = (await call(workload.port, svid)).leaf
        if leaf is None:
            return "no connection"
        return {old: "the old one", new: "the new one"}[leaf.serial_number]


@question(ROTATION, "authority withdrawn: a peer below it is")
async def distrusted(side: Side) -> str:
    async with agent() as ours, side.workload(ours.endpoint, f"id={PEER}") as workload:
        below_the_old = ours.ca.issue(PEER)
        assert await accepts(workload, below_the_old)
        ours.ca.prepare()
        ours.ca.activate()
        ours.rotate()
        await workload.until(lambda s: s.authorities.get(DOMAIN) == 2)
        ours.ca.retire()
        found = await workload.until(lambda s: s.authorities.get(DOMAIN) == 1)
        assert found.authorities[DOMAIN] == 1
        return "accepted" if await accepts(workload, below_the_old) else "refused"


# --- the rest -----------------------------------------------------------------------------------------

REST = "Identifiers and integration"


def identifier(text: str, spiffe_id: str) -> None:
    async def asked(side: Side) -> str:
        rightful, found = await side.parses([PEER, spiffe_id])
        assert rightful
        return "accepted" if found else "refused"

    question(REST, text)(asked)


identifier("SPIFFE ID with a line break at its end", f"{PEER}\n")
identifier("SPIFFE ID with upper case in the trust domain", "spiffe://ZT.example/peer")


@question(REST, "client that offers the TLS session of its last connection")
async def again(side: Side) -> str:
    async with agent() as ours, side.workload(ours.endpoint, f"id={PEER}") as workload:
        context = plain_context(ssl.PROTOCOL_TLS_CLIENT, ours.ca.issue(PEER), None)

        def visit(session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession | None, bool | None]:
            with (
                socket.create_connection((HOST, workload.port), DEADLINE) as raw,
                context.wrap_socket(raw, session=session) as connection,
            ):
                line = connection.recv(100)
                return line, connection.session, connection.session_reused

        line, session, _ = await asyncio.to_thread(visit, None)
        assert line
        try:
            line, _, resumed = await asyncio.to_thread(visit, session)
        except ssl.SSLError:
            return "handshake fails"
        assert line
        return "resumed" if resumed else "full handshake"


@question(REST, "client context in `asyncio.open_connection`")
async def in_asyncio(side: Side) -> str:
    async with agent() as ours, plain_server(ours.ca.issue(PEER), ours.ca.bundle) as port:
        return "works" if await side.asyncio_client(ours.endpoint, port, PEER) else "fails"
