"""A Workload API on Unix sockets, served in this process: real gRPC, real certificates, real attestation.

It behaves as a SPIFFE agent does (SPIFFE Workload API, sections 4 to 6; status codes and texts are
SPIRE's), and everything an agent may do to a workload can be scripted: rotate, redact, end the stream
with any status, refuse the next calls, hang, vanish and come back, or send a message that must be
discarded.

    ca = CertificateAuthority("zt.example")
    async with WorkloadApi() as api:
        orders = await api.add_workload("orders", "spiffe://zt.example/orders", ca=ca)
        orders.allow(pid=os.getpid())
        ...                                   # give orders.endpoint to the code under test
        await orders.wait_for_streams(1)
        orders.rotate()                       # each open stream gets the new SVID

Each workload has a socket of its own, and only registered processes get its identity: see
`Workload.allow` and `ztmtls.testing.attestation`. Objects belong to the event loop they were made in.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import re
import tempfile
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.struct_pb2 import Struct
from spiffe._proto import workload_pb2 as pb
from spiffe._proto import workload_pb2_grpc as pb_grpc

from ztmtls.ids import InvalidSpiffeId, SpiffeId, TrustDomain
from ztmtls.jwt_svid import JwtBundle, JwtRefused, validate
from ztmtls.svid import X509Bundle, X509Svid

from .attestation import (
    Attestation,
    Guard,
    PeerCredentials,
    Registrations,
    check_socket_path,
    private_directory,
    remove_stale_socket,
    require_linux,
)
from .ca import Authority, AuthorityError, CertificateAuthority, Duration
from .rotation import Rotation, RotationEvent

logger = logging.getLogger(__name__)

SECURITY_HEADER = "workload.spiffe.io"
NO_IDENTITY = "no identity issued"
NO_HEADER = "security header missing from request"

FETCH_X509_SVID = "FetchX509SVID"
FETCH_X509_BUNDLES = "FetchX509Bundles"
FETCH_JWT_SVID = "FetchJWTSVID"
FETCH_JWT_BUNDLES = "FetchJWTBundles"
VALIDATE_JWT_SVID = "ValidateJWTSVID"

_MAX_QUEUED = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Federated = CertificateAuthority | X509Bundle
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class WorkloadIdentity:
    """One identity of a workload, with the hint that tells it from its others (Workload API, 5.2.1)."""

    spiffe_id: SpiffeId
    hint: str = ""


@dataclass(frozen=True)
class _Issued:
    svid: X509Svid
    authority: Authority
    at: datetime


@dataclass(frozen=True)
class _End:
    code: grpc.StatusCode
    details: str


@dataclass(eq=False)
class _Stream:
    method: str
    queue: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    idle: bool = False

    def put(self, item: Any) -> None:
        self.idle = False
        while self.queue.qsize() >= _MAX_QUEUED:
            # A client that doesn't read: each message is the full state, so the newest ones count.
            self.queue.get_nowait()
        self.queue.put_nowait(item)


@dataclass
class _Failure:
    code: grpc.StatusCode
    details: str
    method: str | None
    left: int | None


class Workload:
    """One registered workload and its socket. Made by `WorkloadApi.add_workload`.

    `calls` counts the calls of registered processes by method name (``"FetchX509SVID"``), failed ones
    included; `denied_calls` those of all others, and `calls_without_header` those that lacked the
    security header. `jwt_requests` holds the last ``FetchJWTSVID`` requests that were let in, as they came;
    `jwt_ttl` is the life of the tokens that they get.
    """

    def __init__(
        self,
        api: WorkloadApi,
        name: str,
        identities: tuple[WorkloadIdentity, ...],
        ca: CertificateAuthority,
        federates_with: Iterable[Federated],
        svid_ttl: Duration | None,
    ) -> None:
        self.name = name
        self.identities = identities
        self.ca = ca
        self.svid_ttl = svid_ttl
        self.calls: Counter[str] = Counter()
        self.denied_calls = 0
        self.calls_without_header = 0
        self.jwt_requests: deque[pb.JWTSVIDRequest] = deque(maxlen=_MAX_QUEUED)
        self.jwt_ttl: Duration = 300.0
        self._api = api
        self._loop = asyncio.get_running_loop()
        self._registrations = Registrations()
        self._federates_with: tuple[Federated, ...] = ()
        self._unsubscribe: list[Callable[[], None]] = []
        self._streams: set[_Stream] = set()
        self._peers: set[str] = set()
        self._waiting: set[asyncio.Event] = set()
        self._failures: list[_Failure] = []
        self._answering = asyncio.Event()
        self._answering.set()
        self._redacted = False
        self._pinned: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._issued = self._issue(svid_ttl)
        self._guard = Guard(
            check_socket_path(api.directory / f"{name}.sock"),
            api._inner_path,
            attest=self._attest,
            opened=self._opened,
            closed=self._closed,
        )
        self.set_federation(*federates_with)

    def __repr__(self) -> str:
        return f"<Workload {self.name} {self.spiffe_id} streams={self.streams}>"

    # -- Addresses and present state ----------------------------------------------------------------

    @property
    def spiffe_id(self) -> SpiffeId:
        """Its identity; the default one if it has several."""
        return self.identities[0].spiffe_id

    @property
    def path(self) -> Path:
        """The socket."""
        return self._guard.path

    @property
    def endpoint(self) -> str:
        """The value for ``SPIFFE_ENDPOINT_SOCKET`` (Workload Endpoint, section 4)."""
        return f"unix:{self.path}"

    @property
    def svid(self) -> X509Svid:
        """The SVID that was issued last, for the default identity."""
        return self._issued[0].svid

    @property
    def svids(self) -> tuple[X509Svid, ...]:
        """The SVIDs that were issued last, one for each identity."""
        return tuple(issued.svid for issued in self._issued)

    @property
    def issued_at(self) -> datetime:
        """When `svid` was issued, by the authority's clock."""
        return self._issued[0].at

    @property
    def redacted(self) -> bool:
        """True between `redact` and `restore`."""
        return self._redacted

    @property
    def pinned(self) -> bool:
        """True while a pushed X.509-SVID message stands in place of what `rotate` would send."""
        return FETCH_X509_SVID in self._pinned

    @property
    def running(self) -> bool:
        """True while the socket is there."""
        return self._guard.running

    @property
    def connections(self) -> int:
        """How many connections to the socket are open, strangers' included."""
        return len(self._peers)

    @property
    def streams(self) -> int:
        """How many ``FetchX509SVID`` streams are open."""
        return self.open_streams(FETCH_X509_SVID)

    def open_streams(self, method: str | None = None) -> int:
        """How many streams of `method`, or of every method, are open."""
        return sum(1 for stream in self._streams if method in (None, stream.method))

    # -- Who may have the identity ------------------------------------------------------------------

    def allow(self, *, pid: int | None = None, uid: int | None = None) -> None:
        """Give the identity to one process, or to each process of a user. At first nobody has it.

        A process counts as the same one only while its start time is the same too. Its children are not
        included. Raises `ProcessLookupError` when there is no such process.
        """
        self._registrations.allow(pid=pid, uid=uid)

    async def disallow(self, *, pid: int | None = None, uid: int | None = None) -> None:
        """Take back what `allow` gave (all of it, if neither is named) and close those connections."""
        self._registrations.disallow(pid=pid, uid=uid)
        await self._guard.drop(lambda peer: not self._registrations.decide(peer)[0])

    # -- What the agent sends -----------------------------------------------------------------------

    def rotate(self, *, ttl: Duration | None = None) -> X509Svid:
        """Issue new SVIDs and send them on each open stream. Ends what `push` pinned.

        Raises `ca.AuthorityError` when the signing authority has expired.
        """
        self._issued = self._issue(ttl if ttl is not None else self.svid_ttl)
        self._pinned.pop(FETCH_X509_SVID, None)
        self._publish(FETCH_X509_SVID)
        self._refresh_bundles()
        return self.svid

    def build_response(
        self,
        *svids: X509Svid,
        bundle: X509Bundle | bytes | None = None,
        federated: Mapping[str, bytes] | None = None,
    ) -> pb.X509SVIDResponse:
        """The message that delivers `svids` (default: the ones issued last), ready to be spoilt.

        `bundle` and `federated` (trust domain ID to concatenated DER) stand in place of the real ones.
        """
        own = self.ca.bundle if bundle is None else bundle
        own_der = own.der() if isinstance(own, X509Bundle) else own
        return pb.X509SVIDResponse(
            svids=[
                pb.X509SVID(
                    spiffe_id=str(svid.id),
                    x509_svid=svid.chain_der(),
                    x509_svid_key=svid.key_der(),
                    bundle=own_der,
                    hint=svid.hint,
                )
                for svid in svids or self.svids
            ],
            federated_bundles=self._federated_x509() if federated is None else federated,
        )

    def push(
        self,
        *svids: X509Svid,
        bundle: X509Bundle | bytes | None = None,
        federated: Mapping[str, bytes] | None = None,
    ) -> None:
        """Send these SVIDs on each open stream, and to each new one until `rotate`."""
        self.push_raw(self.build_response(*svids, bundle=bundle, federated=federated))

    def push_raw(
        self,
        response: pb.X509SVIDResponse | pb.X509BundlesResponse | pb.JWTBundlesResponse | pb.JWTSVIDResponse,
    ) -> None:
        """Send this message as it is, on each open stream of its kind and to each new one.

        X.509-SVID messages stay until `rotate`, the others until `unpin`; JWT-SVIDs have no stream, so
        theirs is the answer to each call.
        """
        method = _METHOD_OF[type(response)]
        self._pinned[method] = copy.deepcopy(response)
        self._publish(method)

    def unpin(self) -> None:
        """Go back to the SVIDs and bundles of the authority, and send them."""
        self._pinned.clear()
        for method in (FETCH_X509_SVID, FETCH_X509_BUNDLES, FETCH_JWT_BUNDLES):
            self._publish(method)

    def set_federation(self, *others: Federated) -> None:
        """Federate with these trust domains, and no others, from now on."""
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._federates_with = others
        authorities = [self.ca, *(o for o in others if isinstance(o, CertificateAuthority))]
        self._unsubscribe = [ca.subscribe(self._authority_changed) for ca in authorities]
        self._refresh()

    def redact(self) -> None:
        """Take the identity away: open streams end, and calls fail, with ``PERMISSION_DENIED``."""
        self._redacted = True
        self.end(grpc.StatusCode.PERMISSION_DENIED, NO_IDENTITY)

    def restore(self) -> None:
        """Give the identity back to whoever calls again."""
        self._redacted = False
        self._notify()

    def end(
        self,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        details: str = "stream ended by the test",
        *,
        method: str | None = None,
    ) -> int:
        """End the open streams (of `method`) with this status, after what was pushed before.

        Calls made later work. Returns how many streams it ends.
        """
        chosen = [stream for stream in self._streams if method in (None, stream.method)]
        for stream in chosen:
            stream.put(_End(code, details))
        return len(chosen)

    def fail_next(
        self,
        code: grpc.StatusCode,
        times: int | None = 1,
        *,
        details: str = "refused by the test",
        method: str | None = None,
    ) -> None:
        """Fail the next calls (of `method`) with this status; ``times=None`` means until `stop_failing`."""
        self._failures.append(_Failure(code, details, method, times))

    def stop_failing(self) -> None:
        """Forget what `fail_next` has left."""
        self._failures.clear()

    def hang(self) -> None:
        """Take new calls and never answer, until `resume`. Open streams are not held up."""
        self._answering.clear()

    def resume(self) -> None:
        """Answer again, also the calls that came during `hang`."""
        self._answering.set()

    async def start(self) -> None:
        """Put the socket back. Does nothing when it is there."""
        await self._guard.start()
        self._notify()

    async def stop(self) -> None:
        """Take the socket away and break every connection, as when the agent is stopped."""
        await self._guard.stop()
        self._notify()

    # -- Conditions to wait for ---------------------------------------------------------------------

    async def wait_until(
        self, condition: Callable[[], bool], timeout: float = 5.0, what: str = "the condition"
    ) -> None:
        """Wait until `condition()` holds; it is asked again after each call, message and step.

        Raises `TimeoutError` after `timeout` seconds, with the state that it found.
        """
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    event.clear()
                    await event.wait()
        except TimeoutError:
            raise TimeoutError(
                f"{what} did not come about in {timeout} s; {self.name} has "
                f"{self.open_streams()} streams, calls {dict(self.calls)}, {self.denied_calls} denied calls"
            ) from None
        finally:
            self._waiting.discard(event)

    async def wait_for_streams(self, count: int = 1, timeout: float = 5.0) -> None:
        """Wait until exactly `count` ``FetchX509SVID`` streams are open."""
        await self.wait_until(lambda: self.streams == count, timeout, f"{count} open streams")

    async def wait_for_calls(
        self, count: int, timeout: float = 5.0, *, method: str = FETCH_X509_SVID
    ) -> None:
        """Wait until `method` has been called at least `count` times."""
        await self.wait_until(lambda: self.calls[method] >= count, timeout, f"{count} calls of {method}")

    async def wait_for_delivery(self, timeout: float = 5.0) -> None:
        """Wait until each open stream has been sent all that was pushed, and all that end have ended.

        Sent means handed to the transport: what the client makes of it is the client's to show.
        """
        await self.wait_until(lambda: all(s.idle for s in self._streams), timeout, "delivery")

    # -- Inside -------------------------------------------------------------------------------------

    def _opened(self, peer: str, decision: Attestation) -> None:
        self._peers.add(peer)
        self._api._connections[peer] = (self, decision)
        self._notify()

    def _closed(self, peer: str) -> None:
        self._peers.discard(peer)
        self._api._connections.pop(peer, None)
        self._notify()

    def _attest(self, peer: PeerCredentials) -> Attestation:
        allowed, reason = self._registrations.decide(peer)
        decision = Attestation(self.name, peer.pid, peer.uid, peer.gid, allowed, reason)
        self._api._report(decision)
        return decision

    def _issue(self, ttl: Duration | None) -> tuple[_Issued, ...]:
        authority = self.ca.active
        return tuple(
            _Issued(
                self.ca.issue(each.spiffe_id, ttl=ttl, hint=each.hint, authority=authority),
                authority,
                self.ca.clock(),
            )
            for each in self.identities
        )

    def _renew_what_nobody_would_accept(self) -> None:
        """As an agent does: expired SVIDs, and those of an authority that is gone, are replaced."""
        now = self.ca.clock()
        if any(not i.authority.published or i.svid.not_after <= now for i in self._issued):
            try:
                self._issued = self._issue(self.svid_ttl)
            except AuthorityError as error:
                logger.warning("can't issue an SVID for %s: %s", self.spiffe_id, error)

    def _authority_changed(self) -> None:
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._refresh()
        else:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                self._loop.call_soon_threadsafe(self._refresh)

    def _refresh(self) -> None:
        self._renew_what_nobody_would_accept()
        if _differs(self._last.get(FETCH_X509_SVID), self._response(FETCH_X509_SVID)):
            self._publish(FETCH_X509_SVID)
        self._refresh_bundles()

    def _refresh_bundles(self) -> None:
        for method in (FETCH_X509_BUNDLES, FETCH_JWT_BUNDLES):
            if _differs(self._last.get(method), self._response(method)):
                self._publish(method)

    def _response(self, method: str) -> Any:
        if method in self._pinned:
            return self._pinned[method]
        if method == FETCH_X509_SVID:
            return self.build_response()
        if method == FETCH_X509_BUNDLES:
            own = {str(self.ca.trust_domain.id): self.ca.bundle.der()}
            return pb.X509BundlesResponse(bundles={**own, **self._federated_x509()})
        return pb.JWTBundlesResponse(
            bundles={str(domain.id): ca.jwt_bundle() for domain, ca in self._authorities().items()}
        )

    def _authorities(self) -> dict[TrustDomain, CertificateAuthority]:
        others = (other for other in self._federates_with if isinstance(other, CertificateAuthority))
        return {ca.trust_domain: ca for ca in (*others, self.ca)}

    def _jwt_bundles(self) -> dict[TrustDomain, JwtBundle]:
        return {
            domain: JwtBundle.from_jwks(domain, ca.jwt_bundle()) for domain, ca in self._authorities().items()
        }

    def _federated_x509(self) -> dict[str, bytes]:
        bundles = (o.bundle if isinstance(o, CertificateAuthority) else o for o in self._federates_with)
        return {str(bundle.trust_domain.id): bundle.der() for bundle in bundles}

    def _publish(self, method: str) -> None:
        response = self._response(method)
        self._last[method] = response
        for stream in self._streams:
            if stream.method == method:
                stream.put(response)
        self._notify()

    def _notify(self) -> None:
        for event in self._waiting:
            event.set()

    def _failure_for(self, method: str) -> _Failure | None:
        for failure in self._failures:
            if failure.method in (None, method):
                if failure.left is not None:
                    failure.left -= 1
                    if failure.left <= 0:
                        self._failures.remove(failure)
                return failure
        return None

    async def _serve_stream(self, method: str, context: Context) -> AsyncGenerator[Any, None]:
        if method == FETCH_X509_SVID and not self.pinned:
            self._renew_what_nobody_would_accept()
        stream = _Stream(method)
        response = self._response(method)
        self._last[method] = response
        stream.put(response)
        self._streams.add(stream)
        self._notify()
        try:
            while True:
                item = await stream.queue.get()
                if isinstance(item, _End):
                    if item.code is not grpc.StatusCode.OK:
                        await context.abort(item.code, item.details)
                    return
                yield item
                if stream.queue.empty():
                    stream.idle = True
                    self._notify()
        finally:
            self._streams.discard(stream)
            self._notify()

    async def _close(self) -> None:
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._unsubscribe = []
        await self.stop()


