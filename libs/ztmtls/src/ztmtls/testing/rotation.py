"""Keeping SVIDs and authorities fresh, as a SPIFFE deployment does, for as long as the process lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

from ztmtls.ids import SpiffeId
from ztmtls.svid import X509Svid, serial_text

from .ca import Authority, AuthorityError, AuthorityState, CertificateAuthority, Duration

logger = logging.getLogger(__name__)

LONGEST_SLEEP = 1.0
"""Seconds after which wall time is looked at again, whatever was due when: it may have jumped."""

_PREPARE_AT = 1 / 2
_ACTIVATE_AT = 2 / 3
_SKEW = timedelta(seconds=5)
# It runs beside people's tests: the state of the `random` module is theirs (Hypothesis watches it).
_RANDOM = random.SystemRandom()


class RotationStep(StrEnum):
    """What `Rotation` did."""

    SVID_RENEWED = "svid_renewed"
    AUTHORITY_PREPARED = "authority_prepared"
    AUTHORITY_ACTIVATED = "authority_activated"
    AUTHORITY_RETIRED = "authority_retired"


@dataclass(frozen=True)
class RotationEvent:
    """One step, when it was taken, and the certificate it is about. `spiffe_id` is the trust domain's
    own for steps of authorities; `workload` is None for those."""

    step: RotationStep
    at: datetime
    spiffe_id: SpiffeId
    serial: str
    not_after: datetime
    workload: str | None = None


class RotatedWorkload(Protocol):
    """What `Rotation` needs of a workload: `workload_api.Workload` is one."""

    name: str

    @property
    def redacted(self) -> bool: ...

    @property
    def pinned(self) -> bool: ...

    @property
    def svid(self) -> X509Svid: ...

    @property
    def issued_at(self) -> datetime: ...

    def rotate(self, *, ttl: Duration | None = None) -> X509Svid:
        """Issue a new SVID with a life of `ttl`, and return it."""
        ...


class Rotation:
    """A task that renews the SVIDs of `workloads()` and the authorities of `ca`. It never dies.

    SVIDs live `svid_ttl` and are renewed at half of that, more or less a tenth, each at a moment of its
    own. Authorities live `ca_ttl`: at half of it the next one is published, at two thirds it signs, and
    the old one leaves the bundle only when the last SVID that it signed has expired. `ca_ttl` must be at
    least six times `svid_ttl`, so that no SVID is cut short by its authority.

    Times are wall time by the authority's clock, compared afresh at each step: after the machine slept
    or its clock was set, whatever became due happens within a second. Errors are logged and the step is
    tried again. Workloads that are redacted, or whose SVID a test has pinned, are left alone.
    """

    def __init__(
        self,
        ca: CertificateAuthority,
        workloads: Callable[[], Iterable[RotatedWorkload]],
        *,
        svid_ttl: Duration = 60.0,
        ca_ttl: Duration = 600.0,
        on_event: Callable[[RotationEvent], None] | None = None,
    ) -> None:
        self.ca = ca
        self.svid_ttl = svid_ttl if isinstance(svid_ttl, timedelta) else timedelta(seconds=svid_ttl)
        self.ca_ttl = ca_ttl if isinstance(ca_ttl, timedelta) else timedelta(seconds=ca_ttl)
        if self.svid_ttl <= timedelta(0) or self.ca_ttl < 6 * self.svid_ttl:
            raise ValueError("ca_ttl must be at least six times svid_ttl, and both more than nothing")
        self.svids_renewed = 0
        self.authorities_activated = 0
        self.last_error: str | None = None
        self._workloads = workloads
        self._on_event = on_event
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._jitter: dict[str, tuple[datetime, float]] = {}

    @property
    def running(self) -> bool:
        """True between `start` and `stop`."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Start the task in the running event loop."""
        if not self.running:
            self._task = asyncio.create_task(self._run(), name=f"rotation {self.ca.trust_domain}")

    async def stop(self) -> None:
        """Stop the task."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def wake(self) -> None:
        """Look at the clock now; for tests that move it."""
        self._wake.set()

    def step(self) -> float:
        """Do what is due now; returns the seconds until something is due again."""
        self.last_error = None
        now = self.ca.clock()
        due = [self._step_authorities(now)]
        names = set()
        for workload in list(self._workloads()):
            names.add(workload.name)
            if workload.redacted or workload.pinned:
                continue
            at = self._renew_at(workload)
            if now >= at or now < workload.issued_at - _SKEW:
                try:
                    self._renew(workload, now)
                except Exception as error:  # one workload's trouble is not the others'
                    self._failed(error)
                at = self._renew_at(workload)
            due.append(at)
        for gone in self._jitter.keys() - names:
            del self._jitter[gone]
        return max(0.0, (min(due) - now).total_seconds())

    # -- Inside -------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                pause = self.step()
            except Exception as error:
                self._failed(error)
                pause = 0.0
            if self.last_error is not None:
                pause = LONGEST_SLEEP
            self._wake.clear()
            # At least a little: a step that fails, or a clock that runs back, must not make this spin.
            # Not `wait_for`: before Python 3.12 it can lose a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(pause, 0.05), LONGEST_SLEEP)):
                    await self._wake.wait()

    def _failed(self, error: Exception) -> None:
        self.last_error = f"{type(error).__name__}: {error}"
        logger.error("rotation of %s failed, it is tried again", self.ca.trust_domain, exc_info=error)

    def _renew_at(self, workload: RotatedWorkload) -> datetime:
        issued = workload.issued_at
        known = self._jitter.get(workload.name)
        if known is None or known[0] != issued:
            known = (issued, _RANDOM.uniform(0.4, 0.6))
            self._jitter[workload.name] = known
        life = min(self.svid_ttl, workload.svid.not_after - issued)
        return issued + known[1] * life

    def _renew(self, workload: RotatedWorkload, now: datetime) -> None:
        svid = workload.rotate(ttl=self.svid_ttl)
        self.svids_renewed += 1
        self._report(RotationStep.SVID_RENEWED, now, svid.id, svid.serial, svid.not_after, workload.name)

    def _step_authorities(self, now: datetime) -> datetime:
        """Prepare, activate, retire as due; returns when to look again."""
        ca = self.ca
        active = ca.active
        began = active.created_at
        life = min(self.ca_ttl, active.not_after - began)
        unusable = now >= active.not_after - self.svid_ttl or now < active.not_before
        if ca.prepared is None and (unusable or now >= began + _PREPARE_AT * life):
            self._report_authority(RotationStep.AUTHORITY_PREPARED, now, ca.prepare(ttl=self.ca_ttl))
        if ca.prepared is not None and (unusable or now >= began + _ACTIVATE_AT * life):
            self._activate(now)
            active = ca.active
            began = active.created_at
            life = min(self.ca_ttl, active.not_after - began)
        due = [began + (_PREPARE_AT if ca.prepared is None else _ACTIVATE_AT) * life]
        for old in [a for a in ca.authorities if a.state is AuthorityState.OLD]:
            last = old.latest_expiry
            if last is None or now > last + _SKEW:
                self._report_authority(RotationStep.AUTHORITY_RETIRED, now, ca.retire(old))
            else:
                due.append(last + _SKEW)
        return min(due)

    def _activate(self, now: datetime) -> None:
        prepared = self.ca.prepared
        if prepared is not None and (now >= prepared.not_after or now < prepared.not_before):
            # The clock jumped while it waited: it can't sign what anyone would accept.
            self.ca.revoke(prepared)
            self._report_authority(RotationStep.AUTHORITY_PREPARED, now, self.ca.prepare(ttl=self.ca_ttl))
        with contextlib.suppress(AuthorityError):
            self._report_authority(RotationStep.AUTHORITY_ACTIVATED, now, self.ca.activate())
            self.authorities_activated += 1

    def _report_authority(self, step: RotationStep, now: datetime, authority: Authority) -> None:
        self._report(
            step,
            now,
            self.ca.trust_domain.id,
            serial_text(authority.certificate),
            authority.not_after,
            None,
        )

    def _report(
        self,
        step: RotationStep,
        now: datetime,
        spiffe_id: SpiffeId,
        serial: str,
        not_after: datetime,
        workload: str | None,
    ) -> None:
        logger.info("%s %s serial=%s not_after=%s", step, workload or spiffe_id, serial, not_after)
        if self._on_event is not None:
            try:
                self._on_event(RotationEvent(step, now, spiffe_id, serial, not_after, workload))
            except Exception:
                logger.exception("on_event failed")
