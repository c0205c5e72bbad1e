"""gRPC (asyncio) over mutual TLS with SPIFFE identities: as far as gRPC for Python lets it be sound.

gRPC does TLS by itself, takes PEM, and lets nobody from Python into its handshake. So:

- **A server** uses gRPC's own TLS: `server_credentials` follow the source with every handshake, and `Guard`
  runs `verify.verify_peer` and the policy on every RPC, before the handler, on the chain that the peer
  presented. A stranger's handshake fails inside gRPC; a peer that only we refuse gets as far as a status.
- **A client** can't: what a server's certificate says is never shown to Python, and gRPC compares host
  names only, which an SVID has none of. `channel` therefore does TLS itself, with `tls.client_context`,
  and hands gRPC a socket that leads through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from .audit import AuditLog
from .authz import Authorizer, NotAuthorized, Policy, PolicyFile, authorize_request, exact
from .ids import SpiffeId
from .reasons import Reason, Refusal, printable
from .source import NoIdentity, Source
from .svid import UNDECODABLE, X509Context
from .tls import Connection, client_context, connection_of
from .verify import PeerRefused, VerifiedPeer, verify_peer

logger = logging.getLogger(__name__)

# How often calls and connections that are open are checked again, in seconds.
_LOOK = 1.0
_MAX_REMEMBERED = 1024
_PIECE = 64 * 1024

_peer: ContextVar[VerifiedPeer] = ContextVar("ztmtls_grpc_peer")


# --- servers ------------------------------------------------------------------------------------------


def server_credentials(source: Source) -> grpc.ServerCredentials:
    """Credentials for `grpc.aio.Server.add_secure_port`: our SVID, and a client certificate demanded.

    They are useless without `Guard`: gRPC accepts any certificate under any known authority. Each new
    connection is offered the newest SVID. While the source has none, gRPC goes on with the last one, and it
    is `Guard` that refuses.

    Raises `source.NoIdentity` when there is no SVID yet.
    """
    offered = source.context
    lock = threading.Lock()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal offered
        with lock:
            newest = source.context
            if newest.generation == offered.generation:
                return None
            configuration = _configuration(newest)
            offered = newest
            return configuration

    return grpc.dynamic_ssl_server_credentials(
        _configuration(offered),
        fetch,  # type: ignore[arg-type] # None: no change
        require_client_authentication=True,
    )


def _configuration(snapshot: X509Context) -> grpc.ServerCertificateConfiguration:
    svid = snapshot.svid
    key = svid.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    authorities = [authority for bundle in snapshot.bundles.values() for authority in bundle.authorities]
    return grpc.ssl_server_certificate_configuration([(key, _pem(svid.chain))], _pem(authorities))


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def peer() -> VerifiedPeer:
    """The verified peer of the RPC that is being handled. Raises `PeerRefused` (`no_peer`) elsewhere."""
    found = _peer.get(None)
    if found is None:
        raise PeerRefused(Reason.NO_PEER, "no RPC behind ztmtls.grpc.Guard is being handled here")
    return found


class Guard(grpc.aio.ServerInterceptor):
    """Refuses every RPC whose peer is not verified, or not allowed by the policy. Put it first.

    In the policy a gRPC method is a path under POST, as it is in HTTP/2: ``methods: [POST]``,
    ``paths: [/package.Service/Method]``. RPCs that last are checked again each second, and end when their
    peer is no longer acceptable. Refusals of a certificate are ``UNAUTHENTICATED``, of a caller or a method
    ``PERMISSION_DENIED``, for want of our own identity ``UNAVAILABLE``; the details begin with the reason.

    TLS 1.3 without resumption is demanded here, since gRPC has no setting for it. Handlers must be
    asynchronous. A `PolicyFile` is read again by its owner, not here.
    """

    def __init__(self, source: Source, *, policy: Policy | PolicyFile, audit: AuditLog) -> None:
        self._source = source
        self._policy = policy
        self._audit = audit
        self._verified: dict[tuple[bytes, ...], tuple[int, VerifiedPeer]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Put the check before the handler."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            # What exists here is told only to those who may ask.
            return grpc.stream_stream_rpc_method_handler(self._before(method, _unimplemented))
        kinds = {
            (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
            (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
            (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
            (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
        }
        name, make = kinds[handler.request_streaming, handler.response_streaming]
        return make(
            self._before(method, getattr(handler, name)),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _before(self, method: str, behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        if inspect.isasyncgenfunction(behavior):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                async with (
                    self._admitted(method, context),
                    contextlib.aclosing(behavior(request, context)) as responses,
                ):
                    async for response in responses:
                        yield response

            return stream
        if not inspect.iscoroutinefunction(behavior):
            raise TypeError(f"the handler of {method} is not asynchronous")

        async def single(request: Any, context: Any) -> Any:
            async with self._admitted(method, context):
                return await behavior(request, context)

        return single

    @contextlib.asynccontextmanager
    async def _admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        """The time of one RPC: checked at its begin and each second, or aborted."""
        task = asyncio.current_task()
        assert task is not None
        try:
            presented = _presented(context.auth_context())
            found, rule = self._check(method, presented)
        except Refusal as refusal:
            await self._abort(method, context, refusal)
        _peer.set(found)
        self._audit.record(
            "request",
            "allow",
            peer_id=str(found.id),
            peer_serial=found.serial,
            authority=found.authority,
            rule=rule,
            method="POST",
            path=method,
        )
        watch = _Watch(lambda: self._check(method, presented), task)
        try:
            yield
        except asyncio.CancelledError:
            if watch.refusal is None:
                raise
            task.uncancel()
            await self._abort(method, context, watch.refusal)
        finally:
            watch.stop()

    def _check(self, method: str, presented: tuple[bytes, ...]) -> tuple[VerifiedPeer, str]:
        snapshot = self._source.context
        found = self._verify(presented, snapshot, datetime.now(UTC))
        return found, authorize_request(self._policy, found.id, "POST", method, method.encode())

    def _verify(self, pems: tuple[bytes, ...], snapshot: X509Context, now: datetime) -> VerifiedPeer:
        generation, found = self._verified.get(pems, (0, None))
        if found is None or generation != snapshot.generation or now >= found.valid_until:
            found = verify_peer(_chain(pems), snapshot.bundles, now)
            if len(self._verified) >= _MAX_REMEMBERED:
                self._verified.clear()
            self._verified[pems] = (snapshot.generation, found)
        return found

    async def _abort(self, method: str, context: Any, refusal: Refusal) -> None:
        self._audit.record(
            "request", "deny", reason=refusal.reason, detail=refusal.detail, method="POST",
            path=printable(method),
        )  # fmt: skip
        if isinstance(refusal, NoIdentity):
            code = grpc.StatusCode.UNAVAILABLE
        elif isinstance(refusal, NotAuthorized):
            code = grpc.StatusCode.PERMISSION_DENIED
        else:
            code = grpc.StatusCode.UNAUTHENTICATED
        await context.abort(code, str(refusal))
        raise AssertionError("context.abort returned")  # fail closed


async def _unimplemented(request: Any, context: Any) -> AsyncIterator[bytes]:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    yield b""


def _presented(facts: dict[str, Sequence[bytes]]) -> tuple[bytes, ...]:
    """The peer's leaf and the rest of its chain in PEM, out of what gRPC says about the connection."""

    def fact(name: str) -> bytes:
        values = list(facts.get(name) or ())
        return bytes(values[0]) if len(values) == 1 else b""

    leaf = fact("x509_pem_cert")
    if fact("transport_security_type") != b"ssl" or not leaf:
        raise PeerRefused(Reason.NO_CERTIFICATE, "the connection has no certificate of the peer")
    if fact("ssl_tls_version") != b"TLSv1.3":
        raise PeerRefused(Reason.TLS_FAILURE, "TLS 1.3 is demanded")
    if fact("ssl_session_reused") != b"false":
        raise PeerRefused(Reason.SESSION_RESUMED, "resumed TLS sessions are not accepted")
    return leaf, fact("x509_pem_cert_chain")


