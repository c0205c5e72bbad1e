"""Our own side of a connection, fed by a scriptable agent; and the report, clause by clause."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from tests.mtls.conftest import until
from ztmtls.audit import AuditLog
from ztmtls.reasons import Reason
from ztmtls.source import NoIdentity, X509Source
from ztmtls.svid import X509Svid, serial_text
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi
from ztmtls.testing.harness import dial, listen
from ztmtls.tls import reason_of

from .clauses import EXPECTED, Results, table
from .peers import HOST, Answer, call, plain_server

DOMAIN = "zt.example"
OURS = "spiffe://zt.example/ours"
PEER = "spiffe://zt.example/peer"

# --- the report ---------------------------------------------------------------------------------------

_RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance-report",
        type=Path,
        help="write the result of every clause here as JSON; a clause without a test counts as failed",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "conformance(id, role='workload'): the clause of a standard that the test is for"
    )
    config.stash[_RESULTS] = Results()
    config.pluginmanager.register(_Reporter(config))


def conformance(clause: str, role: str = "workload") -> pytest.MarkDecorator:
    """The marker, for use in parameters."""
    return pytest.mark.conformance(clause, role=role)


def _clauses_of(item: pytest.Item) -> list[tuple[str, str]]:
    return [(mark.args[0], mark.kwargs.get("role", "workload")) for mark in item.iter_markers("conformance")]


def pytest_itemcollected(item: pytest.Item) -> None:
    for clause in _clauses_of(item):
        if clause not in EXPECTED:
            raise pytest.UsageError(f"{item.nodeid}: no clause {clause} in tests/conformance/clauses.py")
        # Reports carry these from the processes of pytest-xdist, too.
        item.user_properties.append(("conformance", clause))


class _Reporter:
    """Hears all reports, also those of other processes, and says at the end what they mean."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._results = config.stash[_RESULTS]
        self._path: Path | None = config.getoption("--conformance-report", default=None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            for name, clause in report.user_properties:
                if name == "conformance":
                    clause_id, role = cast(tuple[str, str], clause)
                    self._results.add(clause_id, role, report.passed)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._path is None or hasattr(self._config, "workerinput"):
            return
        self._results.write(self._path)
        failed = any(row["result"] == "fail" for row in self._results.rows(complete=True))
        if failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        rows = self._results.rows(complete=self._path is not None)
        shown = [row for row in rows if self._path is not None or row["result"] == "fail"]
        if shown:
            terminalreporter.section("conformance")
            terminalreporter.write_line("\n".join(table(shown)))
        if rows:
            passed = sum(row["result"] == "pass" for row in rows)
            terminalreporter.write_line(f"conformance: {passed} of {len(rows)} pass")


# --- our side -----------------------------------------------------------------------------------------


@dataclass
class OurSide:
    """An agent, our source on it, and our server. `in_force` are the serials that ever were, in order."""

    workload: Workload
    source: X509Source
    port: int
    _audit: io.StringIO
    in_force: list[str] = field(default_factory=list)

    @property
    def ca(self) -> CertificateAuthority:
        return self.workload.ca

    async def verdict(self, role: str, svid: X509Svid) -> str | Reason:
        """What our server (or our client) makes of a peer that presents `svid`: its ID, or a reason."""
        if role == "server":
            before = len(self._denials())
            answer = await call(self.port, svid, self.ca.bundle)
            if answer.line:
                return answer.line
            await until(lambda: len(self._denials()) > before)
            return Reason(self._denials()[before]["reason"])
        async with plain_server(svid, self.ca.bundle) as port:
            try:
                return str(await dial(self.source, f"{HOST}:{port}"))
            except ssl.SSLError as error:
                return reason_of(error)

    async def served(self) -> str | None:
        """The serial of the SVID that our server presents to a new connection, None when it has none."""
        answer = await self.ask()
        return serial_text(answer.leaf) if answer.leaf else None

    async def ask(self) -> Answer:
        """Call our server as a rightful peer that trusts our authorities."""
        return await call(self.port, self.ca.issue(PEER), self.ca.bundle)

    async def served_until(self, wanted: str | None, timeout: float = 15.0) -> list[str | None]:
        """Connect again and again until `wanted` is presented; everything that was seen on the way."""
        seen: list[str | None] = []
        async with asyncio.timeout(timeout):
            while not seen or seen[-1] != wanted:
                seen.append(await self.served())
        return seen

    async def rotated(self, timeout: float = 15.0) -> str:
        """Rotate and wait until it is served: the proof that updates arrive."""
        await self.workload.wait_for_streams(1, timeout)
        serial = self.workload.rotate().serial
        await self.served_until(serial, timeout)
        return serial

    def _denials(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._audit.getvalue().splitlines()]
        return [line for line in lines if line["decision"] == "deny"]


@contextlib.asynccontextmanager
async def agent(ca: CertificateAuthority, identity: str = OURS, **more: Any) -> AsyncIterator[Workload]:
    """A workload on a socket of its own, whose identity this process may have."""
    async with WorkloadApi() as api:
        workload = await api.add_workload("ours", identity, ca=ca, **more)
        workload.allow(pid=os.getpid())
        yield workload


@contextlib.asynccontextmanager
async def our_side(workload: Workload) -> AsyncIterator[OurSide]:
    async with X509Source(workload.endpoint) as source:
        await source.ready(15)
        audit = io.StringIO()
        server = await listen(source, audit=AuditLog("ours", audit))
        ours = OurSide(workload, source, server.sockets[0].getsockname()[1], audit)

        def note() -> None:
            with contextlib.suppress(NoIdentity):
                ours.in_force.append(source.context.svid.serial)

        note()
        unsubscribe = source.subscribe(note)
        try:
            yield ours
        finally:
            unsubscribe()
            server.close()


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority(DOMAIN)


@pytest.fixture
async def workload(ca: CertificateAuthority) -> AsyncIterator[Workload]:
    async with agent(ca) as workload:
        yield workload


@pytest.fixture
async def ours(workload: Workload) -> AsyncIterator[OurSide]:
    async with our_side(workload) as ours:
        yield ours
