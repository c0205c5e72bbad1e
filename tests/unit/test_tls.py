"""The contexts of `ztmtls.tls`, driven by hand: what is verified, and what may not come before that."""

from __future__ import annotations

import io
import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.conformance.peers import plain_context
from tests.unit.resigned import resigned
from ztmtls.audit import AuditLog
from ztmtls.authz import exact
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import (
    TlsRefused,
    _harden,
    client_context,
    connection_of,
    reason_of,
    refusal_behind,
    server_context,
)
from ztmtls.verify import PeerRefused

CALLER = "spiffe://zt.example/ns/zt-demo/sa/caller"
SERVER = "spiffe://zt.example/ns/zt-demo/sa/server"


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority("zt.example")


@pytest.fixture
def audited() -> io.StringIO:
    return io.StringIO()


def source(ca: CertificateAuthority, spiffe_id: str) -> StaticSource:
    return StaticSource(ca.context(ca.issue(spiffe_id)))


@pytest.fixture
def caller(ca: CertificateAuthority, audited: io.StringIO) -> ssl.SSLContext:
    return client_context(source(ca, CALLER), exact(SERVER), audit=AuditLog("t", audited))


@pytest.fixture
def callee(ca: CertificateAuthority, audited: io.StringIO) -> ssl.SSLContext:
    return server_context(source(ca, SERVER), audit=AuditLog("t", audited))


class Pair:
    """Two ends of TLS, joined by memory: bytes move only when a test says so."""

    def __init__(self, client: ssl.SSLContext, server: ssl.SSLContext, **more: Any) -> None:
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(back, there, **more)
        self.server = server.wrap_bio(there, back, server_side=True)
        self.incoming = {self.client: back, self.server: there}

    def handshake(self) -> None:
        waiting = [self.client, self.server]
        while waiting:
            before = len(waiting)
            progress = False
            for end in list(waiting):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                waiting.remove(end)
                progress = True
            assert progress or before == 2, "neither end gets on"

    def send(self, data: bytes) -> bytes:
        """From the server to the client."""
        self.server.write(data)
        return self.client.read(100)


def refused(action: Callable[[], object], reason: Reason) -> None:
    with pytest.raises(TlsRefused) as caught:
        action()
    assert caught.value.refusal.reason is reason
    assert reason_of(caught.value) is reason


def denials(audited: io.StringIO) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in audited.getvalue().splitlines()]
    return [(line["side"], line["reason"]) for line in lines if line["decision"] == "deny"]


def test_both_ends_verify_each_other(
    caller: ssl.SSLContext, callee: ssl.SSLContext, audited: io.StringIO
) -> None:
    pair = Pair(caller, callee)
    pair.handshake()

    assert str(connection_of(pair.client).peer.id) == SERVER
    assert str(connection_of(pair.server).peer.id) == CALLER
    assert pair.send(b"hello") == b"hello"
    assert denials(audited) == []


@pytest.mark.parametrize("side", ["client", "server"])
def test_connection_that_is_cut_off_is_not_taken_for_one_that_ended(
    caller: ssl.SSLContext, callee: ssl.SSLContext, side: str
) -> None:
    """Without a close_notify data may be missing (RFC 8446 section 6.1): an error, not an end."""
    pair = Pair(caller, callee)
    pair.handshake()
    assert pair.send(b"hello") == b"hello"
    end: ssl.SSLObject = getattr(pair, side)

    pair.incoming[end].write_eof()

    with pytest.raises(ssl.SSLError) as caught:
        end.read(1)
    assert caught.value.reason == "UNEXPECTED_EOF_WHILE_READING"


def test_goodbye_waits_for_an_answer_unless_we_hang_up(
    caller: ssl.SSLContext, callee: ssl.SSLContext
) -> None:
    polite, blunt = Pair(caller, callee), Pair(caller, callee)
    for pair in (polite, blunt):
        pair.handshake()
        assert pair.send(b"hello") == b"hello"

    with pytest.raises(ssl.SSLWantReadError):
        polite.server.unwrap()
    blunt.server.hang_up = True  # type: ignore[attr-defined]
    blunt.server.unwrap()

    for pair in (polite, blunt):
        assert pair.client.read(1) == b"", "the peer is told all the same"


def test_build_of_python_that_takes_a_cut_for_an_end_is_corrected() -> None:
    lenient = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ignore = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    lenient.options |= ignore

    _harden(lenient)

    assert not lenient.options & ignore


