"""Orders at a constant rate while the database passwords rotate: does one fail, is one lost or paid twice?

    make rotation                                     20 rotations of each service's password
    make rotation ARGS="--rotations 200"              a soak: memory and connections must stay flat, too

A whole stack runs in a process of its own. Orders go through the page, and so through orders to payments, at
moments that are fixed beforehand: a slow answer does not put the next one off, and times count from these
moments. First comes a quiet time. Then both secrets are rotated by the deployed functions, again and again,
each time when both services have taken up the versions before; that is read in their audit logs.

In the end the answers are compared with the rows in the databases, which were empty at the start:

    failed     orders that the page did not take
    lost       taken, but not paid in orders' database, or not charged to the cent in payments'
    doubled    charges beyond the one for each order that was taken

Exits with 1 unless all three are 0, each version has a line in the audit log of its service, and no
connection is older than its limit; from 100 rotations on also when memory or connections grow. 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx

from frontend.forms import KEY, QUANTITY
from ztdev.control import ask
from ztdev.logview import Tail, parse_line
from ztdev.options import DATABASE_SERVICES, SERVICES, StackOptions
from ztdev.postgres import PostgresServer
from ztdev.rotation import Rotation
from ztdev.shop import Form, order_form
from ztdev.stack import Stack
from ztdev.state import StateDirectory
from ztmtls.database import keep_fresh

from .growth import grown_and_allowed, resident

DEADLINE = 120.0

#: From so many rotations on, growth is told from settling.
SOAK = 100

#: Seconds after which a service looks for a new version of its secret.
MAX_AGE = 2.0

#: Seconds within which idle connections of an older version are opened anew.
RENEWED_WITHIN: float = inspect.signature(keep_fresh).parameters["every"].default

_AGES = (
    "SELECT application_name, extract(epoch FROM now() - backend_start)::float8 FROM pg_stat_activity"
    " WHERE application_name = ANY(%s)"
)


# --- the stack, in a process of its own ---------------------------------------------------------------


async def stack_until_stdin_ends(directory: Path) -> None:
    options = StackOptions(
        state_dir=directory,
        free_ports=True,
        rotate_every=0,
        environment={name: {"DB_SECRET_MAX_AGE_SECONDS": f"{MAX_AGE:g}"} for name in DATABASE_SERVICES},
        report=lambda event: print(event, flush=True),
    )
    async with Stack(options):
        await asyncio.to_thread(sys.stdin.read)


@contextlib.asynccontextmanager
async def running_stack(directory: Path) -> AsyncIterator[dict[str, Any]]:
    """What the state file says of a stack that is ready."""
    output = directory.with_suffix(".log")
    with output.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.rotation", "--stack", str(directory)),
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us; the end of its standard input is for the stack
        )
    state = StateDirectory(directory)
    try:
        async with asyncio.timeout(DEADLINE):
            while state.read().get("phase") != "ready":
                if process.returncode is not None:
                    raise SystemExit("The stack does not start:\n" + output.read_text()[-2000:])
                await asyncio.sleep(0.05)
        yield state.read()
    finally:
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


# --- the load -----------------------------------------------------------------------------------------


@dataclass
class Buyer:
    """Orders through the page. Times are of `time.perf_counter`."""

    http: httpx.AsyncClient
    form: Form
    taken: list[UUID] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    times: list[tuple[float, float]] = field(default_factory=list)

    async def order(self, moment: float) -> None:
        """One order that was due at `moment`."""
        wanted = {QUANTITY + sku: "0" for sku in self.form.skus} | {QUANTITY + self.form.skus[0]: "1"}
        try:
            answer = await self.http.post(
                self.form.action,
                data=self.form.fields | wanted | {KEY: str(uuid4())},
                headers={
                    "Origin": str(self.http.base_url).rstrip("/"),
                    "Accept": "application/problem+json",
                },
            )
        except httpx.HTTPError as error:
            self.failures[type(error).__name__] += 1
        else:
            if answer.status_code == 303:
                self.taken.append(UUID(answer.headers["location"].rpartition("/")[2]))
            else:
                self.failures[f"HTTP {answer.status_code}: {answer.text[:200]}"] += 1
        self.times.append((moment, time.perf_counter() - moment))

    async def keep_ordering(self, rate: float, stop: asyncio.Event) -> None:
        """`rate` orders a second until `stop`; returns when all are answered."""
        began = time.perf_counter()
        number = 0
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                moment = began + number / rate
                await asyncio.sleep(max(0.0, moment - time.perf_counter()))
                group.create_task(self.order(moment))
                number += 1

    def latency(self, since: float, until: float) -> dict[str, float]:
        """Of the orders that were due in this time, in milliseconds."""
        cuts = statistics.quantiles([took for due, took in self.times if since <= due < until], n=100)
        return {"p50_ms": round(cuts[49] * 1e3, 1), "p99_ms": round(cuts[98] * 1e3, 1)}


@contextlib.asynccontextmanager
async def buyer(page: str) -> AsyncIterator[Buyer]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=page, timeout=30.0, trust_env=False, limits=limits) as http:
        form = order_form((await http.get("/", headers={"Accept": "text/html"})).text)
        if form is None:
            raise SystemExit(f"The page at {page} holds no order form.")
        yield Buyer(http, form)


# --- what is looked at --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Between two rotations: memory in MiB and database connections by service, and the oldest's age."""

    memory: dict[str, float]
    connections: dict[str, int]
    oldest: float


