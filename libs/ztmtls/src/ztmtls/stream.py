"""A stream of the Workload API, supervised: opened again for as long as the process lives.

What every source shares (Workload API section 4, Workload Endpoint section 6): the channel, back-off, what
an agent's status means, a denial that must hold, one log line per trouble, and the life of the task, with
an event loop or on a thread of its own. What arrives, and what it is worth, is the source's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from spiffe._proto import workload_pb2_grpc

from .reasons import Refusal, printable

logger = logging.getLogger(__name__)

METADATA = (("workload.spiffe.io", "true"),)
"""The security header, on every call (Workload Endpoint section 3)."""

CHANNEL_OPTIONS: Mapping[str, int] = {
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,
    "grpc.max_receive_message_length": 16 << 20,
}
"""Of each channel to an agent: its own connection, never through a proxy, messages up to 16 MiB.

A connection of a former attempt is not taken up again: an agent attests the caller per connection.
"""

# Retries: the first comes at once, then ever later, with jitter so that many workloads on one node do not
# ask in step. Nothing here grows without bound.
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0
# InvalidArgument and Unimplemented mean that asking again won't help (Workload Endpoint section 6): ask
# seldom, but do ask, since an agent is replaced without telling us.
_FUTILE_DELAY = 10.0
_FUTILE = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
# A denial must hold this long before what we have is dropped: entries flap for a moment when a server
# restarts. Dropping must happen (Workload API sections 5.2.1 and 6.2.2), and well within 5 s.
DENIAL_GRACE = 2.0
_DENIAL_GRACE_STEP = 0.5
_DENIAL_MEMORY = 3 * _LONGEST_DELAY
# How often a quiet stream is looked at, in seconds: the wall clock may jump when a machine wakes up.
_LOOK = 1.0


def open_channel(target: str, **more: int) -> grpc.aio.Channel:
    """A channel for one attempt; `more` are gRPC channel options.

    gRPC's own reconnect backoff grows to minutes, and the socket file may be another one by now.
    """
    return grpc.aio.insecure_channel(target, options=list({**CHANNEL_OPTIONS, **more}.items()))


def stub_of(channel: grpc.aio.Channel | grpc.Channel) -> Any:
    """The generated stub on `channel`."""
    return workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call]


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """The status code of a failed call, and its text fit for a log."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    detail = printable(str(error.details() or "")) if hasattr(error, "details") else ""
    return code, detail


def explain(target: str, code: grpc.StatusCode, detail: str) -> str:
    """What a failed call to the Workload API at `target` means, for a person."""
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return f"no entry for this workload: the agent answered PERMISSION_DENIED: {detail}"
    late = code is grpc.StatusCode.DEADLINE_EXCEEDED
    if late or (code is grpc.StatusCode.UNAVAILABLE and "connect" in detail):
        scheme, _, path = target.partition(":")
        if scheme == "unix" and not os.path.exists(path):
            return "the Workload API can't be reached: there is no socket"
        if late:
            return "the agent did not answer in time"
        return "the Workload API can't be reached: nobody answers there"
    return f"the agent answered {code.name}: {detail}" if detail else f"the agent answered {code.name}"


class Withdrawn(Refusal):
    """A message says, by leaving it out, that what we have may not be used any more."""


class Announcer:
    """What a source knows about itself, and who wants to know of changes."""

    _problem = "nothing has arrived yet"
    _last_update: datetime | None = None
    _failures = 0
    _connected = False
    _denied = False
    _closed = False

    def __init__(self) -> None:
        self._subscribers: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after every change of what is offered, or to whom; returns the way out.

        It runs on the source's own event loop or thread and must return at once.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    def _mark_well(self) -> None:
        self._denied = False
        self._connected = True
        self._problem = ""

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for callback in tuple(self._subscribers):
            try:
                callback()
            except (Exception, asyncio.CancelledError):  # a subscriber's own trouble must not be ours
                logger.exception("a subscriber of a Workload API source failed")