class WorkloadApi:
    """The Workload API of one machine: one socket per workload, in a directory only its owner can enter.

    `directory` is made if it doesn't exist (mode 700) and removed again; without one, a short temporary
    directory is used. One that others can enter is refused. `on_attest` is called with the
    `Attestation` of each connection, allowed or not.

    Use as ``async with``; Linux only, see `ztmtls.testing.attestation`.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        on_attest: Callable[[Attestation], None] | None = None,
    ) -> None:
        self._asked_directory = None if directory is None else Path(directory).absolute()
        self._directory: Path | None = None
        self._made_directory = False
        self._on_attest = on_attest
        self._workloads: dict[str, Workload] = {}
        self._connections: dict[str, tuple[Workload, Attestation]] = {}
        self._rotations: list[Rotation] = []
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> WorkloadApi:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def directory(self) -> Path:
        """The directory that holds the sockets."""
        if self._directory is None:
            raise RuntimeError("the Workload API is not started: use 'async with'")
        return self._directory

    @property
    def workloads(self) -> Mapping[str, Workload]:
        """The registered workloads by name."""
        return MappingProxyType(self._workloads)

    async def start(self) -> None:
        """Start the server. Raises `PermissionError`, `ValueError` or `FileExistsError` for a directory
        that is open to others, too long for sockets, or in use by another server."""
        require_linux()
        if self._server is not None:
            raise RuntimeError("the Workload API is started already")
        if self._asked_directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="spiffe-"))
            self._made_directory = True
        else:
            check_socket_path(self._asked_directory / "x.sock")
            self._made_directory = private_directory(self._asked_directory)
            self._directory = self._asked_directory
        try:
            inner = check_socket_path(self._inner_path)
            remove_stale_socket(inner)
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            pb_grpc.add_SpiffeWorkloadAPIServicer_to_server(  # type: ignore[no-untyped-call]
                _Servicer(self), server
            )
            server.add_insecure_port(f"unix:{inner}")
            await server.start()
        except BaseException:
            self._remove_directory()
            raise
        self._server = server

    async def close(self) -> None:
        """End every stream and remove the sockets. Does nothing when it is closed."""
        server, self._server = self._server, None
        if server is None:
            return
        for rotation in self._rotations:
            await rotation.stop()
        self._rotations.clear()
        for name in list(self._workloads):
            await self.remove_workload(name)
        await server.stop(None)
        self._inner_path.unlink(missing_ok=True)
        self._remove_directory()

    async def add_workload(
        self,
        name: str,
        *identities: SpiffeId | str | WorkloadIdentity,
        ca: CertificateAuthority,
        federates_with: Iterable[Federated] = (),
        svid_ttl: Duration | None = None,
    ) -> Workload:
        """Register a workload and open its socket, ``<directory>/<name>.sock``.

        The first of `identities` is its default one. `svid_ttl` is the life of its SVIDs (default: the
        authority's). No process has the identity yet: `Workload.allow` says which one may.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} can't be a workload's name: letters, digits, '.', '_', '-' only")
        if name in self._workloads:
            raise ValueError(f"there is a workload {name!r} already")
        if not identities:
            raise TypeError("a workload needs at least one SPIFFE ID")
        workload = Workload(
            self, name, tuple(_identity(each) for each in identities), ca, federates_with, svid_ttl
        )
        try:
            await workload.start()
        except BaseException:
            await workload._close()
            raise
        self._workloads[name] = workload
        return workload

    async def remove_workload(self, name: str) -> None:
        """Unregister a workload: its socket goes, its connections are closed. `KeyError` if unknown."""
        await self._workloads.pop(name)._close()

    def keep_rotating(
        self,
        ca: CertificateAuthority,
        *,
        svid_ttl: Duration = 60.0,
        ca_ttl: Duration = 600.0,
        on_event: Callable[[RotationEvent], None] | None = None,
    ) -> Rotation:
        """Renew the SVIDs and authorities of `ca` from now on, until the API is closed: see `Rotation`."""
        rotation = Rotation(
            ca,
            lambda: [w for w in self._workloads.values() if w.ca is ca],
            svid_ttl=svid_ttl,
            ca_ttl=ca_ttl,
            on_event=on_event,
        )
        rotation.start()
        self._rotations.append(rotation)
        return rotation

    # -- Inside -------------------------------------------------------------------------------------

    @property
    def _inner_path(self) -> Path:
        return self.directory / ".api"

    def _remove_directory(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None and self._made_directory:
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _report(self, decision: Attestation) -> None:
        if self._on_attest is not None:
            try:
                self._on_attest(decision)
            except Exception:
                logger.exception("on_attest failed for %s", decision)

    async def _admit(self, method: str, context: Context) -> Workload:
        """The workload whose registered process makes this call, or an aborted call."""
        workload, decision = self._connections.get(context.peer(), (None, None))
        registered = workload is not None and decision is not None and decision.allowed
        if workload is not None:
            if registered:
                workload.calls[method] += 1
            else:
                workload.denied_calls += 1
            workload._notify()
        if [str(v) for k, v in context.invocation_metadata() or () if k == SECURITY_HEADER] != ["true"]:
            if workload is not None:
                workload.calls_without_header += 1
                workload._notify()
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, NO_HEADER)
        if workload is None or not registered:
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, NO_IDENTITY)
        failure = workload._failure_for(method)
        if failure is not None:
            await _abort(context, failure.code, failure.details)
        await workload._answering.wait()
        if workload.redacted:
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, NO_IDENTITY)
        return workload