@dataclass
class Watch:
    """The stack, from outside: its logs, its databases, its processes."""

    state: dict[str, Any]
    postgres: PostgresServer
    tails: dict[str, Tail]
    used: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in DATABASE_SERVICES})
    rotations: list[Rotation] = field(default_factory=list)
    switched_at: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    async def rotate(self) -> None:
        """Rotate both secrets, and wait until both services use the new versions."""
        done = await asyncio.gather(*(asyncio.to_thread(self._rotate, name) for name in DATABASE_SERVICES))
        self.rotations += done
        async with asyncio.timeout(DEADLINE):
            while not all(each.after.id in self.used_by(each.service) for each in done):
                await asyncio.sleep(0.02)
        self.switched_at.append(time.perf_counter())

    def _rotate(self, service: str) -> Rotation:
        told = ask(Path(self.state["sockets"]), "rotate", timeout=DEADLINE, service=service, cut_off_at=None)
        return Rotation.from_dict(told)

    def used_by(self, service: str) -> list[str]:
        """The versions of its secret that a service has taken up so far, by its audit log."""
        for line in map(parse_line, self.tails[service].read()):
            if line and line.get("event") == "credentials" and line["decision"] == "allow":
                self.used[service].append(line["version"])
        return self.used[service]

    def without_audit_line(self) -> list[str]:
        """Versions that were made and that no audit line tells of."""
        return [each.after.id for each in self.rotations if each.after.id not in self.used_by(each.service)]

    async def sample(self) -> None:
        async with self.postgres.administrator() as connection:
            rows = await (await connection.execute(_AGES, [list(DATABASE_SERVICES)])).fetchall()
        counted = Counter(str(name) for name, _ in rows)
        processes = {
            each["name"]: each["pid"] for each in self.state["processes"] if each["name"] in SERVICES
        }
        self.samples.append(
            Sample(
                {name: resident(pid) for name, pid in processes.items()},
                {name: counted[name] for name in DATABASE_SERVICES},
                max((float(str(age)) for _, age in rows), default=0.0),
            )
        )

    @property
    def oldest_allowed(self) -> float:
        """Seconds. Each rotation outdates every connection: used ones are closed at once, idle ones in
        time."""
        gaps = [later - earlier for earlier, later in pairwise(self.switched_at)]
        return RENEWED_WITHIN + max(gaps, default=0.0) + 5.0


@dataclass(frozen=True)
class Books:
    """Answers and rows, compared."""

    lost: int
    doubled: int


async def compare_books(postgres: PostgresServer, taken: list[UUID]) -> Books:
    """When no order is pending any more."""
    async with postgres.administrator("orders") as connection, asyncio.timeout(DEADLINE):
        waiting = "SELECT count(*) FROM orders WHERE status = 'pending'"
        while (await (await connection.execute(waiting)).fetchone()) != (0,):
            await asyncio.sleep(0.2)
        rows = await (
            await connection.execute("SELECT id, total FROM orders WHERE status = 'paid'")
        ).fetchall()
    paid = dict(rows)
    async with postgres.administrator("payments") as connection:
        charges = await (
            await connection.execute(
                "SELECT order_id, sum(entries.amount)::bigint, count(*) FROM charges"
                " JOIN entries ON entries.charge_id = charges.id GROUP BY order_id"
            )
        ).fetchall()
    charged = {order: amount for order, amount, _ in charges}
    lost = [order for order in taken if paid.get(order) is None or charged.get(order) != paid[order]]
    once = len(set(taken) & charged.keys())
    return Books(len(lost), sum(int(str(number)) for _, _, number in charges) - once)


# --- a run --------------------------------------------------------------------------------------------


