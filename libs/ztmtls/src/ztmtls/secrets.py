"""Database credentials from AWS Secrets Manager, with the one role of this workload and with nothing else.

`identity_from_env` finds that role: by web identity (IRSA, or a JWT-SVID) or by EKS Pod Identity.
`RotatingSecret` keeps the current version of one secret, follows its rotation, and lives through outages of
AWS on the last good value.

    secret = RotatingSecret("zt-demo/orders/db", identity_from_env())

No other credentials are ever used: no static keys, no profile, no shared files, no metadata of an instance or
of a container that is not EKS's. A default credential chain would fall through to the node's role and act as
somebody broader without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from .audit import AuditLog
from .aws_identity import (
    CredentialsRefused,
    Identity,
    JwtSvidIdentity,
    PodIdentity,
    SecretError,
    WebIdentity,
    identity_from_env,
)
from .reasons import Reason
from .secret_reader import RotationSchedule, SecretReader
from .secret_value import SecretValue

__all__ = [
    "CredentialsRefused",
    "JwtSvidIdentity",
    "PodIdentity",
    "RotatingSecret",
    "SecretError",
    "SecretState",
    "SecretValue",
    "WebIdentity",
    "identity_from_env",
]

#: A forced refresh asks AWS again, but starts not sooner than this after the last one (seconds).
MIN_INTERVAL = 1.0

#: After a failure the next try waits this long, doubled up to the last, with jitter (seconds).
FIRST_RETRY, LAST_RETRY = 1.0, 8.0

#: Secrets Manager is asked when the next rotation is with each new version, when what it said has passed, and
#: after this long (seconds).
SCHEDULE_AGE = 300.0

_log = logging.getLogger(__name__)


class SecretState(StrEnum):
    """What a `RotatingSecret` has."""

    STARTING = "starting"
    """Nothing yet, and nothing has failed."""
    SERVING = "serving"
    """A value, and the last refresh worked."""
    DEGRADED = "degraded"
    """A value, but the last refresh failed."""
    FAILED = "failed"
    """No value, since the refresh failed."""
    CLOSED = "closed"


class RotatingSecret:
    """The current version (AWSCURRENT) of one secret, kept fresh.

    `get` answers from memory while the value is younger than `max_age`. Calls to AWS run on one thread of its
    own, one at a time, however many tasks and threads ask: the event loop never waits, and nothing stampedes.
    When AWS fails, the last good value goes on being used, with retries that back off.

    Used as it is, the value is refreshed by the first `get` after `max_age`. With ``async with secret:`` (or
    `start`) it is refreshed in the background, so that no request waits for it.

    Args:
        secret_id: name or ARN of the secret.
        identity: the role to read it with, of `identity_from_env`.
        endpoint_url: of Secrets Manager, for a stand-in or a private endpoint.
        max_age: seconds after which the value is asked for again (with up to 20 % jitter, earlier).
        required: members that the secret must have, as texts that are not empty.
        audit: gets a line (event ``credentials``) for the first value, each new version, and each refusal.
    """

    def __init__(
        self,
        secret_id: str,
        identity: Identity,
        *,
        endpoint_url: str | None = None,
        max_age: float = 60.0,
        required: tuple[str, ...] = ("username", "password"),
        audit: AuditLog | None = None,
    ) -> None:
        self.secret_id = secret_id
        self.identity = identity
        self.reads: Counter[str] = Counter()
        """Reads so far, by outcome: ``ok``, or a reason code."""
        self._max_age = max_age
        self._audit = audit
        self._reader = SecretReader(secret_id, identity, endpoint_url, required)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="secret")
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        # Below: guarded by the lock.
        self._lock = threading.Lock()
        self._value: SecretValue | None = None
        self._fetched_at = 0.0
        self._stale_at = 0.0
        self._schedule: RotationSchedule | None = None
        self._schedule_due = 0.0
        self._error: SecretError | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._last_start = float("-inf")
        self._running: Future[SecretValue] | None = None
        self._waiting: Future[SecretValue] | None = None
        self._closing = threading.Event()

    # -- reading

    @property
    def current(self) -> SecretValue | None:
        """The last good value, however old. Never asks AWS."""
        return self._value

    async def get(self) -> SecretValue:
        """The secret's value: from memory while it is fresh, or while AWS cannot be had.

        Raises:
            SecretError: there is no value at all, and AWS does not give one.
        """
        usable = self._usable()
        if usable is not None:
            return usable
        return self._or_last_good(await self._settle(self._join(force=False)))

    async def refresh(self, force: bool = True) -> SecretValue:
        """Ask AWS now. To be called when the database refuses the password (SQLSTATE 28P01).

        Callers at the same time share one call that starts after all of them have asked; calls start at least
        `MIN_INTERVAL` apart. With `force` False, a fresh value is returned as it is.

        Raises:
            SecretError: AWS does not give it. `current` still has the last good value.
        """
        if not force:
            with self._lock:
                if self._value is not None and time.monotonic() < self._stale_at:
                    return self._value
        return _result(await self._settle(self._join(force=force)))

    def sync_get(self, timeout: float = 60.0) -> SecretValue:
        """As `get`, for code that has no event loop (migrations). Blocks up to `timeout` seconds.

        Raises:
            SecretError: as `get`, and when the time is over (``secret_unavailable``).
        """
        usable = self._usable()
        if usable is not None:
            return usable
        future = self._join(force=False)
        try:
            future.exception(timeout)
        except TimeoutError:
            raise SecretError(
                Reason.SECRET_UNAVAILABLE, f"no answer from AWS within {timeout:.0f} s"
            ) from None
        return self._or_last_good(future)

    def status(self) -> dict[str, Any]:
        """What is known of the secret, for status pages. Holds no secret.

        ``state``, ``secret_id``, ``version`` (its ID), ``created_at`` (of this version), ``fetched_at`` (when
        it was read last), ``age_seconds`` (since then), ``next_refresh_at`` (when it is read again, unless
        somebody asks sooner), ``rotation_enabled``, ``last_rotated_at``, ``next_rotation_at`` (on this day or
        earlier), ``last_error`` (reason code) with ``detail``, ``role_arn``, and ``source``: what proves that
        we may have that role. Times are RFC 3339. None: not known; for the rotation, since the role may not
        call DescribeSecret, or nobody rotates it; for the role, since EKS Pod Identity does not say.
        """
        with self._lock:
            value, error, schedule = self._value, self._error, self._schedule
            due = self._retry_at if error else self._stale_at
            now = time.monotonic()
            age = now - self._fetched_at if value else None
        planned = not self._closing.is_set() and (value is not None or error is not None)
        return {
            "state": str(self._state(value, error)),
            "secret_id": self.secret_id,
            "version": value.version_id if value else None,
            "created_at": _time(value.created_at) if value else None,
            "fetched_at": _time_from_now(-age) if age is not None else None,
            "age_seconds": round(age, 3) if age is not None else None,
            "next_refresh_at": _time_from_now(due - now) if planned else None,
            "rotation_enabled": schedule.enabled if schedule else None,
            "last_rotated_at": _time(schedule.last_rotated_at) if schedule else None,
            "next_rotation_at": _time(schedule.next_rotation_at) if schedule else None,
            "last_error": str(error.reason) if error else None,
            "detail": error.detail if error else None,
            "role_arn": self.identity.role_arn,
            "source": self.identity.kind,
        }

    async def check(self) -> str | None:
        """A readiness check: None while there is a value to work with, else why there is none."""
        if self._value is not None:
            return None
        return str(self._error) if self._error else "no secret has been fetched yet"

    def _state(self, value: SecretValue | None, error: SecretError | None) -> SecretState:
        if self._closing.is_set():
            return SecretState.CLOSED
        if value is None:
            return SecretState.FAILED if error else SecretState.STARTING
        return SecretState.DEGRADED if error else SecretState.SERVING

    # -- running in the background

    async def start(self) -> None:
        """Keep the value fresh from now on, in a task of the running event loop. Returns at once."""
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.create_task(self._keep_fresh(), name=f"secret-{self.secret_id}")

    async def aclose(self) -> None:
        """Stop, and forget the value. Waits for no call to AWS."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        self.close()

    def close(self) -> None:
        """As `aclose`, when it was never started."""
        self._closing.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._value = None
            for future in (self._waiting, self._running):
                if future is not None and not future.done():
                    future.set_exception(_closed())
            self._waiting = self._running = None

    async def __aenter__(self) -> RotatingSecret:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _keep_fresh(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            with self._lock:
                due = self._retry_at if self._error else self._stale_at
            delay = due - time.monotonic()
            if delay > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
                continue  # a forced refresh may have moved it
            with contextlib.suppress(SecretError):
                await self._settle(self._join(force=False))

    # -- one call at a time

    def _usable(self) -> SecretValue | None:
        """The value to answer with at once, or None when AWS has to be asked first.

        Raises:
            SecretError: there is none, and the last try failed a moment ago: callers in a loop must not
            hammer AWS.
        """
        now = time.monotonic()
        with self._lock:
            if self._closing.is_set():
                raise _closed()
            backing_off = self._error is not None and now < self._retry_at
            if self._value is not None:
                in_background = self._task is not None and not self._task.done()
                if now < self._stale_at or backing_off or in_background:
                    return self._value
            elif backing_off and self._error is not None:
                raise _without_frames(self._error)
        return None

    def _join(self, *, force: bool) -> Future[SecretValue]:
        """The call to wait for: the one that runs, or the next, as `force` needs one that starts from now."""
        with self._lock:
            if self._closing.is_set():
                raise _closed()
            if self._waiting is not None:
                return self._waiting
            if self._running is not None and not force:
                return self._running
            future: Future[SecretValue] = Future()
            self._waiting = future
            self._executor.submit(self._work, future)
            return future

    async def _settle(self, future: Future[SecretValue]) -> Future[SecretValue]:
        """Wait until it is done. A waiter that is cancelled does not cancel it for the others."""
        await asyncio.wait({asyncio.wrap_future(_shield(future))})
        return future

    def _or_last_good(self, future: Future[SecretValue]) -> SecretValue:
        last = self._value
        if last is not None and future.exception(0) is not None:
            return last
        return _result(future)

    def _work(self, future: Future[SecretValue]) -> None:
        """On the thread of its own."""
        pause = self._last_start + MIN_INTERVAL - time.monotonic()
        if self._closing.wait(max(0.0, pause)):
            return  # `close` has answered those who wait
        with self._lock:
            if self._waiting is future:
                self._waiting, self._running = None, future
            self._last_start = time.monotonic()
        outcome = self._read()
        try:
            if isinstance(outcome, SecretValue):
                self._succeeded(outcome)
            else:
                self._failed(outcome)
        finally:  # whatever becomes of the audit line: somebody waits
            with self._lock:
                self._running = None
                if not future.done():
                    if isinstance(outcome, SecretValue):
                        future.set_result(outcome)
                    else:
                        future.set_exception(outcome)
        if isinstance(outcome, SecretValue):
            self._read_schedule()

    def _read(self) -> SecretValue | SecretError:
        try:
            return self._reader.read()
        except SecretError as refused:
            return _without_frames(refused)
        except Exception as unexpected:  # the text of a stranger's exception could hold anything
            _log.error("unexpected %s while reading secret %s", type(unexpected).__name__, self.secret_id)
            return SecretError(Reason.SECRET_UNAVAILABLE, f"unexpected {type(unexpected).__name__}")

    def _succeeded(self, value: SecretValue) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            before, had_error = self._value, self._error
            self._value, self._error, self._failures = value, None, 0
            self._fetched_at = time.monotonic()
            self._stale_at = self._fetched_at + self._max_age * _jitter(0.8, 1.0)
            self.reads["ok"] += 1
            changed = before is None or before.version_id != value.version_id
            if changed:
                self._schedule_due = self._fetched_at
        if had_error is not None:
            _log.info("secret %s can be read again", self.secret_id)
        if changed:
            self._record(
                "allow",
                previous_version=before.version_id if before else None,
                version=value.version_id,
            )

    def _failed(self, error: SecretError) -> None:
        with self._lock:
            before = self._error
            self._error = error
            delay = min(LAST_RETRY, FIRST_RETRY * 2.0**self._failures)
            self._failures = min(self._failures + 1, 16)
            self._retry_at = time.monotonic() + delay * _jitter(0.75, 1.25)
            self.reads[str(error.reason)] += 1
            closing = self._closing.is_set()
        if self._loop is not None:  # the background task may sleep for longer than that
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake.set)
        if not closing and (before is None or before.reason != error.reason):
            _log.warning("secret %s: %s", self.secret_id, error)
            self._record("deny", reason=error.reason, detail=error.detail)

    def _read_schedule(self) -> None:
        """For the status page alone: nobody waits for it, and no failure of it is one of the secret."""
        with self._lock:
            now = time.monotonic()
            due = now >= self._schedule_due or (self._schedule is not None and self._schedule.is_over())
            if not due or self._waiting is not None or self._closing.is_set():
                return
            self._schedule_due = now + SCHEDULE_AGE * _jitter(0.8, 1.0)
        try:
            schedule: RotationSchedule | None = self._reader.schedule()
        except SecretError as refused:
            _log.info("it is not known when secret %s is rotated: %s", self.secret_id, refused)
            if refused.reason is Reason.SECRET_UNAVAILABLE:
                return  # what was known before still is
            schedule = None
        with self._lock:
            self._schedule = schedule

    def _record(self, decision: Any, **more: Any) -> None:
        if self._audit is not None:
            self._audit.record(
                "credentials",
                decision,
                secret_id=self.secret_id,
                role_arn=self.identity.role_arn,
                source=self.identity.kind,
                **more,
            )


def _result(future: Future[SecretValue]) -> SecretValue:
    error = future.exception(0)
    if isinstance(error, SecretError):
        raise _without_frames(error)
    return future.result()


def _without_frames(error: SecretError) -> SecretError:
    """The same refusal anew. The frames that it came through hold tokens and answers of AWS, which reporters
    of errors like to show; and several who wait must not raise one exception."""
    return type(error)(error.reason, error.detail)


def _time(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds") if moment else None


def _time_from_now(seconds: float) -> str | None:
    return _time(datetime.now(UTC) + timedelta(seconds=seconds))


def _shield(future: Future[SecretValue]) -> Future[None]:
    """A future that is done when the other one is, and whose cancellation the other one does not feel."""
    done: Future[None] = Future()

    def tell(_: object) -> None:
        if done.set_running_or_notify_cancel():
            done.set_result(None)

    future.add_done_callback(tell)
    return done


def _closed() -> SecretError:
    return SecretError(Reason.SECRET_UNAVAILABLE, "the secret was closed")


def _jitter(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 - spreads load, keeps no secret
