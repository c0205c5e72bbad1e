"""JWT-SVIDs from the Workload API, and the live bundles to validate those of others (Workload API section 6).

`JwtSource` fetches tokens for us, and keeps the JWT bundles of every trust domain that we know. It treats
them as `source.X509Source` treats SVIDs: the last good ones are kept through outages and broken updates,
what is redacted is dropped, and it heals by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TypeVar

import grpc
import grpc.aio
from spiffe._proto import workload_pb2

from .ids import SpiffeId, TrustDomain
from .jwt_svid import JwtBundle, JwtSvid, issued_to_us, validate
from .reasons import Reason, Refusal, printable
from .source import NoIdentity, SourceState
from .stream import METADATA, SupervisedStream, explain, open_channel, status_of, stub_of
from .svid import InvalidSvid, rfc3339
from .workload_endpoint import parse_endpoint

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A stream must bring something within this many seconds of its opening (Workload API section 4.3).
_FIRST_ANSWER = 30.0
# Keys change seldom, so a silent stream says nothing. It is opened anew after this many seconds: it may be
# dead in a way that the socket does not show, and the first message is always the full state.
_QUIET = 300.0
# While the agent is away, a token past half of its life is offered on, and the agent asked this seldom.
_RETRY = 5.0
# A fetch waits for an agent that is being replaced; gRPC by itself would look again only after a second.
_RECONNECT = {"grpc.initial_reconnect_backoff_ms": 100, "grpc.min_reconnect_backoff_ms": 100}


class NoBundles(Refusal):
    """There are no JWT bundles that may be used now. Reason: `no_jwt_bundles`."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.NO_JWT_BUNDLES, detail)


