"""Mutual TLS from a source of identities: contexts that rotate by themselves.

`server_context` and `client_context` return an `ssl.SSLContext` that goes wherever one is taken
(asyncio, uvloop, uvicorn, aiohttp, httpx, plain sockets). Behind it stands one real context per
*generation* of the source. A generation's context is never changed once built: OpenSSL does not allow
that while handshakes run, and its trust store can only grow. Each new connection gets the newest one.

After OpenSSL's own check, every handshake goes through `verify.verify_peer`. OpenSSL holds the
authorities of all known trust domains, so that strangers fail inside TLS; `verify_peer` then accepts a
peer only under the authorities of its own domain.

TLS 1.3 only, no session tickets: a resumed session would skip every check (RFC 8446 section 2.2).
"""

from __future__ import annotations

import itertools
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from cryptography import x509

from .audit import AuditLog
from .authz import Authorizer
from .hop import HopView
from .ids import SpiffeId
from .material import load_authorities, load_svid
from .reasons import Reason, Refusal
from .svid import UNDECODABLE, X509Context
from .verify import PeerRefused, VerifiedPeer, verify_peer

if TYPE_CHECKING:
    from .source import Source

Side = Literal["caller", "callee"]
Verify = Callable[[VerifiedPeer, X509Context, datetime], VerifiedPeer]


