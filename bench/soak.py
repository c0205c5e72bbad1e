"""Soak one server with rotations and connections, and say whether memory and file descriptors stay flat.

    make soak                                          10,000 rotations, 100,000 connections
    make soak ARGS="--rotations 500 --connections 5000 --held 1000"

The server is a process of its own whose identity comes from a Workload API in this one. Each rotation sends
it a new SVID, every hundredth one a new authority as well; its callers rotate, too. At last `--held`
connections are open at the same time. Figures are taken between rounds, with no connection open. Exits with
1 when memory or descriptors grow, when a call fails, or when the server did not follow every rotation; with
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from ztmtls import Policy, X509Source
from ztmtls.audit import AuditLog
from ztmtls.authz import exact
from ztmtls.listen import bind
from ztmtls.live import LiveLimits
from ztmtls.probes import Probes
from ztmtls.server import serve
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi
from ztmtls.tls import client_context

from .growth import grown_and_allowed, resident

DOMAIN = "zt.example"
SERVER, CALLER = "spiffe://zt.example/server", "spiffe://zt.example/caller"
HOST = "127.0.0.1"
RULE = {"name": "soak", "callers": [CALLER], "methods": ["GET"], "paths": ["/soak"]}
REQUEST = b"GET /soak HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
KEPT = REQUEST.replace(b"connection: close\r\n", b"")
NEW_AUTHORITY_EVERY = 100
DEADLINE = 120.0
ALLOWED_DESCRIPTORS = 2


# --- the server ---------------------------------------------------------------------------------------


async def app(scope: dict[str, object], receive: Callable[..., object], send: Callable[..., object]) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[misc]
    await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[misc]


async def serve_here(endpoint: str, port: int, probe_port: int) -> None:
    async with X509Source(endpoint, expected_id=SERVER) as source:
        await source.ready(DEADLINE)
        async with Probes(HOST, probe_port, source=source) as probes:
            await serve(
                app,
                source=source,
                policy=Policy.parse({"version": 1, "rules": [RULE]}),
                host=HOST,
                port=port,
                audit=AuditLog("soak", sys.stderr),  # the parent sends it to nowhere
                probes=probes,
                live_limits=LiveLimits(idle=3600.0),
            )


# --- figures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The server between two rounds. `memory` in MiB."""

    connections: int
    rotations: int
    memory: float
    descriptors: int
    threads: int