def test_nothing_is_read_or_written_before_our_own_check(
    caller: ssl.SSLContext, callee: ssl.SSLContext
) -> None:
    pair = Pair(caller, callee)
    for end in (pair.client, pair.server):
        refused(lambda end=end: end.read(1), Reason.NO_CERTIFICATE)  # type: ignore[misc]
        refused(lambda end=end: end.write(b"x"), Reason.NO_CERTIFICATE)  # type: ignore[misc]
        with pytest.raises(PeerRefused):
            connection_of(end)

    pair.handshake()

    assert pair.send(b"hello") == b"hello"


def test_blocking_socket_moves_nothing_before_our_own_check(caller: ssl.SSLContext) -> None:
    ours, theirs = socket.socketpair()
    with theirs, caller.wrap_socket(ours, do_handshake_on_connect=False) as tls:
        actions: list[Callable[[], object]] = [
            lambda: tls.read(1), lambda: tls.recv(1), lambda: tls.write(b"x"), lambda: tls.send(b"x"),
            lambda: tls.sendall(b"x"), lambda: tls.recv_into(bytearray(1)),
            lambda: tls.makefile("rb").read(1),
        ]  # fmt: skip
        for action in actions:
            refused(action, Reason.NO_CERTIFICATE)
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


def test_connection_of_a_foreign_context_is_not_taken_for_verified(ca: CertificateAuthority) -> None:
    pair = Pair(
        plain_context(ssl.PROTOCOL_TLS_CLIENT, ca.issue(CALLER), None),
        plain_context(ssl.PROTOCOL_TLS_SERVER, ca.issue(SERVER), ca.bundle),
    )
    pair.handshake()

    for unverified in (pair.client, pair.server, None, object()):
        with pytest.raises(PeerRefused) as caught:
            connection_of(unverified)
        assert caught.value.reason is Reason.NO_CERTIFICATE


def test_session_that_a_server_resumes_is_refused(
    ca: CertificateAuthority, caller: ssl.SSLContext, audited: io.StringIO
) -> None:
    # Given a server that is not ours, and gives tickets.
    foreign = plain_context(ssl.PROTOCOL_TLS_SERVER, ca.issue(SERVER), ca.bundle)
    first = Pair(caller, foreign)
    first.handshake()
    assert first.send(b"and a ticket") == b"and a ticket"
    session = first.client.session
    assert session is not None
    assert session.has_ticket

    second = Pair(caller, foreign, session=session)

    refused(second.handshake, Reason.SESSION_RESUMED)
    assert denials(audited) == [("caller", "session_resumed")]


def test_certificate_that_only_openssl_can_decode_is_refused(
    ca: CertificateAuthority, callee: ssl.SSLContext, audited: io.StringIO, tmp_path: Path
) -> None:
    svid = ca.issue(CALLER)
    version_3, version_9 = bytes.fromhex("a003020102"), bytes.fromhex("a003020108")
    leaf = resigned(ca, svid.leaf, version_3, version_9)
    key = svid.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    client = plain_context(ssl.PROTOCOL_TLS_CLIENT, svid, None)
    Pair(client, callee).handshake()
    pem = tmp_path / "changed.pem"
    pem.write_bytes(ssl.DER_cert_to_PEM_cert(leaf).encode() + key)
    client.load_cert_chain(pem)

    refused(Pair(client, callee).handshake, Reason.MALFORMED_CERTIFICATE)
    assert denials(audited) == [("callee", "malformed_certificate")]


def test_caller_that_refuses_us_is_told_from_one_we_refuse(
    ca: CertificateAuthority, callee: ssl.SSLContext, audited: io.StringIO
) -> None:
    stranger = CertificateAuthority("zt.example")
    pair = Pair(plain_context(ssl.PROTOCOL_TLS_CLIENT, ca.issue(CALLER), stranger.bundle), callee)

    with pytest.raises(ssl.SSLCertVerificationError):
        pair.handshake()
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
        pair.server.do_handshake()

    assert denials(audited) == [("callee", "refused_by_caller")]


def openssl_error(said: str) -> ssl.SSLError:
    error = ssl.SSLError(1, said)
    error.reason = said
    return error


def packed(cause: BaseException, *, named: bool) -> BaseException:
    """`cause` behind an exception that names it, or that was raised while it was handled."""
    try:
        try:
            raise cause
        except BaseException as caught:
            if named:
                raise OSError("the request failed") from caught
            raise OSError("the request failed") from OSError("another cause")
    except OSError as error:
        return error


