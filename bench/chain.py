"""The order chain: three services, each kind of talking to each other beside the others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ztdev.ports import choose_free_ports
from ztmtls.authz import exact
from ztmtls.source import X509Source
from ztmtls.testing import CertificateAuthority, Workload, WorkloadApi
from ztmtls.tls import client_context

from . import by_hand
from .hop import DOMAIN, HOPS, NEXT, identity
from .load import Load, load

Say = Callable[[str], None]

OURS = "ztmtls"
KINDS = ("plain, httpx", "plain, aiohttp", "ssl, httpx", "ssl, aiohttp", OURS)
BODY = b'{"item": "book", "amount": 2450}'
CONNECTIONS = 8
IDLE = 1000
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Chain:
    """Three processes of one kind; `seconds` is what each took to accept connections."""

    ports: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    def cpu(self) -> float:
        """CPU seconds of all three so far."""
        found = 0.0
        for process in self.processes.values():
            after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            found += (int(after_name[11]) + int(after_name[12])) / _TICKS
        return found

    def memory(self, name: str) -> float:
        """Megabytes of a service, its own and shared (resident)."""
        return int(Path(f"/proc/{self.processes[name].pid}/statm").read_text().split()[1]) * _PAGE / 1e6

    async def orders(self, seconds: float, rate: float = 0.0) -> Load:
        """Orders for so long, with `rate` so many a second, else as many as go through."""
        return await load(self.ports["frontend"], "/orders", BODY, CONNECTIONS, seconds, rate)

    async def stop(self) -> None:
        """End all three."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            await process.wait()


async def _start(chain: Chain, kind: str, workloads: dict[str, Workload], tls: Path) -> None:
    for name in reversed(HOPS):  # nobody is asked before he is there
        environment = {
            "BENCH_KIND": kind,
            "BENCH_NAME": name,
            "BENCH_PORT": str(chain.ports[name]),
            "BENCH_TLS": str(tls),
            "SPIFFE_ENDPOINT_SOCKET": workloads[name].endpoint,
        }
        if name in NEXT:
            environment["BENCH_NEXT"] = str(chain.ports[NEXT[name]])
        began = time.perf_counter()
        command = (sys.executable, "-m", "bench.hop")
        process = await asyncio.create_subprocess_exec(*command, env=os.environ | environment)
        chain.processes[name] = process
        workloads[name].allow(pid=process.pid)
        await _accepts(chain.ports[name], process)
        chain.seconds[name] = time.perf_counter() - began