@dataclass
class Soak:
    options: argparse.Namespace
    pid: int
    port: int
    probe_port: int
    tls: ssl.SSLContext
    workloads: tuple[Workload, ...]
    ca: CertificateAuthority
    samples: list[Sample] = field(default_factory=list)
    connections: int = 0
    rotations: int = 0
    faults: list[str] = field(default_factory=list)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    async def quiet(self) -> None:
        """Wait until the server has closed what was open: figures of a busy moment say nothing."""
        async with asyncio.timeout(DEADLINE):
            while await self.metric("ztmtls_live_connections"):
                await asyncio.sleep(0.1)
        usual = self.samples[0].descriptors if self.samples else 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):  # what stays open for longer is for the verdict
                while usual and self.descriptors() > usual:
                    await asyncio.sleep(0.1)

    async def sample(self) -> None:
        await self.quiet()
        threads = len(os.listdir(f"/proc/{self.pid}/task"))
        sample = Sample(self.connections, self.rotations, resident(self.pid), self.descriptors(), threads)
        self.samples.append(sample)
        print(
            f"{sample.connections:>11,} {sample.rotations:>10,} {sample.memory:>11.1f} "
            f"{sample.descriptors:>12} {sample.threads:>8}",
            flush=True,
        )

    async def metric(self, name: str) -> float:
        """The sum of a metric over its labels, from the server's own page of metrics."""
        reader, writer = await asyncio.open_connection(HOST, self.probe_port)
        try:
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            page = (await reader.read()).decode()
        finally:
            writer.close()
        lines = [line for line in page.splitlines() if line.startswith((name + " ", name + "{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    # --- what is done to it ---

    async def rotate(self) -> None:
        """A new SVID; and an authority now and then, with time in between for those who are connecting."""
        self.rotations += 1
        server, caller = self.workloads
        step = self.rotations % NEW_AUTHORITY_EVERY
        if step == 0:
            self.ca.prepare()
        elif step == 10 and self.ca.prepared is not None:
            self.ca.activate()
            caller.rotate()
        elif step == 30 and len(self.ca.authorities) > 1:
            self.ca.retire()
        server.rotate()
        if self.rotations % 10 == 5:
            caller.rotate()
        for workload in self.workloads:
            await workload.wait_for_delivery(DEADLINE)

    async def call(self) -> None:
        try:
            async with asyncio.timeout(DEADLINE):
                reader, writer = await asyncio.open_connection(HOST, self.port, ssl=self.tls)
                try:
                    writer.write(REQUEST)
                    answer = await reader.read()
                finally:
                    writer.transport.abort()
            if not answer.startswith(b"HTTP/1.1 200 "):
                self.faults.append(f"answered {answer[:200]!r}")
        except OSError as error:
            self.faults.append(f"{type(error).__name__}: {error}")
        self.connections += 1

    async def round(self, connections: int, rotations: int) -> None:
        """So many connections, so many at once, with the rotations spread over them."""
        left, done = iter(range(connections)), 0

        async def caller() -> None:
            nonlocal done
            for _ in left:
                await self.call()
                done += 1

        async def rotator() -> None:
            for number in range(rotations):
                while done * rotations < number * connections:
                    await asyncio.sleep(0.001)
                await self.rotate()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(rotator())
            for _ in range(self.options.concurrency):
                tasks.create_task(caller())

    async def hold(self, count: int) -> None:
        """So many connections open at the same time; each is used at the beginning and at the end."""
        began, before, gate = time.monotonic(), resident(self.pid), asyncio.Semaphore(64)

        async def one() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            async with gate, asyncio.timeout(DEADLINE):
                raw = await asyncio.open_connection(HOST, self.port, ssl=self.tls)
                await used(*raw)
                return raw

        async def used(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(KEPT)
            answer = await reader.readuntil(b"\r\n\r\nok")
            if not answer.startswith(b"HTTP/1.1 200 "):
                self.faults.append(f"answered {answer[:200]!r}")

        raws = await asyncio.gather(*(one() for _ in range(count)))
        opened, full = time.monotonic() - began, resident(self.pid)
        await self.rotate()
        for raw in raws:
            await used(*raw)
        together = round(await self.metric("ztmtls_live_connections"))
        for _, writer in raws:
            writer.transport.abort()
        await self.quiet()
        print(
            f"held {together:,} connections at once: {opened:.0f} s to open, {full - before:.0f} MiB "
            f"({(full - before) * 1024 / count:.0f} KiB each), each used twice, one rotation in between",
            flush=True,
        )

    # --- what it comes to ---

    def verdict(self, generation: float) -> list[str]:
        """What is wrong, if anything."""
        found = [f"{len(self.faults)} calls failed, the first: {self.faults[0]}"] if self.faults else []
        if generation < self.rotations:
            found.append(f"the server is at generation {generation:.0f} after {self.rotations} rotations")
        settled = self.samples[len(self.samples) // 4 :]
        if len(settled) < 3:
            return found
        grown, allowed = grown_and_allowed([each.memory for each in settled])
        span = max(1, settled[-1].connections - settled[0].connections)
        print(
            f"memory: {grown:+.1f} MiB over the last {span:,} connections "
            f"({grown * 1024 * 1000 / span:+.1f} KiB per 1,000; allowed {allowed:.1f} MiB)\n"
            f"descriptors: {settled[0].descriptors} then {settled[-1].descriptors}"
        )
        if grown > allowed:
            found.append("memory grows")
        if settled[-1].descriptors > settled[0].descriptors + ALLOWED_DESCRIPTORS:
            found.append("file descriptors grow")
        return found


@contextlib.asynccontextmanager
async def soaking(options: argparse.Namespace) -> AsyncIterator[Soak]:
    ca = CertificateAuthority(DOMAIN)
    sockets = [bind(HOST, 0, "PORT") for _ in range(2)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    async with WorkloadApi() as api:
        server = await api.add_workload("server", SERVER, ca=ca, svid_ttl=3600)
        caller = await api.add_workload("caller", CALLER, ca=ca, svid_ttl=3600)
        caller.allow(pid=os.getpid())
        command = [sys.executable, "-m", "bench.soak", "--serve", server.endpoint, *map(str, ports)]
        process = await asyncio.create_subprocess_exec(
            *command, start_new_session=True, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            server.allow(pid=process.pid)
            async with X509Source(caller.endpoint) as source:
                await source.ready(DEADLINE)
                tls = client_context(source, exact(SERVER))
                soak = Soak(options, process.pid, ports[0], ports[1], tls, (server, caller), ca)
                async with asyncio.timeout(DEADLINE):
                    while not await _serving(ports[0]):
                        if process.returncode is not None:
                            raise SystemExit(f"the server ended with {process.returncode}")
                        await asyncio.sleep(0.05)
                yield soak
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 15)
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _serving(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True


async def soak_it(options: argparse.Namespace) -> int:
    began = time.monotonic()
    async with soaking(options) as soak:
        print("connections  rotations  memory MiB  descriptors  threads", flush=True)
        await soak.sample()
        for number in range(options.rounds):
            shares = [
                total * (number + 1) // options.rounds - total * number // options.rounds
                for total in (options.connections, options.rotations)
            ]
            await soak.round(*shares)
            await soak.sample()
        if options.held:  # last: what it leaves to the allocator would hide a leak
            await soak.hold(options.held)
        wrong = soak.verdict(await soak.metric("ztmtls_source_generation"))
    print(f"{soak.connections:,} connections, {soak.rotations:,} rotations, {time.monotonic() - began:.0f} s")
    print("\n".join(f"NOT FLAT: {each}" for each in wrong) or "flat")
    return 1 if wrong else 0


def descriptors_for(held: int) -> int:
    """Raise our own limit, and so the server's; returns how many connections can be held under it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return held if hard == resource.RLIM_INFINITY else min(held, hard - 256)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rotations", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=100_000)
    parser.add_argument("--held", type=int, default=10_000, help="connections open at once; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=20, help="figures are taken after each")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.rounds, options.concurrency) < 1 or min(options.rotations, options.connections) < 0:
        parser.error("rounds and concurrency must be 1 or more, the others 0 or more")
    try:
        if options.serve:
            endpoint, port, probe_port = options.serve
            asyncio.run(serve_here(endpoint, int(port), int(probe_port)))
            return 0
        possible = descriptors_for(options.held)
        if possible < options.held:
            print(
                f"holding {possible:,} connections instead of {options.held:,}: no more descriptors allowed"
            )
            options.held = possible
        return asyncio.run(soak_it(options))
    except KeyboardInterrupt:
        print("stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
