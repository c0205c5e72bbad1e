"""The measurements. Each interleaves what it compares, turn by turn, and returns medians and ratios."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from statistics import median, quantiles
from typing import Any

import httpx

from ztmtls.authz import exact
from ztmtls.tls import client_context

from .rig import KINDS, SERVER, Rig, start

Say = Callable[[str], None]
_REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


async def kept_connections(rig: Rig, say: Say, turns: int, requests: int) -> dict[str, Any]:
    """Requests on kept connections, 8 at a time: microseconds of wall and CPU time (both sides) each."""
    found: dict[str, dict[str, list[float]]] = {k: {"wall": [], "cpu": []} for k in KINDS}
    clients = {kind: rig.client(kind) for kind in KINDS}
    try:
        for kind in KINDS:  # open connections, fill caches
            await _ask(clients[kind], 64)
        for turn in range(turns):
            say(f"kept connections: turn {turn + 1} of {turns}")
            for kind in random.sample(KINDS, len(KINDS)):
                server_cpu, own_cpu = (await rig.measures())["cpu"], time.process_time()
                began = time.perf_counter()
                await _ask(clients[kind], requests)
                wall = time.perf_counter() - began
                cpu = time.process_time() - own_cpu + (await rig.measures())["cpu"] - server_cpu
                found[kind]["wall"].append(wall / requests * 1e6)
                found[kind]["cpu"].append(cpu / requests * 1e6)
    finally:
        for client in clients.values():
            await client.aclose()
    return _compared({k: {m: median(v) for m, v in found[k].items()} for k in KINDS}, "us_per_request")


async def _ask(client: Any, requests: int) -> None:
    async def worker(number: int) -> None:
        for _ in range(number):
            (await client.get("/")).raise_for_status()

    await asyncio.gather(*(worker(requests // 8) for _ in range(8)))


async def full_handshakes(rig: Rig, say: Say, turns: int, connections: int) -> dict[str, Any]:
    """New connection, one request, closed: microseconds of wall and CPU time (both sides) each."""
    contexts: dict[str, ssl.SSLContext] = {
        "ztmtls": client_context(rig.source, exact(SERVER)),
        "ssl": rig.fixed,
    }
    found: dict[str, dict[str, list[float]]] = {k: {"wall": [], "cpu": []} for k in contexts}
    for turn in range(turns):
        say(f"full handshakes: turn {turn + 1} of {turns}")
        for kind in random.sample(tuple(contexts), len(contexts)):
            server_cpu, own_cpu = (await rig.measures())["cpu"], time.process_time()
            began = time.perf_counter()
            for _ in range(connections):
                await _connect_once(rig.ports[kind], contexts[kind])
            wall = time.perf_counter() - began
            cpu = time.process_time() - own_cpu + (await rig.measures())["cpu"] - server_cpu
            found[kind]["wall"].append(wall / connections * 1e6)
            found[kind]["cpu"].append(cpu / connections * 1e6)
    medians = {k: {m: median(v) for m, v in found[k].items()} for k in contexts}
    return _compared(medians, "us_per_connection")


async def _connect_once(port: int, context: ssl.SSLContext) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(_REQUEST)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:100]
    writer.close()


def _compared(medians: dict[str, dict[str, float]], unit: str) -> dict[str, Any]:
    rounded = {kind: {m: round(v, 1) for m, v in each.items()} for kind, each in medians.items()}
    ratios = {
        f"ztmtls/{kind}": {m: round(medians["ztmtls"][m] / v, 2) for m, v in each.items()}
        for kind, each in medians.items()
        if kind != "ztmtls"
    }
    return {unit: rounded, "ratio": ratios}


async def rotation_under_load(rig: Rig, say: Say, svids: int, authorities: int) -> dict[str, Any]:
    """SVIDs and authorities change while 8 workers post: failures, and latency against a quiet time."""
    failed: list[str] = []
    times: list[tuple[float, float]] = []
    serials: set[str] = set()
    running = True

    async def worker(client: Any) -> None:
        while running:
            began = time.perf_counter()
            try:
                response = await client.post("/payments", content=b"{}")
                if response.status_code != 200:
                    failed.append(f"status {response.status_code}")
            except httpx.HTTPError as error:
                failed.append(f"{type(error).__name__}: {error}")
            times.append((began, time.perf_counter() - began))

    async with rig.client("ztmtls") as client:
        workers = [asyncio.create_task(worker(client)) for _ in range(8)]
        say("rotation under load: a quiet time first")
        await asyncio.sleep(5)
        rotating_since = time.perf_counter()
        every = max(1, svids // max(1, authorities))
        for number in range(1, svids + 1):
            say(f"rotation under load: {number} of {svids}")
            await asyncio.sleep(0.2)  # a breath between them, as the shortest-lived SVIDs would leave
            if number % every == 0 and number // every <= authorities:
                await _change_authority(rig)
            for workload in (rig.server, rig.caller):
                serials.add(workload.rotate().serial)
            await _both_follow(rig)
        rotated_until = time.perf_counter()
        running = False
        await asyncio.gather(*workers)
    quiet = [t for began, t in times if began < rotating_since]
    busy = [t for began, t in times if rotating_since <= began < rotated_until]
    return {
        "svid_rotations": svids,
        "ca_rotations": authorities,
        "svids_issued": len(serials),
        "requests": len(times),
        "failed": len(failed),
        "failures": sorted(set(failed))[:5],
        "ms": {"quiet": _latency(quiet), "rotating": _latency(busy)},
        "ratio_p50": round(median(busy) / median(quiet), 2),
    }


def _latency(times: list[float]) -> dict[str, float]:
    cuts = quantiles(times, n=100)
    return {"p50": round(cuts[49] * 1e3, 2), "p99": round(cuts[98] * 1e3, 2)}


async def _change_authority(rig: Rig) -> None:
    """As SPIRE does it: published, then used, then withdrawn when nobody presents what the old one signed."""
    old = rig.ca.active
    rig.ca.prepare()
    await _both_follow(rig)
    rig.ca.activate()
    for workload in (rig.server, rig.caller):
        workload.rotate()
    await _both_follow(rig)
    rig.ca.retire(old)
    await _both_follow(rig)


async def _both_follow(rig: Rig) -> None:
    """Both sides have taken what was sent, and a few requests have used it."""
    wanted = len(rig.ca.bundle.authorities)
    domain = str(rig.ca.trust_domain)
    async with asyncio.timeout(30):
        await rig.server.wait_for_delivery()
        await rig.caller.wait_for_delivery()
        while rig.source.context.svid.serial != rig.caller.svid.serial:
            await asyncio.sleep(0.002)
        while (await rig.measures())["authorities"].get(domain) != wanted:
            await asyncio.sleep(0.002)
    await asyncio.sleep(0.02)


async def stall_per_rotation(rig: Rig, say: Say, rotations: int) -> dict[str, Any]:
    """The longest time the server's event loop stood still, with a rotation and a first new handshake in it,
    and without; in milliseconds. Turn by turn."""
    context = client_context(rig.source, exact(SERVER))
    with_rotation: list[float] = []
    without: list[float] = []
    for number in range(rotations):
        say(f"event-loop stall: {number + 1} of {rotations}")
        for rotate in random.sample((True, False), 2):
            generation = (await rig.measures())["generation"]
            if rotate:
                rig.server.rotate()
                while (found := await rig.measures())["generation"] == generation:
                    pass
                longest = found["stall"]
            else:
                await asyncio.sleep(0.005)
                longest = (await rig.measures())["stall"]
            await _connect_once(rig.ports["ztmtls"], context)
            longest = max(longest, (await rig.measures())["stall"])
            (with_rotation if rotate else without).append(longest * 1e3)
    return {
        "ms_median": {"with": round(median(with_rotation), 2), "without": round(median(without), 2)},
        "added_ms": round(median(with_rotation) - median(without), 2),
    }


async def closing_detrusted(rig: Rig, say: Say, number: int, rounds: int) -> dict[str, Any]:
    """`number` connections of a trust domain that is withdrawn: how long until all are closed, and how many
    new connections others make meanwhile, against the seconds before and after. Medians of some rounds."""
    context = client_context(rig.source, exact(SERVER))
    took, usual, meanwhile, ratios = [], [], [], []
    for turn in range(1, rounds + 1):
        say(f"closing {number} connections: round {turn} of {rounds}")
        seconds, quiet, busy = await _close_once(rig, context, number)
        took.append(seconds)
        usual.append(quiet)
        meanwhile.append(busy)
        ratios.append(busy / quiet)
    return {
        "connections": number,
        "seconds_until_all_closed": {"median": round(median(took), 2), "longest": round(max(took), 2)},
        "accepts_per_second": {
            "usual": round(median(usual), 1),
            "meanwhile": round(median(meanwhile), 1),
        },
        "ratio": {"median": round(median(ratios), 3), "each": [round(ratio, 2) for ratio in ratios]},
    }


async def _close_once(rig: Rig, context: ssl.SSLContext, number: int) -> tuple[float, float, float]:
    """Seconds until all are closed; connections per second that others make usually, and meanwhile."""
    holder = await start(
        "bench.holder",
        rig.friend,
        None,
        str(rig.ports["ztmtls"]),
        str(number),
        SERVER,
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        async with asyncio.timeout(120):
            assert (await holder.stdout.readline()).startswith(b"open")
        before = await _accept_rate(rig, context, _after(3.0))
        closed = asyncio.create_task(holder.stdout.readline())
        began = time.perf_counter()
        rig.server.set_federation()
        during = await _accept_rate(rig, context, closed)
        took = time.perf_counter() - began
        after = await _accept_rate(rig, context, _after(3.0))
    finally:
        if holder.returncode is None:
            holder.kill()
        await holder.wait()
        rig.server.set_federation(rig.friend_ca)
        await _both_follow(rig)
    return took, (before + after) / 2, during


def _after(seconds: float) -> asyncio.Future[Any]:
    return asyncio.ensure_future(asyncio.sleep(seconds))


async def _accept_rate(rig: Rig, context: ssl.SSLContext, until: Awaitable[Any]) -> float:
    """New connections per second, one after the other, until something is done."""
    ended = asyncio.ensure_future(until)
    began, made = time.perf_counter(), 0
    while not ended.done():
        await _connect_once(rig.ports["ztmtls"], context)
        made += 1
    return made / (time.perf_counter() - began)