def _chain(pems: tuple[bytes, ...]) -> tuple[x509.Certificate, ...]:
    try:
        leaf, *more = (x509.load_pem_x509_certificates(pem) for pem in pems if pem)
        rest = [certificate for certificates in more for certificate in certificates]
    except UNDECODABLE as error:
        raise PeerRefused(Reason.MALFORMED_CERTIFICATE, "the peer's certificate can't be decoded") from error
    # TLS libraries differ in whether the chain that they show holds the leaf.
    return (leaf[0], *(certificate for certificate in rest if certificate != leaf[0]))


class _Watch:
    """Repeats a check as long as an RPC lasts, and cancels its task when the answer is no."""

    def __init__(self, check: Callable[[], object], task: asyncio.Task[Any]) -> None:
        self.refusal: Refusal | None = None
        self._check = check
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_LOOK, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        try:
            self._check()
        except Refusal as refusal:
            self.refusal = refusal
            self._task.cancel()
        except Exception:  # fail closed: a check that breaks is no check
            logger.exception("the check of an open RPC failed")
            self.refusal = Refusal(Reason.INTERNAL_ERROR, "the caller could not be checked again")
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(_LOOK, self._look)


# --- clients ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def channel(
    source: Source,
    target: str,
    *,
    peer: SpiffeId | str | Authorizer,
    options: Sequence[tuple[str, Any]] = (),
    audit: AuditLog | None = None,
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to ``host:port``, over mutual TLS with a server that proves to be `peer`.

    gRPC talks to a Unix socket in a private directory, which only this very process may connect to (the
    kernel says who does); behind it each connection is one of `tls.client_context`. Nothing is sent before
    the server is verified. Open connections are checked again each second, and closed when the server is no
    longer acceptable or the SVID that they were made with ran out; RPCs in flight on them then fail with
    ``UNAVAILABLE``. A server that sets ``grpc.max_connection_age_ms`` to less than that makes clients move to
    a new connection, and with it to the newest SVID, without a failure.

    gRPC sees a refused server as ``UNAVAILABLE``: the reason is in the log and in `audit`. Linux only.
    """
    host, _, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit():
        raise ValueError(f"{target!r} is not host:port")
    context = client_context(source, exact(peer) if isinstance(peer, (SpiffeId, str)) else peer, audit=audit)
    context.set_alpn_protocols(["h2"])
    tunnels: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tunnels.add(task)
        try:
            if _is_this_process(writer):
                await _tunnel(source, context, host, int(port), reader, writer)
        except (OSError, Refusal) as error:
            logger.warning("connection to %s: %s", target, error)
        except asyncio.CancelledError:
            pass  # the channel is closed; asyncio would log the end of a cancelled handler as an error
        finally:
            tunnels.discard(task)
            writer.close()

    with tempfile.TemporaryDirectory(prefix="ztmtls-") as directory:
        path = os.path.join(directory, "h2")
        server = await asyncio.start_unix_server(accepted, path)
        try:
            settings = [
                ("grpc.default_authority", target),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
                *options,
            ]
            async with grpc.aio.insecure_channel(f"unix:{path}", options=settings) as opened:
                yield opened
        finally:
            server.close()
            for task in tuple(tunnels):
                task.cancel()
            await asyncio.gather(*tunnels, return_exceptions=True)


def _is_this_process(writer: asyncio.StreamWriter) -> bool:
    size = struct.calcsize("3i")
    credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return bool(struct.unpack("3i", credentials)[0] == os.getpid())


async def _tunnel(
    source: Source,
    context: ssl.SSLContext,
    host: str,
    port: int,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Carry one connection of gRPC over TLS until either side, or a check, ends it."""
    far_reader, far_writer = await asyncio.open_connection(
        host, port, ssl=context, ssl_handshake_timeout=10, ssl_shutdown_timeout=1
    )
    try:
        handshake = far_writer.get_extra_info("ssl_object")
        connection = connection_of(handshake)
        if handshake.selected_alpn_protocol() != "h2":
            raise Refusal(Reason.TLS_FAILURE, "the server does not speak HTTP/2")
        parts = {
            asyncio.ensure_future(part)
            for part in (
                _copy(reader, far_writer),
                _copy(far_reader, writer),
                _until_refused(source, connection),
            )
        }
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
    finally:
        far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()


async def _until_refused(source: Source, connection: Connection) -> None:
    while not connection.outlived(datetime.now(UTC)):
        connection.recheck(source.context, datetime.now(UTC))
        await asyncio.sleep(_LOOK)


__all__ = ["Guard", "channel", "peer", "server_credentials"]