async def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    async with running_stack(directory) as state, buyer(state["urls"]["page"]) as placing:
        postgres = PostgresServer(directory / "postgres", state["ports"]["postgres"])
        tails = {name: Tail(directory / "logs" / f"{name}.log") for name in DATABASE_SERVICES}
        watch = Watch(state, postgres, tails)
        stop = asyncio.Event()
        ordering = asyncio.create_task(placing.keep_ordering(options.rate, stop))
        print(f"{options.rate:g} orders a second; {options.quiet:g} s without a rotation first", flush=True)
        await asyncio.sleep(options.warm_up)
        quiet_since = time.perf_counter()
        await asyncio.sleep(options.quiet)
        rotating_since = time.perf_counter()
        print("rotations   orders  failed   memory MiB (" + ", ".join(SERVICES) + ")   connections  oldest s")
        for number in range(1, options.rotations + 1):
            await watch.rotate()
            await asyncio.sleep(options.pause)
            await watch.sample()
            if number % max(1, options.rotations // 10) == 0:
                _print_row(number, placing, watch.samples[-1])
        rotated_until = time.perf_counter()
        stop.set()
        await ordering
        books = await compare_books(postgres, placing.taken)
        return {
            "rotations": options.rotations,
            "orders": len(placing.times),
            "failed": placing.failures.total(),
            "lost": books.lost,
            "doubled": books.doubled,
            **placing.latency(rotating_since, rotated_until),
            **{
                name.replace("_ms", "_steady_ms"): value
                for name, value in placing.latency(quiet_since, rotating_since).items()
            },
            "seconds": round(rotated_until - rotating_since, 1),
            "versions_without_audit_line": len(watch.without_audit_line()),
            "oldest_connection_s": round(max(each.oldest for each in watch.samples), 1),
            "oldest_allowed_s": round(watch.oldest_allowed, 1),
            "most_connections": {
                name: max(each.connections[name] for each in watch.samples) for name in DATABASE_SERVICES
            },
            "memory_mib": {
                name: [round(each.memory[name], 1) for each in (watch.samples[0], watch.samples[-1])]
                for name in SERVICES
            },
            "failures": dict(placing.failures.most_common(5)),
            "growing": growing(watch.samples) if options.rotations >= SOAK else None,
            "cores": os.cpu_count(),
        }


def _print_row(number: int, placing: Buyer, sample: Sample) -> None:
    memory = ", ".join(f"{sample.memory[name]:.0f}" for name in SERVICES)
    connections = " + ".join(str(sample.connections[name]) for name in DATABASE_SERVICES)
    print(
        f"{number:>9} {len(placing.times):>8,} {placing.failures.total():>7}   {memory:>41}   "
        f"{connections:>11} {sample.oldest:>9.1f}",
        flush=True,
    )


def growing(samples: list[Sample]) -> list[str]:
    """What grows steadily, once the first quarter is over."""
    settled = samples[len(samples) // 4 :]
    found = []
    for name in SERVICES:
        memory = [each.memory[name] for each in settled]
        grown, allowed = grown_and_allowed(memory)
        if grown > allowed:
            found.append(f"memory of {name}: {grown:+.1f} MiB")
    half = len(settled) // 2
    for name in DATABASE_SERVICES:
        earlier, later = (
            statistics.mean(each.connections[name] for each in part)
            for part in (settled[:half], settled[half:])
        )
        if later > earlier + 2:
            found.append(f"connections of {name}: {earlier:.1f}, then {later:.1f}")
    return found


def wrong(result: dict[str, Any]) -> list[str]:
    """What of a result should not be, in words."""
    found = [f"{name}: {result[name]}" for name in ("failed", "lost", "doubled") if result[name]]
    if result["versions_without_audit_line"]:
        found.append(f"versions without an audit line: {result['versions_without_audit_line']}")
    if result["oldest_connection_s"] > result["oldest_allowed_s"]:
        found.append(f"a connection was {result['oldest_connection_s']} s old")
    return found + [f"grows: {what}" for what in result["growing"] or []]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rotations", type=int, default=20, help="of each secret (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=15.0, help="orders a second (default: %(default)s)")
    parser.add_argument("--quiet", type=float, default=30.0, help="seconds without rotations (default: 30)")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds that count for neither")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds after each rotation (default: 1)")
    parser.add_argument("--json", metavar="FILE", type=Path, default=Path("build/rotation.json"))
    parser.add_argument("--stack", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rotations < 1 or options.rate <= 0 or options.rate * options.quiet < 2:
        parser.error("there must be a rotation, and some orders before it")
    try:
        if options.stack:
            asyncio.run(stack_until_stdin_ends(options.stack))
            return 0
        with tempfile.TemporaryDirectory(prefix="zt-rotation-") as folder:
            result = asyncio.run(run(options, Path(folder) / "state"))
    except KeyboardInterrupt:
        print("stopped")
        return 130
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(f"  {name + ':':28}{value}" for name, value in result.items()))
    print(f"written: {options.json}")
    faults = wrong(result)
    print(
        "\n".join(f"NOT WELL: {fault}" for fault in faults) or "nothing failed, nothing lost, nothing doubled"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