class _Servicer(pb_grpc.SpiffeWorkloadAPIServicer):
    """The gRPC methods, named as in the standard's workload.proto."""

    def __init__(self, api: WorkloadApi) -> None:
        self._api = api

    async def FetchX509SVID(  # noqa: N802
        self, request: pb.X509SVIDRequest, context: Context
    ) -> AsyncIterator[pb.X509SVIDResponse]:
        workload = await self._api._admit(FETCH_X509_SVID, context)
        async with contextlib.aclosing(workload._serve_stream(FETCH_X509_SVID, context)) as messages:
            async for message in messages:
                yield message

    async def FetchX509Bundles(  # noqa: N802
        self, request: pb.X509BundlesRequest, context: Context
    ) -> AsyncIterator[pb.X509BundlesResponse]:
        workload = await self._api._admit(FETCH_X509_BUNDLES, context)
        async with contextlib.aclosing(workload._serve_stream(FETCH_X509_BUNDLES, context)) as messages:
            async for message in messages:
                yield message

    async def FetchJWTBundles(  # noqa: N802
        self, request: pb.JWTBundlesRequest, context: Context
    ) -> AsyncIterator[pb.JWTBundlesResponse]:
        workload = await self._api._admit(FETCH_JWT_BUNDLES, context)
        async with contextlib.aclosing(workload._serve_stream(FETCH_JWT_BUNDLES, context)) as messages:
            async for message in messages:
                yield message

    async def FetchJWTSVID(  # noqa: N802
        self, request: pb.JWTSVIDRequest, context: Context
    ) -> pb.JWTSVIDResponse:
        workload = await self._api._admit(FETCH_JWT_SVID, context)
        workload.jwt_requests.append(request)
        pinned: pb.JWTSVIDResponse | None = workload._pinned.get(FETCH_JWT_SVID)
        if pinned is not None:
            return pinned
        if not request.audience or "" in request.audience:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "audience must be specified")
        identities = workload.identities
        if request.spiffe_id:
            try:
                wanted = SpiffeId.parse(request.spiffe_id)
            except InvalidSpiffeId as error:
                await _abort(
                    context, grpc.StatusCode.INVALID_ARGUMENT, f"invalid requested SPIFFE ID: {error.detail}"
                )
            identities = tuple(each for each in identities if each.spiffe_id == wanted)
            if not identities:
                await _abort(context, grpc.StatusCode.PERMISSION_DENIED, NO_IDENTITY)
        return pb.JWTSVIDResponse(
            svids=[
                pb.JWTSVID(
                    spiffe_id=str(each.spiffe_id),
                    svid=workload.ca.issue_jwt(each.spiffe_id, request.audience, ttl=workload.jwt_ttl),
                    hint=each.hint,
                )
                for each in identities
            ]
        )

    async def ValidateJWTSVID(  # noqa: N802
        self, request: pb.ValidateJWTSVIDRequest, context: Context
    ) -> pb.ValidateJWTSVIDResponse:
        workload = await self._api._admit(VALIDATE_JWT_SVID, context)
        if not request.audience:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "audience must be specified")
        if not request.svid:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "svid must be specified")
        try:
            svid = validate(request.svid, request.audience, workload._jwt_bundles(), workload.ca.clock())
        except JwtRefused as refusal:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, refusal.detail)
        claims = Struct()
        claims.update(svid.claims)
        return pb.ValidateJWTSVIDResponse(spiffe_id=str(svid.id), claims=claims)


_METHOD_OF: Mapping[type, str] = {
    pb.X509SVIDResponse: FETCH_X509_SVID,
    pb.X509BundlesResponse: FETCH_X509_BUNDLES,
    pb.JWTBundlesResponse: FETCH_JWT_BUNDLES,
    pb.JWTSVIDResponse: FETCH_JWT_SVID,
}


async def _abort(context: Context, code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort returned")


def _identity(each: SpiffeId | str | WorkloadIdentity) -> WorkloadIdentity:
    if isinstance(each, WorkloadIdentity):
        return each
    return WorkloadIdentity(SpiffeId.parse(each) if isinstance(each, str) else each)


def _differs(one: Any, other: Any) -> bool:
    return bool(one != other)
