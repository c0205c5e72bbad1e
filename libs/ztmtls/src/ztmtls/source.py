"""The Workload API stream, kept alive for as long as the process lives (SPIFFE Workload API section 4).

`X509Source` holds the newest good `svid.X509Context`. Whatever the agent sends or fails to send, it keeps
what is still good, stops using what was redacted or has expired, says why, and heals by itself; only closing
it ends it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
import grpc.aio
from spiffe._proto import workload_pb2, workload_pb2_grpc

from .ids import SpiffeId, TrustDomain
from .material import check_bundle, check_svid
from .reasons import Reason, Refusal, printable
from .svid import InvalidSvid, X509Bundle, X509Context, X509Svid, rfc3339
from .verify import PeerRefused, verify_peer
from .workload_endpoint import parse_endpoint

logger = logging.getLogger(__name__)

Picker = Callable[[tuple[X509Svid, ...]], X509Svid]


class SourceState(StrEnum):
    """Where a source stands. Only in `serving` and `degraded` is there an identity to use."""

    STARTING = "starting"
    SERVING = "serving"
    DEGRADED = "degraded"
    EXPIRED = "expired"
    DENIED = "denied"
    CLOSED = "closed"


class NoIdentity(Refusal):
    """There is no SVID that may be used now: none yet, redacted, expired, or the source is closed."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """A source for people and probes. Times are RFC 3339 in UTC, `seconds_left` is to the SVID's end."""

    state: SourceState
    reason: str
    id: str | None
    serial: str | None
    not_after: str | None
    seconds_left: float | None
    generation: int
    last_update: str | None
    failures: int
    authorities: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON-able mapping."""
        return {name: getattr(self, name) for name in self.__slots__} | {"state": str(self.state)}


class Source(Protocol):
    """Anything that has an identity to offer: `X509Source`, or `StaticSource` in tests."""

    @property
    def context(self) -> X509Context: ...
    @property
    def state(self) -> SourceState: ...
    def status(self) -> SourceStatus: ...
    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]: ...


class _Holder:
    """The snapshot, who may see it, and who wants to know of changes. Shared by both kinds of source."""

    def __init__(self) -> None:
        self._snapshot: X509Context | None = None
        self._denied = False
        self._closed = False
        self._problem = "no SVID has arrived yet"
        self._last_update: datetime | None = None
        self._failures = 0
        self._connected = False
        self._subscribers: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    @property
    def context(self) -> X509Context:
        """The newest good context. Raises `NoIdentity` when none may be used."""
        snapshot = self._snapshot
        if snapshot is not None and not self._denied and not self._closed:
            if time.time() < snapshot.svid.expires:
                return snapshot
            raise NoIdentity(
                Reason.IDENTITY_EXPIRED, f"our SVID expired at {rfc3339(snapshot.svid.not_after)}"
            )
        if self._denied:
            raise NoIdentity(Reason.IDENTITY_DENIED, self._problem)
        raise NoIdentity(Reason.NO_IDENTITY, "the source is closed" if self._closed else self._problem)

    @property
    def state(self) -> SourceState:
        """Where the source stands at this moment."""
        if self._closed:
            return SourceState.CLOSED
        if self._denied:
            return SourceState.DENIED
        snapshot = self._snapshot
        if snapshot is None:
            return SourceState.STARTING
        if time.time() >= snapshot.svid.expires:
            return SourceState.EXPIRED
        return SourceState.SERVING if self._connected and not self._problem else SourceState.DEGRADED

    def status(self) -> SourceStatus:
        """Everything a probe, a metric or a person wants to know."""
        snapshot = self._snapshot
        svid = snapshot.svid if snapshot and not self._denied else None
        return SourceStatus(
            state=self.state,
            reason=self._problem,
            id=str(svid.id) if svid else None,
            serial=svid.serial if svid else None,
            not_after=rfc3339(svid.not_after) if svid else None,
            seconds_left=round(svid.expires - time.time(), 1) if svid else None,
            generation=snapshot.generation if snapshot else 0,
            last_update=rfc3339(self._last_update) if self._last_update else None,
            failures=self._failures,
            authorities={str(td): len(b.authorities) for td, b in snapshot.bundles.items()}
            if snapshot and not self._denied
            else {},
        )

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after every change of the context or of who may see it; returns the way out.

        It runs on the source's own event loop or thread and must return at once.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    def wait(self, timeout: float | None = None) -> X509Context:
        """Block this thread until there is an identity; for programs without an event loop.

        Raises `NoIdentity` with what is wrong when `timeout` seconds pass, or when the source is closed.
        """
        with self._changed:
            self._changed.wait_for(self._settled, timeout)
        return self.context

    def _usable(self) -> bool:
        try:
            return bool(self.context)
        except NoIdentity:
            return False

    def _settled(self) -> bool:
        return self._closed or self._usable()

    def _install(
        self, svids: tuple[X509Svid, ...], bundles: dict[TrustDomain, X509Bundle], now: datetime
    ) -> bool:
        old = self._snapshot
        new = X509Context(old.generation + 1 if old else 1, svids, bundles, now)
        unchanged = old is not None and not self._denied and new.same_material(old)
        if not unchanged:
            self._snapshot = new
        self._denied = False
        self._connected = True
        self._problem = ""
        self._last_update = now
        if not unchanged:
            self._notify()
        return not unchanged

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for callback in tuple(self._subscribers):
            try:
                callback()
            except (Exception, asyncio.CancelledError):  # a subscriber's own trouble must not be ours
                logger.exception("a subscriber of the X.509 source failed")


class StaticSource(_Holder):
    """A source that holds what it is given: for tests, and for programs with an identity from elsewhere."""

    def __init__(self, context: X509Context) -> None:
        super().__init__()
        self.set(context)

    def set(self, context: X509Context) -> None:
        """Replace identity and bundles as one update. The generation is counted here."""
        self._install(context.svids, dict(context.bundles), datetime.now(UTC))

    def deny(self) -> None:
        """Withdraw the identity, as an agent does when the entry is deleted."""
        self._denied = True
        self._problem = "no identity issued"
        self._notify()


# Retries: the first comes at once, then ever later, with jitter so that many workloads on one node do not
# ask in step. Nothing here grows without bound.
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0
# InvalidArgument and Unimplemented mean that asking again won't help (Workload Endpoint section 6): ask
# seldom, but do ask, since an agent is replaced without telling us.
_FUTILE_DELAY = 10.0
_FUTILE = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
# A denial must hold this long before the identity is dropped: entries flap for a moment when a server
# restarts. Dropping must happen (Workload API section 5.2.1), and well within 5 s.
DENIAL_GRACE = 2.0
_DENIAL_MEMORY = 3 * _LONGEST_DELAY
# When this part of the life that an SVID had left has passed without an update, the stream is opened anew: it
# may be dead in a way that the socket does not show. Agents renew at half of the life.
_OVERDUE = 0.75
# A stream must bring something within this many seconds while we have no identity yet. Where one was lost,
# patience begins short and doubles up to the same: a hung agent is soon left, a slow one is waited for.
_FIRST_ANSWER = 30.0
_URGENT_ANSWER = 5.0
# How often a quiet stream is looked at, in seconds: the wall clock may jump when a machine wakes up.
_LOOK = 1.0


class X509Source(_Holder):
    """The identity of this workload, from the Workload API, for as long as the process lives.

    Use ``async with`` in a program with an event loop, and plain ``with`` in one without: then the stream
    runs on a thread of its own. Either way entering returns at once; `ready` (or `wait`) waits for the
    first SVID.

    Args:
        endpoint: Workload API address; default is the variable ``SPIFFE_ENDPOINT_SOCKET``.
        expected_id: the SPIFFE ID we expect to be. An update without it is discarded: a service never
            runs under another name by accident.
        picker: chooses the default SVID among several, when `expected_id` does not.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        expected_id: SpiffeId | str | None = None,
        picker: Picker | None = None,
    ) -> None:
        super().__init__()
        self.target = parse_endpoint(endpoint)
        self._expected = SpiffeId.parse(expected_id) if isinstance(expected_id, str) else expected_id
        self._picker = picker
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._attempt = 0
        self._silences = 0
        self._denied_since: float | None = None
        self._denied_last = 0.0
        self._last_logged = ""
        self._repeats = 0

    # --- life ---

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._supervise(), name="ztmtls-x509-source")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._close()

    def __enter__(self) -> Self:
        started = threading.Event()

        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.create_task(self._supervise(), name="ztmtls-x509-source")
            started.set()
            await asyncio.gather(self._task, return_exceptions=True)

        self._thread = threading.Thread(
            target=lambda: asyncio.run(main()), name="ztmtls-x509-source", daemon=True
        )
        self._thread.start()
        started.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._loop is not None and self._task is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join()
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._notify()

    async def ready(self, timeout: float | None = None) -> X509Context:
        """Wait for an identity.

        Raises `NoIdentity` with what is wrong when `timeout` seconds pass, or when the source is closed.
        """
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        unsubscribe = self.subscribe(wake)
        try:
            async with asyncio.timeout(timeout):
                while not self._settled():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            pass  # the context, or why there is none
        finally:
            unsubscribe()
        return self.context

    # --- the stream ---

    async def _supervise(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while True:
            opened = time.monotonic()
            try:
                await self._stream_once()
                delay = self._backoff(opened)
            except grpc.RpcError as error:
                delay = self._on_status(error, opened)
            except (Exception, asyncio.CancelledError) as error:
                if task.cancelling():
                    raise
                # Nothing that arrives may end this loop (gRPC cancels calls of its own accord, too). The
                # type is enough to find the cause; the text of an unknown error might hold what must not
                # be logged.
                self._fault(f"unexpected {type(error).__name__} while reading the Workload API")
                delay = self._backoff(opened)
            self._connected = False
            await asyncio.sleep(delay)

    async def _stream_once(self) -> None:
        # A channel of its own for each attempt: gRPC's own reconnect backoff grows to minutes, and the
        # socket file may be another one now. Nor is a connection of a former attempt taken up again: an
        # agent attests the caller per connection. Local calls never go through a proxy.
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", 16 << 20),
        ]
        async with grpc.aio.insecure_channel(self.target, options=options) as channel:
            stub: Any = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call]
            call = stub.FetchX509SVID(
                workload_pb2.X509SVIDRequest(), metadata=(("workload.spiffe.io", "true"),)
            )
            while True:
                response = await self._next_message(call)
                if response is None:
                    self._silences += 1
                    self._fault("the agent is silent although an update is due")
                    return
                if response is grpc.aio.EOF:
                    if await call.code() is not grpc.StatusCode.OK:
                        await call.read()  # raises the status
                    self._fault("the agent ended the stream")
                    return
                self._on_update(response)

    async def _next_message(self, call: Any) -> Any:
        """What the stream brings next; None when it is quiet for longer than it is believed."""
        patience = self._patience()
        began = (time.monotonic(), time.time())
        reading = asyncio.ensure_future(call.read())
        try:
            while not reading.done():
                silent_for = max(time.monotonic() - began[0], time.time() - began[1])
                if silent_for >= patience:
                    return None
                await asyncio.wait({reading}, timeout=min(_LOOK, patience - silent_for))
            return reading.result()
        finally:
            reading.cancel()

    def _patience(self) -> float:
        """How long a quiet stream is believed, in seconds."""
        snapshot = self._snapshot
        if snapshot is None:
            return _FIRST_ANSWER
        if not self._usable():
            return min(_FIRST_ANSWER, _URGENT_ANSWER * float(2 ** min(self._silences, 10)))
        return max((snapshot.svid.expires - time.time()) * _OVERDUE, 1.0)

    def _on_update(self, response: Any) -> None:
        self._silences = 0
        now = datetime.now(UTC)
        # Workload API section 4.5: report, discard the message, go on with the last good one.
        try:
            svids, bundles, dropped = self.read(response, now)
        except Refusal as refusal:
            self._fault(f"update discarded: {refusal.detail}")
            return
        except Exception as error:
            self._fault(f"update discarded: reading it ended in {type(error).__name__}")
            return
        self._denied_since = None
        changed = self._install(svids, bundles, now)
        if self._last_logged or self._repeats:
            logger.info("the Workload API answers again (after %d more failures)", self._repeats)
            self._last_logged, self._repeats = "", 0
        if changed:
            svid = svids[0]
            logger.info(
                "SVID %s serial %s valid until %s, generation %d",
                svid.id,
                svid.serial,
                rfc3339(svid.not_after),
                self.context.generation if self._usable() else 0,
            )
        if dropped:
            self._fault("; ".join(dropped))

    def read(
        self, response: Any, now: datetime
    ) -> tuple[tuple[X509Svid, ...], dict[TrustDomain, X509Bundle], list[str]]:
        """Judge one ``X509SVIDResponse`` as a whole, without taking it over: what a running source would use.

        Returns the SVIDs (the default first), the bundles, and why a federated one was dropped. Raises
        `Refusal` for what is to be discarded. What a response does not hold is gone (Workload API 4.4).
        """
        if not response.svids:
            raise InvalidSvid(Reason.INVALID_UPDATE, "it holds no SVID")
        svids: list[X509Svid] = []
        bundles: dict[TrustDomain, X509Bundle] = {}
        hints: set[str] = set()
        for message in response.svids:
            svid, bundle = _read_svid(message, now)
            known = bundles.setdefault(bundle.trust_domain, bundle)
            if set(known.authorities) != set(bundle.authorities):
                raise InvalidSvid(
                    Reason.INVALID_UPDATE, f"it holds two different bundles of {bundle.trust_domain}"
                )
            if svid.hint and svid.hint in hints:
                continue  # Workload API section 5.2.1: the first one with a hint counts
            hints.add(svid.hint)
            svids.append(svid)
        dropped = []
        for name, der in response.federated_bundles.items():
            # A broken foreign bundle costs only that domain; an empty one means: trust nothing there.
            try:
                domain = TrustDomain.parse(name)
                if domain not in bundles:
                    bundle = X509Bundle.from_der(domain, der)
                    check_bundle(bundle)
                    bundles[domain] = bundle
            except Refusal as refusal:
                dropped.append(f"federated bundle of {printable(name)} dropped: {refusal.detail}")
        return self._default_first(tuple(svids)), bundles, dropped

    def _default_first(self, svids: tuple[X509Svid, ...]) -> tuple[X509Svid, ...]:
        if self._expected is not None:
            chosen = next((s for s in svids if s.id == self._expected), None)
            if chosen is None:
                got = ", ".join(str(s.id) for s in svids)
                raise InvalidSvid(
                    Reason.INVALID_UPDATE, f"we expect to be {self._expected}, but it names {got}"
                )
        elif self._picker is not None:
            try:
                chosen = self._picker(svids)
            except Exception as error:
                raise InvalidSvid(
                    Reason.INVALID_UPDATE, f"the picker failed with {type(error).__name__}"
                ) from error
            if not any(chosen is svid for svid in svids):
                raise InvalidSvid(Reason.INVALID_UPDATE, "the picker chose none of the SVIDs it was given")
        else:
            chosen = svids[0]
        return (chosen, *(s for s in svids if s is not chosen))

    # --- failures ---

    def _on_status(self, error: grpc.RpcError, opened: float) -> float:
        code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
        detail = printable(str(error.details() or "")) if hasattr(error, "details") else ""
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return self._on_denial(detail, opened)
        if code is grpc.StatusCode.UNAVAILABLE and "connect" in detail:
            self._fault(self._unreachable())
            return self._backoff(opened)
        self._fault(
            f"the agent answered {code.name}: {detail}" if detail else f"the agent answered {code.name}"
        )
        return _FUTILE_DELAY * random.uniform(0.9, 1.1) if code in _FUTILE else self._backoff(opened)  # noqa: S311

    def _unreachable(self) -> str:
        scheme, _, path = self.target.partition(":")
        if scheme == "unix" and not os.path.exists(path):
            return "the Workload API can't be reached: there is no socket"
        return "the Workload API can't be reached: nobody answers there"

    def _on_denial(self, detail: str, opened: float) -> float:
        self._fault(f"no entry for this workload: the agent answered PERMISSION_DENIED: {detail}")
        now = time.monotonic()
        # Other failures in between don't give the identity back; a long time without a denial does.
        if self._denied_since is None or now - self._denied_last > _DENIAL_MEMORY:
            self._denied_since = now
        self._denied_last = now
        held = now - self._denied_since
        # Without an identity to lose there is nothing to wait for.
        if not self._denied and (self._snapshot is None or held >= DENIAL_GRACE):
            self._denied = True
            self._notify()
        if not self._denied:
            return min(self._backoff(opened), max(DENIAL_GRACE - held, 0.05))
        return self._backoff(opened)

    def _backoff(self, opened: float) -> float:
        # Only a stream that lived for a while ends the growth: not one that brings an update and closes.
        if time.monotonic() - opened > _LONGEST_DELAY:
            self._attempt = 0
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * float(2 ** min(self._attempt, 10)))
        self._attempt += 1
        return delay * random.uniform(0.75, 1.0)  # noqa: S311 - spreads load, no secret

    def _fault(self, problem: str) -> None:
        """Remember what is wrong. The same thing again is counted, not logged."""
        self._problem = problem
        self._failures += 1
        if problem == self._last_logged:
            self._repeats += 1
            return
        self._last_logged, self._repeats = problem, 0
        logger.warning("%s (Workload API at %s)", problem, self.target)


def _read_svid(message: Any, now: datetime) -> tuple[X509Svid, X509Bundle]:
    for name in ("spiffe_id", "x509_svid", "x509_svid_key", "bundle"):
        if not getattr(message, name):
            raise InvalidSvid(Reason.INVALID_UPDATE, f"field {name} is empty")
    svid = X509Svid.from_der(message.x509_svid, message.x509_svid_key, message.hint)
    if message.spiffe_id != str(svid.id):
        raise InvalidSvid(
            Reason.INVALID_UPDATE,
            f"spiffe_id is '{printable(message.spiffe_id)}' but the certificate names {svid.id}",
        )
    bundle = X509Bundle.from_der(svid.id.trust_domain, message.bundle)
    check_svid(svid)
    check_bundle(bundle)
    try:
        verify_peer(svid.chain, {bundle.trust_domain: bundle}, now)
    except PeerRefused as refusal:
        raise InvalidSvid(refusal.reason, f"our own SVID does not verify: {refusal.detail}") from refusal
    return svid, bundle


__all__ = [
    "DENIAL_GRACE",
    "NoIdentity",
    "Source",
    "SourceState",
    "SourceStatus",
    "StaticSource",
    "X509Source",
]