class TlsRefused(ssl.SSLCertVerificationError):
    """A handshake was refused by us. `refusal` holds the reason."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(1, str(refusal))
        self.refusal = refusal

    def __str__(self) -> str:
        return str(self.refusal)


class Connection:
    """One connection whose peer was verified, and which can be verified again.

    `own` is the SVID this side presented, `peer` what `verify.verify_peer` proved of the other side, and
    `side` says which one we are. `generation` is the state of the source that the handshake used. `id` names
    the connection in audit lines; it is unique in this process, and means nothing to the peer.
    `tls_version` and `cipher` are OpenSSL's names for them. `alert` is what the peer ended the connection
    with, if it did so by a TLS alert.
    """

    __slots__ = (
        "_authorizer",
        "_checked_generation",
        "_own_not_after",
        "alert",
        "cipher",
        "generation",
        "id",
        "own",
        "peer",
        "side",
        "tls_version",
    )

    def __init__(
        self,
        side: Side,
        snapshot: X509Context,
        peer: VerifiedPeer,
        authorizer: Authorizer | None,
        tls_version: str,
        cipher: str,
    ) -> None:
        self.id = f"c-{_CONNECTION_PREFIX}-{next(_connection_numbers)}"
        self.side: Side = side
        self.own = snapshot.svid.summary
        self._own_not_after = snapshot.svid.not_after
        self.peer = peer
        self.generation = snapshot.generation
        self.tls_version = tls_version
        self.cipher = cipher
        self.alert: ssl.SSLError | None = None
        self._authorizer = authorizer
        self._checked_generation = snapshot.generation

    def recheck(self, snapshot: X509Context, now: datetime, verify: Verify | None = None) -> None:
        """Raise `verify.PeerRefused` or `authz.NotAuthorized` if the peer is no longer acceptable.

        Costs a comparison while neither the generation nor the validity changed; else the chain of the
        handshake is verified against the new bundles, by `verify` if given (which may remember).
        """
        if snapshot.generation == self._checked_generation and now < self.peer.valid_until:
            return
        if verify is not None:
            self.peer = verify(self.peer, snapshot, now)
        else:
            self.peer = verify_peer(self.peer.chain, snapshot.bundles, now)
        if self._authorizer is not None:
            self._authorizer(self.peer.id)
        self._checked_generation = snapshot.generation

    def outlived(self, now: datetime) -> bool:
        """True when the SVID that *we* presented on it has run out: time to make a new connection."""
        return now >= self._own_not_after

    def view(self, rule: str | None = None) -> HopView:
        """What this side verified, for audit lines and for people."""
        return HopView(
            side=self.side,
            own=self.own,
            peer=self.peer.summary,
            authority=self.peer.authority,
            tls_version=self.tls_version,
            cipher=self.cipher,
            generation=self.generation,
            connection=self.id,
            rule=rule,
        )


_CONNECTION_PREFIX = secrets.token_hex(3)
_connection_numbers = itertools.count(1)


def connection_of(ssl_object: object) -> Connection:
    """The verified connection behind an `ssl.SSLObject` or `ssl.SSLSocket` made by a ztmtls context.

    Raises `verify.PeerRefused` (`no_certificate`) for anything else: plain TCP, foreign contexts, a
    handshake that is not finished.
    """
    connection = getattr(ssl_object, "ztmtls_connection", None)
    if not isinstance(connection, Connection):
        raise PeerRefused(Reason.NO_CERTIFICATE, "the connection was not verified by ztmtls")
    return connection


class _VerifiedObject(ssl.SSLObject):
    """An `ssl.SSLObject` whose handshake ends with our own verification."""

    ztmtls_connection: Connection | None = None
    hang_up = False
    _ended: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        context = self.context
        assert isinstance(context, GenerationContext)
        if self._ended is not None:
            raise self._ended
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            context.failed(error)
            if not context.owes_alert(error):
                raise
            # Event loops drop what is still to be sent when a handshake fails, and with it the alert that
            # tells the peer why. Asking to read first makes them send it; the peer then hangs up, and if
            # it does not, its next byte ends the handshake here.
            self._ended = error
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "sending the alert") from None
        self.ztmtls_connection = context.accept(self)

    # OpenSSL finishes a handshake inside a read or a write, too; our own check would then be skipped.
    def read(self, *args: Any) -> Any:
        """As `ssl.SSLObject.read`, after a verified handshake only."""
        if self.ztmtls_connection is None:
            raise _unverified()
        try:
            return super().read(*args)
        except ssl.SSLError as error:
            # Event loops and HTTP clients may lose it: whoever writes next is told of a closed transport.
            if reason_of(error) is Reason.REFUSED_BY_SERVER:
                self.ztmtls_connection.alert = error
            raise

    def write(self, data: Any) -> int:
        """As `ssl.SSLObject.write`, after a verified handshake only."""
        if self.ztmtls_connection is None:
            raise _unverified()
        return super().write(data)

    def unwrap(self) -> Any:
        """As `ssl.SSLObject.unwrap`; with `hang_up`, our close_notify is enough (RFC 8446 section 6.1).

        Event loops otherwise keep a connection that they close until its peer has answered.
        """
        try:
            return super().unwrap()
        except ssl.SSLWantReadError:
            if not self.hang_up:
                raise
            return None


def _unverified() -> TlsRefused:
    return TlsRefused(
        PeerRefused(Reason.NO_CERTIFICATE, "call do_handshake() first: the peer is not verified yet")
    )


class _VerifiedSocket(ssl.SSLSocket):
    """The same for blocking sockets."""

    ztmtls_connection: Connection | None = None
    ztmtls_rotating: RotatingContext | None = None
    # What the base class has and its type stubs lack.
    _sslobj: object | None
    do_handshake_on_connect: bool
    suppress_ragged_eofs: bool

    def accept(self) -> tuple[ssl.SSLSocket, Any]:
        """As `ssl.SSLSocket.accept`, each connection on the newest generation."""
        raw, address = socket.socket.accept(self)
        try:
            accepted = (self.ztmtls_rotating or self.context).wrap_socket(
                raw,
                server_side=True,
                do_handshake_on_connect=self.do_handshake_on_connect,
                suppress_ragged_eofs=self.suppress_ragged_eofs,
            )
        except BaseException:
            raw.close()
            raise
        return accepted, address

    # Before there is a TLS session (a socket not connected yet) the base class raises by itself.
    def read(self, *args: Any) -> Any:
        """As `ssl.SSLSocket.read`, after a verified handshake only; `recv` and `makefile` end here."""
        if self.ztmtls_connection is None and self._sslobj is not None:
            raise _unverified()
        return super().read(*args)

    def write(self, data: Any) -> int:
        """As `ssl.SSLSocket.write`, after a verified handshake only."""
        if self.ztmtls_connection is None and self._sslobj is not None:
            raise _unverified()
        return super().write(data)

    def send(self, data: Any, flags: int = 0) -> int:
        """As `ssl.SSLSocket.send`, after a verified handshake only; `sendall` ends here."""
        if self.ztmtls_connection is None and self._sslobj is not None:
            raise _unverified()
        return super().send(data, flags)

    def do_handshake(self, block: bool = False) -> None:
        context = self.context
        assert isinstance(context, GenerationContext)
        try:
            super().do_handshake(block)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            context.failed(error)
            raise
        self.ztmtls_connection = context.accept(self)


class GenerationContext(ssl.SSLContext):
    """The TLS context of one generation: one SVID, one set of bundles, never changed once built."""

    sslobject_class = _VerifiedObject
    sslsocket_class = _VerifiedSocket

    _snapshot: X509Context
    _side: Side
    _authorizer: Authorizer | None
    _audit: AuditLog | None
    _on_verified: Callable[[Connection], None] | None

    @classmethod
    def build(
        cls,
        side: Side,
        snapshot: X509Context,
        authorizer: Authorizer | None,
        *,
        audit: AuditLog | None = None,
        alpn: Iterable[str] = (),
        on_verified: Callable[[Connection], None] | None = None,
    ) -> GenerationContext:
        """Build the context for `snapshot`. Raises `material.UnusableMaterial`.

        `alpn` is offered to the peer; `on_verified` is called with each connection, in the thread of its
        handshake.
        """
        context = cls(ssl.PROTOCOL_TLS_CLIENT if side == "caller" else ssl.PROTOCOL_TLS_SERVER)
        context._snapshot = snapshot
        context._side = side
        context._authorizer = authorizer
        context._audit = audit
        context._on_verified = on_verified
        _harden(context)
        # Any certificate in a bundle is a trust anchor, self-signed or not.
        context.verify_flags = ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        for bundle in snapshot.bundles.values():
            load_authorities(context, bundle)
        load_svid(context, snapshot.svid)
        if names := list(alpn):
            context.set_alpn_protocols(names)
        return context

    def accept(self, handshake: _VerifiedObject | _VerifiedSocket) -> Connection:
        """Verify the peer of a finished TLS handshake. Raises `TlsRefused`, and says so in the audit log."""
        chain: tuple[x509.Certificate, ...] = ()
        try:
            if handshake.session_reused:
                raise PeerRefused(Reason.SESSION_RESUMED, "resumed TLS sessions are not accepted")
            chain = _presented_chain(handshake)
            peer = verify_peer(chain, self._snapshot.bundles, datetime.now(UTC))
            if self._authorizer is not None:
                self._authorize(peer.id)
        except Refusal as refusal:
            self._record(refusal)
            raise TlsRefused(refusal) from refusal
        cipher = handshake.cipher()
        connection = Connection(
            self._side,
            self._snapshot,
            peer,
            self._authorizer,
            handshake.version() or "",
            cipher[0] if cipher else "",
        )
        if self._audit is not None:
            self._audit.count("handshake", "allow")
        if self._on_verified is not None:
            self._on_verified(connection)
        return connection

    def failed(self, error: ssl.SSLError) -> None:
        """Audit a handshake that OpenSSL itself ended."""
        reason = reason_of(error)
        if self._side == "callee" and reason is Reason.REFUSED_BY_SERVER:
            reason = Reason.REFUSED_BY_CALLER
        self._record(Refusal(reason, _openssl_text(error)))

    def owes_alert(self, error: ssl.SSLError) -> bool:
        """True when a caller should still be told why: a server refused its certificate, or had none.

        A client does not linger for that: it might wait for an impostor that never hangs up.
        """
        return self._side == "callee" and not is_alert(error) and reason_of(error) is not Reason.NOT_TLS

    def _authorize(self, peer: SpiffeId) -> None:
        assert self._authorizer is not None
        try:
            self._authorizer(peer)
        except Refusal as refusal:
            if self._side == "caller":
                raise PeerRefused(
                    Reason.WRONG_SERVER_IDENTITY, f"wrong server: {refusal.detail}"
                ) from refusal
            raise

    def _record(self, refusal: Refusal) -> None:
        if self._audit is not None:
            own = self._snapshot.svid.summary
            self._audit.record(
                "handshake",
                "deny",
                reason=refusal.reason,
                detail=refusal.detail,
                side=self._side,
                own_id=own.id,
                own_serial=own.serial,
                generation=self._snapshot.generation,
            )


class RotatingContext(ssl.SSLContext):
    """Hands every new connection to the context of the newest generation.

    It holds no certificate and trusts nobody itself: used by a path that does not ask it per
    connection, it fails closed. It can't be configured from outside.
    """

    _source: Source
    _side: Side
    _authorizer: Authorizer | None
    _audit: AuditLog | None
    _alpn: tuple[str, ...]
    _newest: GenerationContext | None
    _newest_key: tuple[int, tuple[str, ...]] | None
    _lock: threading.Lock

    @classmethod
    def _make(
        cls, side: Side, source: Source, authorizer: Authorizer | None, audit: AuditLog | None
    ) -> RotatingContext:
        context = cls(ssl.PROTOCOL_TLS_CLIENT if side == "caller" else ssl.PROTOCOL_TLS_SERVER)
        _harden(context)
        context._source = source
        context._side = side
        context._authorizer = authorizer
        context._audit = audit
        context._alpn = ("http/1.1",)
        context._newest = None
        context._newest_key = None
        context._lock = threading.Lock()
        return context

    def newest(self) -> GenerationContext:
        """The context of the newest generation.

        Raises `source.NoIdentity` when there is none, `material.UnusableMaterial` when OpenSSL can't use it
        (a source from the Workload API never offers such).
        """
        snapshot = self._source.context
        key = (snapshot.generation, self._alpn)
        with self._lock:
            if self._newest is None or self._newest_key != key:
                self._newest = GenerationContext.build(
                    self._side, snapshot, self._authorizer, audit=self._audit, alpn=self._alpn
                )
                self._newest_key = key
            return self._newest

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """As `ssl.SSLContext.wrap_bio`, on the newest generation."""
        try:
            return self.newest().wrap_bio(*args, **kwargs)
        except Refusal:
            # Event loops expect refusals from the handshake, not from here.
            return super().wrap_bio(*args, **kwargs)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """As `ssl.SSLContext.wrap_socket`, on the newest generation."""
        try:
            wrapped = self.newest().wrap_socket(*args, **kwargs)
        except Refusal as refusal:
            self.refuse(refusal)
        assert isinstance(wrapped, _VerifiedSocket)
        wrapped.ztmtls_rotating = self
        return wrapped

    def refuse(self, refusal: Refusal) -> NoReturn:
        """Refuse a handshake for want of an identity of our own."""
        if self._audit is not None:
            self._audit.record(
                "handshake", "deny", reason=refusal.reason, detail=refusal.detail, side=self._side
            )
        raise TlsRefused(refusal) from refusal

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """Offer these protocols on connections made from now on."""
        self._alpn = tuple(alpn_protocols)

    def load_verify_locations(self, *args: Any, **kwargs: Any) -> None:
        """Refused: trust comes from the bundles of the Workload API alone."""
        raise TypeError("a ztmtls context takes its trust from the Workload API and can't be changed")

    def load_default_certs(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the system's authorities vouch for nobody here."""
        self.load_verify_locations()

    def set_default_verify_paths(self) -> None:
        """Refused: the system's authorities vouch for nobody here."""
        self.load_verify_locations()

    def load_cert_chain(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the certificate comes from the Workload API alone."""
        raise TypeError("a ztmtls context takes its certificate from the Workload API and can't be changed")


class _RefusedObject(ssl.SSLObject):
    """Stands in for a connection while there is no identity: its handshake is refused."""

    def do_handshake(self) -> None:
        context = self.context
        assert isinstance(context, RotatingContext)
        try:
            context.newest()
        except Refusal as refusal:
            context.refuse(refusal)
        context.refuse(Refusal(Reason.NO_IDENTITY, "the identity arrived during the handshake: try again"))


RotatingContext.sslobject_class = _RefusedObject


def server_context(
    source: Source, *, authorizer: Authorizer | None = None, audit: AuditLog | None = None
) -> ssl.SSLContext:
    """A server's context: presents our SVID, demands and verifies the client's (X509-SVID section 5).

    `authorizer` is an outer allow-list, applied in the handshake; without it every verified workload of
    a known trust domain gets through to the application, which must then authorize each request.

    A handshake that is refused raises `TlsRefused` (an `ssl.SSLError`) where it is waited for, and is a line
    of `audit`; `connection_of` then gives the verified connection of one that went well. Without an identity
    of ours every handshake is refused. Connections that are open are not watched: see `Connection.recheck`.
    """
    return RotatingContext._make("callee", source, authorizer, audit)


def client_context(
    source: Source, authorizer: Authorizer, *, audit: AuditLog | None = None
) -> ssl.SSLContext:
    """A client's context: presents our SVID, accepts only a server that `authorizer` accepts.

    Host names are not compared: an SVID's identity is its SPIFFE ID. A server that is refused raises
    `TlsRefused` (an `ssl.SSLError`) from the handshake, before a byte of the application is sent. That the
    server refuses *us* comes later, with the first read, since under TLS 1.3 a client's handshake ends before
    the server has seen its certificate (RFC 8446 section 4.4.2).
    """
    return RotatingContext._make("caller", source, authorizer, audit)


def _harden(context: ssl.SSLContext) -> None:
    context.check_hostname = False  # replaced by the authorizer on the SPIFFE ID
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # Some builds of Python take a connection that is cut off for one that ended: data may be missing
    # unseen (RFC 8446 section 6.1), and a server that hangs up instead of refusing looks content.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if context.protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0


def _presented_chain(handshake: ssl.SSLObject | ssl.SSLSocket) -> tuple[x509.Certificate, ...]:
    # Public from Python 3.13 on; the same call one level down before.
    if hasattr(handshake, "get_unverified_chain"):
        ders = handshake.get_unverified_chain() or []
    else:
        raw = handshake._sslobj.get_unverified_chain()  # type: ignore[union-attr]
        ders = [certificate.public_bytes(_DER) for certificate in raw or []]
    try:
        return tuple(x509.load_der_x509_certificate(der) for der in ders)
    except UNDECODABLE as error:
        raise PeerRefused(Reason.MALFORMED_CERTIFICATE, "the peer's certificate can't be decoded") from error


_DER = 2  # _ssl.ENCODING_DER

# X509_V_ERR_* (openssl/x509_vfy.h)
_VERIFY_CODES = {9: Reason.NOT_YET_VALID, 10: Reason.EXPIRED, 22: Reason.CHAIN_TOO_LONG}
_OPENSSL_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": Reason.NO_CERTIFICATE,
    "HTTP_REQUEST": Reason.NOT_TLS,
    "HTTPS_PROXY_REQUEST": Reason.NOT_TLS,
    "WRONG_VERSION_NUMBER": Reason.NOT_TLS,
    "BAD_RECORD_TYPE": Reason.NOT_TLS,
}
# RFC 8446 section 6.2. handshake_failure is what some servers send for want of a certificate.
_ALERTS_ABOUT_CERTIFICATES = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "HANDSHAKE_FAILURE")


def reason_of(error: ssl.SSLError) -> Reason:
    """The reason code for a handshake that failed, by us, by OpenSSL or by the peer's alert."""
    if isinstance(error, TlsRefused):
        return error.refusal.reason
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY_CODES.get(error.verify_code, Reason.UNTRUSTED_AUTHORITY)
    said = error.reason or ""
    if is_alert(error) and any(name in said for name in _ALERTS_ABOUT_CERTIFICATES):
        return Reason.REFUSED_BY_SERVER
    return _OPENSSL_REASONS.get(said, Reason.TLS_FAILURE)


def refusal_behind(error: BaseException, outer: BaseException | None = None) -> Refusal | None:
    """The refusal that made a client's call end in `error`, however its library wrapped it, or None.

    Its reason is `refused_by_server` when the server refused our certificate; with any other reason it was us
    who refused the handshake. `outer` is what was being handled when the call began: it is no cause of this.
    """
    for cause in _causes(error, outer):
        if isinstance(cause, TlsRefused):
            return cause.refusal
        if not isinstance(cause, ssl.SSLError) or not hasattr(cause, "reason"):
            continue  # what OpenSSL did not raise has no reason: some libraries' errors pose as an SSLError
        reason = reason_of(cause)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Refusal(reason, cause.verify_message)
        if reason is Reason.REFUSED_BY_SERVER:
            return Refusal(reason, f"the server refused our certificate: {_openssl_text(cause)}")
    return None


def _causes(error: BaseException, outer: BaseException | None) -> Iterator[BaseException]:
    """`error` and what led to it, causes before contexts: libraries keep one or the other."""
    seen = {id(outer)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += (cause.__context__, cause.__cause__)


def is_alert(error: ssl.SSLError) -> bool:
    """True when the peer ended TLS with an alert, whatever it is about (RFC 8446 section 6.2)."""
    return not isinstance(error, TlsRefused) and "ALERT" in (error.reason or "")


def _openssl_text(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or "handshake ended by the peer").lower().replace("_", " ")
