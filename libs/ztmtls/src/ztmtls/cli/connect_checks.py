"""``ztmtls doctor --connect``: a verified handshake with one server, and what each side says of the other."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import TypeVar

from ztmtls.authz import exact
from ztmtls.ids import SpiffeId
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Context
from ztmtls.tls import TlsRefused, client_context, connection_of, is_alert, reason_of

from .checks import Check, Deadline, fail, ok, warn
from .output import UsageError, shown

T = TypeVar("T")

_ADVICE = {
    Reason.WRONG_SERVER_IDENTITY: "the address leads to another workload, or --peer is not its ID",
    Reason.UNKNOWN_TRUST_DOMAIN: "we have no bundle of the server's trust domain: federate with it",
    Reason.UNTRUSTED_AUTHORITY: "the server's certificate is under no authority that we trust: is it a "
    "SPIFFE server of one of our trust domains, and has its bundle reached us?",
    Reason.EXPIRED: "the server presents a certificate that ran out: it is not renewed, or a clock is wrong",
    Reason.NOT_YET_VALID: "the server's certificate is not valid yet: a clock is wrong",
    Reason.NOT_TLS: "this port speaks no TLS: is it the probe port, or plain HTTP?",
}


def address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPv6]:PORT``. Raises `UsageError`."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare and bare == host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--connect: '{shown(text)}' must be HOST:PORT, for example 127.0.0.1:8443")
    return bare, int(port)


def connect_checks(
    context: X509Context, where: tuple[str, int], peer: SpiffeId, deadline: Deadline
) -> Iterator[Check]:
    """Connect, let each side verify the other, and take leave; no byte of an application is sent."""
    name = f"{where[0]}:{where[1]}"
    try:
        raw = deadline.bounded(lambda: socket.create_connection(where, timeout=deadline.remaining))
    except TimeoutError:
        yield fail("connect", f"{name} does not answer", "a firewall or network policy drops the packets?")
        return
    except OSError as error:
        yield fail(
            "connect",
            f"{name} can't be connected to: {error.strerror or error}",
            "is the server running, and is this its address?",
        )
        return
    yield ok("connect", f"{name} takes connections")
    with raw:
        yield from _handshake(raw, name, context, peer, deadline)


def _handshake(
    raw: socket.socket, name: str, context: X509Context, peer: SpiffeId, deadline: Deadline
) -> Iterator[Check]:
    channel = _Channel(raw, client_context(StaticSource(context), exact(peer)), deadline)
    try:
        channel.run(channel.tls.do_handshake)
    except TlsRefused as error:
        yield _we_refuse(name, error, error.refusal.detail)
        return
    except ssl.SSLError as error:
        yield _refused(_said(error)) if is_alert(error) else _we_refuse(name, error, _said(error))
        return
    except TimeoutError:
        advice = "it may speak another protocol that waits for its client"
        yield fail("server", f"{name} did not finish the handshake", advice, Reason.TLS_FAILURE)
        return
    except OSError as error:
        advice = "it may speak another protocol, or close connections that come from here"
        yield fail("server", f"{name} hung up in the handshake: {error}", advice, Reason.TLS_FAILURE)
        return
    view = connection_of(channel.tls).view()
    yield ok(
        "server",
        f"we accept the server: {view.peer.id}, serial {view.peer.serial}, until {view.peer.not_after}, "
        f"under authority {view.authority}; {view.tls_version}",
    )
    yield _verdict(channel, context)


class _Channel:
    """TLS over `raw` by hand: what we take leave with must go out before anything else comes in."""

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, deadline: Deadline) -> None:
        self._raw = raw
        self._deadline = deadline
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing)

    def run(self, step: Callable[[], T]) -> T:
        """`step` with the bytes that it waits for. Nothing that it leaves to be sent is sent when it ends."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self.send()
                self._raw.settimeout(self._deadline.remaining)
                if data := self._raw.recv(65536):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self.send()  # the alert that tells the server why
                raise

    def send(self) -> None:
        """Send what is there to be sent."""
        self._raw.settimeout(self._deadline.remaining)
        self._raw.sendall(self._outgoing.read())


def _verdict(channel: _Channel, context: X509Context) -> Check:
    # Under TLS 1.3 our side is done before the server has seen our certificate (RFC 8446 section 4.4.2). So
    # take leave at once: the server can answer that only after it accepted us, else its alert comes first.
    # To be read, not to be had from a second unwrap(): to OpenSSL an alert ends a shutdown as well.
    accepted = ok("caller", f"the server accepts us as {context.svid.id}")
    with contextlib.suppress(ssl.SSLWantReadError):
        channel.tls.unwrap()
    try:
        channel.send()
        channel.run(lambda: channel.tls.read(1))
    except ssl.SSLZeroReturnError:
        return accepted
    except TimeoutError:
        return warn("caller", "the server neither refused us nor took leave", "look at its log")
    except ssl.SSLError as error:
        return _refused(_said(error)) if is_alert(error) else _hung_up(_said(error))
    except OSError as error:
        return _hung_up(error.strerror or str(error))
    return accepted  # a server that speaks first


def _we_refuse(name: str, error: ssl.SSLError, said: str) -> Check:
    reason = reason_of(error)
    advice = _ADVICE.get(reason, "look at the server's certificate and its log")
    return fail("server", f"we refuse {name}: {said}", advice, reason)


def _said(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or str(error)).lower().replace("_", " ")


def _refused(said: str) -> Check:
    return fail(
        "caller",
        f"the server refuses our certificate: {said}",
        "its log has the reason: it may not know our trust domain, or not our authority yet (bundles take a "
        "moment to spread), or its clock is wrong",
        Reason.REFUSED_BY_SERVER,
    )


def _hung_up(how: str) -> Check:
    return fail(
        "caller",
        f"after the handshake the server hung up without an answer ({how})",
        "a ztmtls server does so when allowed_peers leaves us out: its audit log has the reason",
        Reason.REFUSED_BY_SERVER,
    )