@pytest.mark.parametrize("named", [True, False])
def test_refusal_is_found_however_a_library_packs_it(
    ca: CertificateAuthority, caller: ssl.SSLContext, named: bool
) -> None:
    ours = PeerRefused(Reason.EXPIRED, "it expired")
    assert refusal_behind(packed(TlsRefused(ours), named=named)) is ours

    stranger = CertificateAuthority("zt.example")
    with pytest.raises(ssl.SSLCertVerificationError) as openssls:
        Pair(caller, plain_context(ssl.PROTOCOL_TLS_SERVER, stranger.issue(SERVER), ca.bundle)).handshake()
    found = refusal_behind(packed(openssls.value, named=named))
    assert found is not None
    assert (found.reason, found.detail) == (Reason.UNTRUSTED_AUTHORITY, openssls.value.verify_message)

    told = refusal_behind(packed(openssl_error("TLSV1_ALERT_UNKNOWN_CA"), named=named))
    assert told is not None
    assert told.reason is Reason.REFUSED_BY_SERVER
    assert told.detail == "the server refused our certificate: tlsv1 alert unknown ca"


def test_no_refusal_is_found_where_none_is() -> None:
    alert = openssl_error("TLSV1_ALERT_UNKNOWN_CA")
    error = packed(alert, named=False)
    assert refusal_behind(error) is not None

    assert refusal_behind(error, outer=alert) is None, "it was there before the call began"
    assert refusal_behind(openssl_error("WRONG_VERSION_NUMBER")) is None
    assert refusal_behind(ssl.SSLCertVerificationError(1, "of a library that OpenSSL never saw")) is None
    assert refusal_behind(OSError("connection reset")) is None


# -- Without an identity --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["caller", "callee"])
def test_without_an_identity_every_handshake_is_refused(
    ca: CertificateAuthority, audited: io.StringIO, side: str
) -> None:
    holder = source(ca, CALLER)
    log = AuditLog("t", audited)
    context = (
        client_context(holder, exact(SERVER), audit=log)
        if side == "caller"
        else server_context(holder, audit=log)
    )
    server_side = side == "callee"
    holder.deny()

    in_memory = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=server_side)
    refused(in_memory.do_handshake, Reason.IDENTITY_DENIED)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        refused(
            lambda: context.wrap_socket(ours, server_side=server_side, do_handshake_on_connect=False),
            Reason.IDENTITY_DENIED,
        )
    assert denials(audited) == [(side, "identity_denied")] * 2

    # A connection begun without one stays without: what it would have presented was not decided by then.
    holder.set(ca.context(ca.issue(CALLER)))
    refused(in_memory.do_handshake, Reason.NO_IDENTITY)


def test_accepted_socket_that_fails_is_closed(ca: CertificateAuthority) -> None:
    holder = source(ca, SERVER)
    context = server_context(holder)
    with (
        socket.create_server(("127.0.0.1", 0)) as plain,
        context.wrap_socket(plain, server_side=True) as listener,
    ):
        holder.deny()
        with socket.create_connection(listener.getsockname()) as client:
            refused(listener.accept, Reason.IDENTITY_DENIED)
            client.settimeout(10)
            assert client.recv(1) == b""


# -- Not to be changed from outside -----------------------------------------------------------------------


def test_trust_and_certificate_can_not_be_changed(
    ca: CertificateAuthority, caller: ssl.SSLContext, callee: ssl.SSLContext
) -> None:
    stranger = CertificateAuthority("zt.example")
    for context in (caller, callee):
        with pytest.raises(TypeError, match="trust"):
            context.load_verify_locations(cadata=stranger.bundle.der())
        with pytest.raises(TypeError, match="trust"):
            context.load_default_certs()
        with pytest.raises(TypeError, match="trust"):
            context.set_default_verify_paths()
        with pytest.raises(TypeError, match="certificate"):
            context.load_cert_chain("/nowhere")
    pair = Pair(caller, callee)
    pair.handshake()
    assert str(connection_of(pair.server).peer.id) == CALLER


def test_alpn_is_that_of_the_connections_made_from_now_on(
    caller: ssl.SSLContext, callee: ssl.SSLContext
) -> None:
    before = Pair(caller, callee)
    caller.set_alpn_protocols(["h2"])
    callee.set_alpn_protocols(["h2", "http/1.1"])
    after = Pair(caller, callee)

    for pair, protocol in ((before, "http/1.1"), (after, "h2")):
        pair.handshake()
        assert pair.client.selected_alpn_protocol() == pair.server.selected_alpn_protocol() == protocol
