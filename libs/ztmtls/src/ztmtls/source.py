"""The Workload API stream, kept alive for as long as the process lives (SPIFFE Workload API section 4).

`X509Source` holds the newest good `svid.X509Context`. Whatever the agent sends or fails to send, it keeps
what is still good, stops using what was redacted or has expired, says why, and heals by itself; only closing
it ends it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

from spiffe._proto import workload_pb2

from .ids import SpiffeId, TrustDomain
from .material import check_bundle, check_svid
from .reasons import Reason, Refusal, printable
from .stream import DENIAL_GRACE, METADATA, Announcer, SupervisedStream, Withdrawn
from .svid import InvalidSvid, X509Bundle, X509Context, X509Svid, rfc3339
from .verify import PeerRefused, verify_peer
from .workload_endpoint import parse_endpoint

logger = logging.getLogger(__name__)

Picker = Callable[[tuple[X509Svid, ...]], X509Svid]


class SourceState(StrEnum):
    """Where a source stands. Only in `serving` and `degraded` is there an identity to use.

    - `starting`: no SVID has arrived yet.
    - `serving`: the stream is up, and the last update was good.
    - `degraded`: the agent is away or sent something unusable; the last good SVID still holds.
    - `expired`: the SVID ran out before another one came.
    - `denied`: the agent answers ``PERMISSION_DENIED`` for longer than 2 seconds.
    - `closed`: the program closed the source.
    """

    STARTING = "starting"
    SERVING = "serving"
    DEGRADED = "degraded"
    EXPIRED = "expired"
    DENIED = "denied"
    CLOSED = "closed"


class NoIdentity(Refusal):
    """There is no SVID that may be used now: none yet, redacted, expired, or the source is closed.

    Reason: `no_identity`, `identity_denied` or `identity_expired`.
    """


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """A source for people and probes. Times are RFC 3339 in UTC, `seconds_left` is to the SVID's end.

    `reason` says what is wrong, and is empty when nothing is. `id`, `serial`, `not_after` and `seconds_left`
    are of the default SVID, None without one. `failures` counts failed attempts and discarded updates.
    `authorities` counts the X.509 authorities of each trust domain.
    """

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
    def status(self) -> SourceStatus:
        """Everything a probe, a metric or a person wants to know."""
        ...

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after every change; returns the way out."""
        ...


class _Holder(Announcer):
    """The snapshot and who may see it. Shared by both kinds of source."""

    _problem = "no SVID has arrived yet"
    _snapshot: X509Context | None = None

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
        self._mark_well()
        self._last_update = now
        if not unchanged:
            self._notify()
        return not unchanged


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


# When this part of the life that an SVID had left has passed without an update, the stream is opened anew: it
# may be dead in a way that the socket does not show. Agents renew at half of the life.
_OVERDUE = 0.75
# A stream must bring something within this many seconds while we have no identity yet. Where one was lost,
# patience begins short and doubles up to the same: a hung agent is soon left, a slow one is waited for.
_FIRST_ANSWER = 30.0
_URGENT_ANSWER = 5.0


class X509Source(_Holder, SupervisedStream):
    """The identity of this workload, from the Workload API, for as long as the process lives.

    Use ``async with`` in a program with an event loop, and plain ``with`` in one without: then the stream
    runs on a thread of its own. Either way entering returns at once; `ready` (or `wait`) waits for the
    first SVID.

    Args:
        endpoint: Workload API address; default is the variable ``SPIFFE_ENDPOINT_SOCKET``.
        expected_id: the SPIFFE ID we expect to be: a service never runs under another name by accident. An
            update without it means that the identity was withdrawn, as a denial does.
        picker: chooses the default SVID among several, when `expected_id` does not: it gets them in the
            agent's order and returns one of them. When it raises, or returns something else, the update is
            discarded. Without either the first one is the default (Workload API section 8).

    Raises `workload_endpoint.InvalidEndpoint` for an address that is none.
    """

    _name = "ztmtls-x509-source"

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        expected_id: SpiffeId | str | None = None,
        picker: Picker | None = None,
    ) -> None:
        super().__init__(parse_endpoint(endpoint))
        self._expected = SpiffeId.parse(expected_id) if isinstance(expected_id, str) else expected_id
        self._picker = picker

    async def ready(self, timeout: float | None = None) -> X509Context:
        """Wait for an identity.

        Raises `NoIdentity` with what is wrong when `timeout` seconds pass, or when the source is closed.
        """
        with contextlib.suppress(TimeoutError):
            await self._until_usable(timeout)
        return self.context

    # --- the stream ---

    def _call(self, stub: Any) -> Any:
        return stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=METADATA)

    def _patience(self, answered: bool) -> float:
        snapshot = self._snapshot
        if snapshot is None:
            return _FIRST_ANSWER
        if not self._usable():
            return min(_FIRST_ANSWER, _URGENT_ANSWER * float(2 ** min(self._silences, 10)))
        return max((snapshot.svid.expires - time.time()) * _OVERDUE, 1.0)

    def _has_something_to_lose(self) -> bool:
        return self._snapshot is not None

    def _receive(self, response: Any) -> None:
        now = datetime.now(UTC)
        svids, bundles, dropped = self.read(response, now)
        changed = self._install(svids, bundles, now)
        self._recovered()
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
                # Workload API section 5.2.1: what is not in the newest message may not be used any more.
                raise Withdrawn(
                    Reason.IDENTITY_DENIED, f"we expect to be {self._expected}, but the agent names {got}"
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