async def _accepts(port: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            except OSError:
                if process.returncode is not None:
                    raise RuntimeError("a service of the chain ended: its last lines are above") from None
                await asyncio.sleep(0.01)


@dataclass
class Chains:
    """One of each kind, running, and the contexts by which its last service is called, by kind."""

    of: dict[str, Chain]
    contexts: dict[str, ssl.SSLContext | None]


@contextlib.asynccontextmanager
async def chains() -> AsyncIterator[Chains]:
    """Start them; stop them at the end."""
    ca = CertificateAuthority(DOMAIN, ttl=86400)
    async with contextlib.AsyncExitStack() as stack:
        tls = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        by_hand.write(tls, ca, {name: identity(name) for name in HOPS})
        api = await stack.enter_async_context(WorkloadApi())
        workloads = {}
        for name in HOPS:
            workloads[name] = await api.add_workload(name, identity(name), ca=ca, svid_ttl=3600.0)
        ports = iter(choose_free_ports(len(KINDS) * len(HOPS)))
        made = {kind: Chain({name: next(ports) for name in HOPS}) for kind in KINDS}
        for kind, chain in made.items():
            stack.push_async_callback(chain.stop)
            await _start(chain, kind, workloads, tls)
        workloads["orders"].allow(pid=os.getpid())
        source = await stack.enter_async_context(X509Source(workloads["orders"].endpoint))
        await source.ready(30)
        hand_written = by_hand.context(tls, "orders", ssl.Purpose.SERVER_AUTH)
        contexts = {kind: hand_written if kind.startswith("ssl") else None for kind in KINDS}
        yield Chains(made, {**contexts, OURS: client_context(source, exact(identity("payments")))})


async def measured(say: Say, turns: int, seconds: float) -> dict[str, Any]:
    """Orders per second with all that the machine has, then their times at half of what the slowest kind can;
    CPU time of the three services for an order, their memory, and how long each takes to accept."""
    say("chain: starting")
    async with chains() as started:
        made = started.of
        for chain in made.values():
            await chain.orders(min(1.0, seconds))  # connections are made, and caches filled
        full = await _turns(made, say, turns, seconds, 0.0)
        rate = min(median(each.rate for each, _ in found) for found in full.values()) / 2
        steady = await _turns(made, say, turns, seconds, rate)
        memory = {kind: round(median(chain.memory(name) for name in HOPS), 1) for kind, chain in made.items()}
        idle = {kind: await _idle(made[kind], started.contexts[kind], say) for kind in KINDS}
        ready = {kind: round(median(chain.seconds.values()), 2) for kind, chain in made.items()}
    result: dict[str, Any] = {
        "orders_per_second": {
            kind: _spread([each.rate for each, _ in found]) for kind, found in full.items()
        },
        "cpu_ms_per_order": {
            kind: round(median(cpu / len(each.times) for each, cpu in found) * 1e3, 2)
            for kind, found in full.items()
        },
        "at_orders_per_second": round(rate, 1),
        "ms": {kind: _latency(found) for kind, found in steady.items()},
        "megabytes_of_a_service": memory,
        "kilobytes_of_an_idle_connection": idle,
        "seconds_until_it_accepts": ready,
        "load_generator_cpu": round(max(each.cpu / each.seconds for f in full.values() for each, _ in f), 2),
    }
    return result | {"ratio": _ratios(result)}


async def _turns(
    made: dict[str, Chain], say: Say, turns: int, seconds: float, rate: float
) -> dict[str, list[tuple[Load, float]]]:
    found: dict[str, list[tuple[Load, float]]] = {kind: [] for kind in made}
    for turn in range(turns):
        say(f"chain, {'fixed' if rate else 'full'} load: turn {turn + 1} of {turns}")
        for kind in random.sample(tuple(made), len(made)):
            before = made[kind].cpu()
            seen = await made[kind].orders(seconds, rate)
            found[kind].append((seen, made[kind].cpu() - before))
    return found


async def _idle(chain: Chain, context: ssl.SSLContext | None, say: Say) -> float:
    """Kilobytes by which the last service grows for each connection on which nothing happens."""
    say(f"chain: {IDLE} idle connections")
    before = chain.memory("payments")
    writers = []
    try:
        for _ in range(IDLE):
            _, writer = await asyncio.open_connection("127.0.0.1", chain.ports["payments"], ssl=context)
            writers.append(writer)
        return round((chain.memory("payments") - before) * 1e3 / IDLE, 1)
    finally:
        for writer in writers:
            writer.transport.abort()


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(median(values), 1), "least": round(min(values), 1), "most": round(max(values), 1)}


def _latency(found: list[tuple[Load, float]]) -> dict[str, float]:
    cuts = [quantiles(each.times, n=100) for each, _ in found]
    return {
        "p50": round(median(cut[49] for cut in cuts) * 1e3, 2),
        "p99": round(median(cut[98] for cut in cuts) * 1e3, 2),
    }


def _ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    def of(kind: str) -> dict[str, float]:
        return {
            "throughput": result["orders_per_second"][kind]["median"],
            "cpu": result["cpu_ms_per_order"][kind],
            "p50": result["ms"][kind]["p50"],
            "p99": result["ms"][kind]["p99"],
            "memory": result["megabytes_of_a_service"][kind],
        }

    return {
        f"{OURS}/({kind})": {name: round(of(OURS)[name] / value, 3) for name, value in of(kind).items()}
        for kind in KINDS
        if kind != OURS
    }