@dataclass(frozen=True, slots=True)
class JwtSourceStatus:
    """A source for people and probes. `keys` counts the JWT authorities of each trust domain."""

    state: SourceState
    reason: str
    last_update: str | None
    failures: int
    keys: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON-able mapping."""
        return {name: getattr(self, name) for name in self.__slots__} | {"state": str(self.state)}


@dataclass(frozen=True, slots=True)
class _Request:
    audience: tuple[str, ...]
    spiffe_id: str


@dataclass(slots=True)
class _Cached:
    svid: JwtSvid
    fresh_until: float


class JwtSource(SupervisedStream):
    """JWT-SVIDs of this workload, and the bundles that verify those of others, while the process lives.

    Use ``async with`` in a program with an event loop. In one without, use plain ``with``, and `run` for
    what is awaited here: ``source.run(source.fetch("reports"))``. `ready` waits for the first bundles.

    Args:
        endpoint: Workload API address; default is the variable ``SPIFFE_ENDPOINT_SOCKET``.
        timeout: seconds that one `fetch` may take, and that `validate` waits for the first bundles.
    """

    _name = "ztmtls-jwt-source"

    def __init__(self, endpoint: str | None = None, *, timeout: float = 5.0) -> None:
        super().__init__(parse_endpoint(endpoint))
        self._timeout = timeout
        self._bundles: Mapping[TrustDomain, JwtBundle] | None = None
        self._cache: dict[_Request, _Cached] = {}
        self._fetching: dict[tuple[_Request, bool], asyncio.Task[JwtSvid]] = {}

    # --- what it offers ---

    @property
    def bundles(self) -> Mapping[TrustDomain, JwtBundle]:
        """The newest good bundles. Raises `NoBundles` when none may be used."""
        if self._bundles is None or self._denied or self._closed:
            raise NoBundles("the source is closed" if self._closed else self._problem)
        return self._bundles

    @property
    def state(self) -> SourceState:
        """Where the source stands. It offers bundles in `serving` and `degraded` only; never `expired`."""
        if self._closed:
            return SourceState.CLOSED
        if self._denied:
            return SourceState.DENIED
        if self._bundles is None:
            return SourceState.STARTING
        return SourceState.SERVING if self._connected and not self._problem else SourceState.DEGRADED

    def status(self) -> JwtSourceStatus:
        """Everything a probe, a metric or a person wants to know."""
        bundles = self._bundles if self._usable() and self._bundles else {}
        return JwtSourceStatus(
            state=self.state,
            reason=self._problem,
            last_update=rfc3339(self._last_update) if self._last_update else None,
            failures=self._failures,
            keys={str(domain): len(bundle.authorities) for domain, bundle in bundles.items()},
        )

    async def ready(self, timeout: float | None = None) -> Mapping[TrustDomain, JwtBundle]:
        """Wait for bundles. Raises `NoBundles` with what is wrong when `timeout` seconds pass."""
        try:
            await self._until_usable(timeout)
        except TimeoutError:
            raise NoBundles(self._problem) from None
        return self.bundles

    async def validate(self, token: str, audience: str) -> JwtSvid:
        """Validate a caller's `token` for us, who answer to `audience`, against the live bundles.

        Here and not by the agent's ``ValidateJWTSVID`` (Workload API section 6.3 allows both): a request
        costs no call, and the token goes nowhere. Raises `jwt_svid.JwtRefused` when the token is no good,
        and `NoBundles` when that can't be told.
        """
        bundles = await self.ready(self._timeout) if self.state is SourceState.STARTING else self.bundles
        return validate(token, audience, bundles, datetime.now(UTC))

    async def fetch(
        self, audience: str, *more: str, spiffe_id: SpiffeId | str | None = None, fresh: bool = False
    ) -> JwtSvid:
        """A JWT-SVID of ours for `audience`: the receiver, by a name that it answers to.

        One audience is best: each of several can use the token at the others (JWT-SVID section 7.2). The
        token is kept until half of the life that it came with, and asked for once however many ask here.
        While the agent is away the kept one is given until it expires.

        Args:
            spiffe_id: which of our identities; default is the first that the agent names.
            fresh: ask the agent now, whatever is kept; for when a receiver refused the token.

        Raises `source.NoIdentity` when there is none: `identity_denied` when the agent says that we may not
        have it, also while an older one is still valid; else `no_identity`, or what was wrong with the
        agent's answer.
        """
        if not all((audience, *more)):
            raise ValueError("an audience is empty")
        if asyncio.get_running_loop() is not self._loop or self._closed:
            raise NoIdentity(Reason.NO_IDENTITY, "the source is not running in this event loop")
        wanted = SpiffeId.parse(spiffe_id) if isinstance(spiffe_id, str) else spiffe_id
        request = _Request((audience, *more), str(wanted) if wanted else "")
        kept = self._cache.get(request)
        if kept is not None and not fresh and time.time() < kept.fresh_until:
            return kept.svid
        task = self._fetching.get((request, fresh))
        if task is None:
            task = asyncio.create_task(self._fetch(request, fresh), name=f"{self._name}-fetch")
            self._fetching[request, fresh] = task
            task.add_done_callback(lambda done: self._fetched(request, fresh, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and current is not None and not current.cancelling():
                raise NoIdentity(Reason.NO_IDENTITY, "the source was closed meanwhile") from None
            raise

    def run(self, awaited: Coroutine[Any, Any, T]) -> T:
        """Await `fetch`, `validate` or `ready` from a thread without an event loop, after plain ``with``."""
        if self._thread is None or self._loop is None or self._closed:
            awaited.close()
            raise RuntimeError("run() is for sources inside a plain 'with'")
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result()

    # --- fetching ---

    async def _fetch(self, request: _Request, fresh: bool) -> JwtSvid:
        kept = None if fresh else self._cache.get(request)
        bundles = self._bundles
        try:
            svid = await _ask(self.target, request, self._timeout, wait=kept is None)
        except NoIdentity as failure:
            if failure.reason is Reason.IDENTITY_DENIED:
                self._cache.pop(request, None)
                raise
            return self._keep_on(request, kept, failure)
        if self._bundles is bundles:  # else the key that signed it may be gone already
            now = time.time()
            self._cache = {r: c for r, c in self._cache.items() if c.svid.expiry.timestamp() > now}
            self._cache[request] = _Cached(svid, now + (svid.expiry.timestamp() - now) / 2)
        return svid

    def _keep_on(self, request: _Request, kept: _Cached | None, failure: NoIdentity) -> JwtSvid:
        now = time.time()
        # What was dropped meanwhile, by a denial or with its key, is not offered again.
        if kept is None or self._cache.get(request) is not kept or kept.svid.expiry.timestamp() <= now:
            raise failure
        kept.fresh_until = min(now + _RETRY, kept.svid.expiry.timestamp())
        logger.warning("%s (a JWT-SVID valid until %s is used on)", failure, rfc3339(kept.svid.expiry))
        return kept.svid

    def _fetched(self, request: _Request, fresh: bool, task: asyncio.Task[JwtSvid]) -> None:
        del self._fetching[request, fresh]
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody waits any more it is no news

    # --- the stream of bundles ---

    def _call(self, stub: Any) -> Any:
        return stub.FetchJWTBundles(workload_pb2.JWTBundlesRequest(), metadata=METADATA)

    def _patience(self, answered: bool) -> float:
        return _QUIET if answered else _FIRST_ANSWER

    def _silence(self, answered: bool) -> str:
        return "" if answered else super()._silence(answered)

    def _usable(self) -> bool:
        return self._bundles is not None and not self._denied and not self._closed

    def _has_something_to_lose(self) -> bool:
        return self._bundles is not None

    def _on_denial(self, opened: float) -> float:
        self._cache.clear()  # the agent is asked again before a token is used on
        return super()._on_denial(opened)

    def _receive(self, response: Any) -> None:
        """Read one response as a whole: what it does not hold is gone (Workload API section 4.4)."""
        if not response.bundles:
            raise InvalidSvid(Reason.INVALID_UPDATE, "it holds no JWT bundle")
        bundles: dict[TrustDomain, JwtBundle] = {}
        dropped = []
        for name, document in response.bundles.items():
            # A broken document costs only that domain, which keeps its last good keys.
            try:
                domain = TrustDomain.parse(name)
                try:
                    bundles[domain] = JwtBundle.from_jwks(domain, document)
                except InvalidSvid:
                    if self._bundles is not None and not self._denied and domain in self._bundles:
                        bundles[domain] = self._bundles[domain]
                    raise
            except Refusal as refusal:
                dropped.append(f"bundle of {printable(name)} discarded: {refusal.detail}")
        if not bundles:
            raise InvalidSvid(Reason.INVALID_UPDATE, "; ".join(dropped))
        changed = self._denied or self._bundles is None or bundles != dict(self._bundles)
        self._last_update = datetime.now(UTC)
        self._recovered()
        if changed:
            self._bundles = MappingProxyType(bundles)
            self._cache.clear()  # a token of ours may be signed by a key that is gone
            logger.info(
                "JWT bundles: %s", ", ".join(f"{d} ({len(b.authorities)} keys)" for d, b in bundles.items())
            )
            self._notify()
        if dropped:
            self._fault("; ".join(dropped))

    # --- life ---

    def _close(self) -> None:
        for task in self._fetching.values():
            task.cancel()
        self._cache.clear()
        super()._close()


def fetch_once(
    endpoint: str | None, audience: str, *, spiffe_id: str | None = None, timeout: float = 5.0
) -> JwtSvid:
    """One JWT-SVID of ours for `audience`, asked of the agent now and kept nowhere.

    For a thread without an event loop that needs a token now and then, and no bundles. `endpoint` and
    `spiffe_id` are those of `JwtSource` and `JwtSource.fetch`. Blocks up to `timeout` seconds.

    Raises `source.NoIdentity` as `JwtSource.fetch` does.
    """
    request = _Request((audience,), spiffe_id or "")
    return asyncio.run(_ask(parse_endpoint(endpoint), request, timeout, wait=True))


async def _ask(target: str, request: _Request, timeout: float, *, wait: bool) -> JwtSvid:
    """Ask the agent once. With `wait`, for one that is being replaced, too."""
    try:
        async with open_channel(target, **_RECONNECT) as channel:
            response = await stub_of(channel).FetchJWTSVID(
                workload_pb2.JWTSVIDRequest(audience=request.audience, spiffe_id=request.spiffe_id),
                metadata=METADATA,
                timeout=timeout,
                wait_for_ready=wait,
            )
        return _chosen(response, request, datetime.now(UTC))
    except grpc.RpcError as error:
        code, detail = status_of(error)
        denied = code is grpc.StatusCode.PERMISSION_DENIED
        reason = Reason.IDENTITY_DENIED if denied else Reason.NO_IDENTITY
        raise NoIdentity(reason, explain(target, code, detail)) from None
    except Refusal as refusal:
        raise NoIdentity(refusal.reason, f"the agent's answer is discarded: {refusal.detail}") from None


def _chosen(response: Any, request: _Request, now: datetime) -> JwtSvid:
    """The token that was asked for; by default the first one (Workload API section 6.2.1)."""
    message = next((m for m in response.svids if request.spiffe_id in ("", m.spiffe_id)), None)
    if message is None:
        raise InvalidSvid(Reason.INVALID_UPDATE, "it does not hold the JWT-SVID that was asked for")
    return issued_to_us(message.svid, message.spiffe_id, request.audience, now)


__all__ = ["JwtSource", "JwtSourceStatus", "NoBundles", "fetch_once"]
