"""What happens while one watches: identities and logins that change, and what is served meanwhile.

One task looks at the chain every second, and only while somebody listens. All listeners share what it saw.
It sees one process of each service: where several share an address, each look may meet another one, and what
is told as a change is then only another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime

from .orders import Calls
from .pages import Pages
from .status import Denial, Overview, ServiceReport
from .streams import HEARTBEAT, event

logger = logging.getLogger(__name__)

#: Seconds between two looks, and between two signs of life on a stream when looking takes long.
EVERY = 1.0
SIGN_OF_LIFE = 10.0

#: How many changes and denials the page shows.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Change:
    """Something was replaced. `calls` are those made to orders since the same thing was replaced before, or
    since the watch began."""

    at: datetime
    service: str
    what: str
    before: str
    after: str
    calls: Calls


@dataclass(slots=True)
class Subject:
    """One thing that is replaced from time to time: what it is, what it was before, how often it changed."""

    now: str
    before: str = ""
    changes: int = 0
    since: Calls = field(default_factory=Calls)


#: What is watched of each service, and what a change of it is called.
CERTIFICATE, LOGIN, AUTHORITY = "certificate", "database login", "signing authority"


class Watch:
    """Everything that was seen since the watch began."""

    def __init__(self) -> None:
        self.overview: Overview | None = None
        self.began_at: datetime | None = None
        self.calls = Calls()
        self.changes: deque[Change] = deque(maxlen=SHOWN)
        self._base = Calls()
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._reports: dict[str, ServiceReport] = {}

    def see(self, overview: Overview, calls: Calls) -> None:
        """Take in how the chain is now, and how many calls there were since the process was started. A look
        that took longer than the one after it is no news."""
        if self.overview is not None and overview.at < self.overview.at:
            return
        if self.began_at is None:
            self.began_at, self._base = overview.at, calls
        self.overview, self.calls = overview, _minus(calls, self._base)
        for report in overview.services:
            if report.identity or report.decisions:
                self._reports[report.service] = report
            if report.identity and report.identity.serial:
                self._hold(overview.at, report.service, CERTIFICATE, report.identity.serial)
            if report.credentials and report.credentials.version:
                self._hold(overview.at, report.service, LOGIN, report.credentials.version)
        for service, authority in _authorities(overview).items():
            self._hold(overview.at, service, AUTHORITY, authority)

    def subject(self, service: str, what: str) -> Subject | None:
        """What is known of one thing of `service`."""
        return self._subjects.get((service, what))

    def report(self, service: str) -> ServiceReport | None:
        """The last that `service` was heard to say."""
        return self._reports.get(service)

    @property
    def denials(self) -> list[tuple[str, Denial]]:
        """The latest denials of all services, newest first, with who denied."""
        told = [
            (name, denial)
            for name, report in self._reports.items()
            if report.decisions
            for denial in report.decisions.latest
        ]
        return sorted(told, key=lambda each: each[1].time, reverse=True)[:SHOWN]

    def _hold(self, at: datetime, service: str, what: str, value: str) -> None:
        subject = self._subjects.get((service, what))
        if subject is None:
            self._subjects[service, what] = Subject(value, since=self.calls)
        elif value != subject.now:
            between = _minus(self.calls, subject.since)
            self.changes.appendleft(Change(at, service, what, subject.now, value, between))
            self._subjects[service, what] = Subject(value, subject.now, subject.changes + 1, self.calls)


class Watcher:
    """Keeps a `Watch` up to date while somebody listens."""

    def __init__(self, look: Callable[[], Awaitable[Overview]], calls: Callable[[], Calls]) -> None:
        self.watch = Watch()
        self._look, self._calls = look, calls
        self._listeners = 0
        self._task: asyncio.Task[None] | None = None
        self._version = 0
        self._news = asyncio.Event()  # a new one after each look

    async def look(self) -> Watch:
        """Look once."""
        self.watch.see(await self._look(), self._calls())
        self._version += 1
        self._news.set()
        self._news = asyncio.Event()
        return self.watch

    async def listen(self) -> AsyncGenerator[Watch | None, None]:
        """The watch, each time that it was looked; one that is slow misses some. None as a sign of life, when
        looking takes long. Without end."""
        self._listeners += 1
        if self._task is None:
            self._task = asyncio.create_task(self._keep_looking(), name="live")
        seen = -1
        try:
            while True:
                if self._version == seen or self.watch.overview is None:
                    try:
                        await asyncio.wait_for(self._news.wait(), SIGN_OF_LIFE)
                    except TimeoutError:
                        yield None
                        continue
                seen = self._version
                yield self.watch
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._task.cancel()
                self._task = None

    async def _keep_looking(self) -> None:
        while True:
            due = time.monotonic() + EVERY
            try:
                await self.look()
            except Exception:  # a fault of ours: those who listen get a sign of life, and the next look
                logger.exception("looking at the chain failed")
            await asyncio.sleep(due - time.monotonic())


def _minus(calls: Calls, base: Calls) -> Calls:
    return Calls(calls.answered - base.answered, calls.failed - base.failed)


def _authorities(overview: Overview) -> dict[str, str]:
    """Who vouches for each service, as the other end of a hop verified it."""
    found: dict[str, str] = {}
    for live in (overview.to_orders, overview.to_payments):
        if live.hop is None:
            continue
        caller, callee = live.hop.link.seen_by_caller, live.hop.link.seen_by_callee
        if caller:
            found[live.callee] = caller.peer.authority
        if callee:
            found.setdefault(live.caller, callee.peer.authority)
    return found


async def live_parts(watcher: Watcher, pages: Pages) -> AsyncGenerator[bytes, None]:
    """The parts of the page as events of HTML: all of them first, then each when it has changed."""
    sent: dict[str, str] = {}
    async with contextlib.aclosing(watcher.listen()) as watches:
        async for watch in watches:
            if watch is None:
                yield HEARTBEAT
                continue
            for name, key in _keys(watch).items():
                if sent.get(name) != key:
                    sent[name] = key
                    yield event(pages.fragment("live_parts.html", watch=watch, part=name), name)


def _keys(watch: Watch) -> dict[str, str]:
    """For each part, all that it is made of but the time."""
    assert watch.overview is not None
    reports = [watch.report(service.service) for service in watch.overview.services]
    services = [
        (
            report.identity and (report.identity.state, report.identity.not_after),
            report.credentials and (report.credentials.state, report.credentials.next_rotation_at),
            [watch.subject(report.service, what) for what in (CERTIFICATE, LOGIN, AUTHORITY)],
        )
        for report in reports
        if report
    ]
    heard = [service.identity is not None for service in watch.overview.services]
    decided = [
        (report.decisions.allowed, report.decisions.denied)
        for report in reports
        if report and report.decisions
    ]
    return {
        "services": repr((services, heard, watch.overview.fault)),
        "tally": repr((watch.calls, decided)),
        "changes": repr(list(watch.changes)[:1]),
        "denials": repr(watch.denials),
    }