class SupervisedStream(Announcer, ABC):
    """Base of a source that lives on one stream of the Workload API; only closing it ends it.

    Use ``async with`` in a program with an event loop, and plain ``with`` in one without: then the stream
    runs on a thread of its own. Either way entering returns at once.
    """

    _name: str

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._attempt = 0
        self._silences = 0
        self._denied_since: float | None = None
        self._denied_last = 0.0
        self._last_logged = ""
        self._repeats = 0

    # --- what a source says ---

    @abstractmethod
    def _call(self, stub: Any) -> Any:
        """Open the stream: a call of `stub` with `METADATA`."""

    @abstractmethod
    def _receive(self, response: Any) -> None:
        """Take one message as a whole. Raises `Refusal` when it is to be discarded, `Withdrawn` when it takes
        away what we have: that counts as a denial, and must hold as one."""

    @abstractmethod
    def _patience(self, answered: bool) -> float:
        """Seconds that a silent stream is believed; `answered` when this one has brought something."""

    @abstractmethod
    def _usable(self) -> bool:
        """True while there is something to offer."""

    @abstractmethod
    def _has_something_to_lose(self) -> bool:
        """True when a denial would take something away; else it counts at once."""

    def _silence(self, answered: bool) -> str:
        """What it means that patience ran out; nothing at all when the stream is only to be opened anew."""
        return "the agent is silent although an update is due"

    # --- life ---

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._supervise(), name=self._name)
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
            await self.__aenter__()
            started.set()
            assert self._task is not None
            await asyncio.gather(self._task, return_exceptions=True)

        self._thread = threading.Thread(target=lambda: asyncio.run(main()), name=self._name, daemon=True)
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

    async def _until_usable(self, timeout: float | None) -> None:
        """Wait until there is something to offer, or the source is closed. Raises `TimeoutError`."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        unsubscribe = self.subscribe(wake)
        try:
            async with asyncio.timeout(timeout):
                while not self._usable() and not self._closed:
                    await changed.wait()
                    changed.clear()
        finally:
            unsubscribe()

    # --- the stream ---

    async def _supervise(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while True:
            delay, opened = 0.0, time.monotonic()
            try:
                problem = await self._stream_once()
                if problem:
                    self._fault(problem)
                    delay = self._backoff(opened)
            except grpc.RpcError as error:
                delay = self._on_status(error, opened)
            except Withdrawn as refusal:
                self._fault(refusal.detail)
                delay = self._on_denial(opened)
            except (Exception, asyncio.CancelledError) as error:
                if task.cancelling():
                    raise
                # Nothing that arrives may end this loop (gRPC cancels calls of its own accord, too). The
                # type is enough to find the cause; the text of an unknown error might hold what must not
                # be logged.
                self._fault(f"unexpected {type(error).__name__} while reading the Workload API")
                delay = self._backoff(opened)
            if delay:
                self._connected = False
                await asyncio.sleep(delay)

    async def _stream_once(self) -> str:
        """Read one stream to its end; returns what went wrong, or nothing when it was ended by us."""
        async with open_channel(self.target) as channel:
            call = self._call(stub_of(channel))
            answered = False
            while True:
                response = await self._next_message(call, answered)
                if response is None:
                    self._silences += 1
                    return self._silence(answered)
                if response is grpc.aio.EOF:
                    if await call.code() is not grpc.StatusCode.OK:
                        await call.read()  # raises the status
                    return "the agent ended the stream"
                answered, self._silences = True, 0
                # Workload API section 4.5: report, discard the message, go on with the last good one.
                try:
                    self._receive(response)
                except Withdrawn:
                    raise
                except Refusal as refusal:
                    self._fault(f"update discarded: {refusal.detail}")
                except Exception as error:
                    self._fault(f"update discarded: reading it ended in {type(error).__name__}")

    async def _next_message(self, call: Any, answered: bool) -> Any:
        """What the stream brings next; None when it is quiet for longer than it is believed."""
        patience = self._patience(answered)
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

    def _recovered(self) -> None:
        """A good message has arrived."""
        self._mark_well()
        self._denied_since = None
        if self._last_logged or self._repeats:
            logger.info("the Workload API answers again (after %d more failures)", self._repeats)
            self._last_logged, self._repeats = "", 0

    # --- failures ---

    def _on_status(self, error: grpc.RpcError, opened: float) -> float:
        code, detail = status_of(error)
        self._fault(explain(self.target, code, detail))
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return self._on_denial(opened)
        return _FUTILE_DELAY * random.uniform(0.9, 1.1) if code in _FUTILE else self._backoff(opened)  # noqa: S311

    def _on_denial(self, opened: float) -> float:
        now = time.monotonic()
        # Other failures in between give nothing back; a long time without a denial does.
        if self._denied_since is None or now - self._denied_last > _DENIAL_MEMORY:
            self._denied_since = now
        self._denied_last = now
        held = now - self._denied_since
        # Without anything to lose there is nothing to wait for.
        if not self._denied and (not self._has_something_to_lose() or held >= DENIAL_GRACE):
            self._denied = True
            self._notify()
        if not self._denied:
            # Asked often until it is decided: two denials alone, far apart, would say little.
            return min(self._backoff(opened), max(min(DENIAL_GRACE - held, _DENIAL_GRACE_STEP), 0.05))
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


__all__ = [
    "CHANNEL_OPTIONS",
    "DENIAL_GRACE",
    "METADATA",
    "SupervisedStream",
    "explain",
    "open_channel",
    "status_of",
    "stub_of",
]
