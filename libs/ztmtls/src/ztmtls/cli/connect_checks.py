"""``ztmtls doctor --connect``: a verified handshake with one server, and what each side says of the other."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

from ztmtls.authz import exact
from ztmtls.ids import SpiffeId
from ztmtls.reasons import Reason
from ztmtls.source import StaticSource
from ztmtls.svid import X509Context
from ztmtls.tls import TlsRefused, client_context, connection_of, is_alert, reason_of

from .checks import Check, Deadline, fail, ok, warn
from .output import UsageError, shown

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
        raw.settimeout(deadline.remaining)
        try:
            secured = client_context(StaticSource(context), exact(peer)).wrap_socket(raw)
        except ssl.SSLError as error:
            yield _failed_handshake(name, error)
            return
        except TimeoutError:
            advice = "it may speak another protocol that waits for its client"
            yield fail("server", f"{name} did not finish the handshake", advice, Reason.TLS_FAILURE)
            return
        except OSError as error:
            advice = "it may speak another protocol, or close connections that come from here"
            yield fail("server", f"{name} hung up in the handshake: {error}", advice, Reason.TLS_FAILURE)
            return
        with secured:
            view = connection_of(secured).view()
            yield ok(
                "server",
                f"we accept the server: {view.peer.id}, serial {view.peer.serial}, until "
                f"{view.peer.not_after}, under authority {view.authority}; {view.tls_version}",
            )
            secured.settimeout(deadline.remaining)
            yield _verdict(secured, context)


def _failed_handshake(name: str, error: ssl.SSLError) -> Check:
    reason = reason_of(error)
    said = error.refusal.detail if isinstance(error, TlsRefused) else _openssl(error)
    if is_alert(error):
        return _refused(said)
    advice = _ADVICE.get(reason, "look at the server's certificate and its log")
    return fail("server", f"we refuse {name}: {said}", advice, reason)


def _openssl(error: ssl.SSLError) -> str:
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


def _verdict(secured: ssl.SSLSocket, context: X509Context) -> Check:
    # Under TLS 1.3 our side is done before the server has seen our certificate (RFC 8446 section 4.4.2). The
    # server can answer our close_notify only after it accepted us; else its alert comes first.
    accepted = ok("caller", f"the server accepts us as {context.svid.id}")
    try:
        secured.unwrap()
    except TimeoutError:
        return warn("caller", "the server neither refused us nor took leave", "look at its log")
    except ssl.SSLError as error:
        if error.reason == "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
            return accepted  # a server that speaks first
        if is_alert(error):
            return _refused(_openssl(error))
        return _hung_up(str(error))
    except OSError as error:
        return _hung_up(error.strerror or str(error))
    return accepted


def _hung_up(how: str) -> Check:
    return fail(
        "caller",
        f"after the handshake the server hung up without an answer ({how})",
        "a ztmtls server does so when allowed_peers leaves us out: its audit log has the reason",
        Reason.REFUSED_BY_SERVER,
    )
