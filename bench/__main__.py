"""``python -m bench``: measure, print a table, write a JSON document."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from . import chain, decisions, guard, measures
from .rig import Rig, rig

Say = Callable[[str], None]
Measure = Callable[[Say], Awaitable[dict[str, Any]]]
OnRig = Callable[[Rig, Say], Awaitable[dict[str, Any]]]


def _some(scale: float) -> Callable[..., int]:
    def some(number: int, least: int = 1) -> int:
        return max(least, round(number * scale))

    return some


def _alone(scale: float) -> dict[str, Measure]:
    """Those that start what they need by themselves."""
    some = _some(scale)

    async def policy(say: Say) -> dict[str, Any]:
        return decisions.measured(say, some(9, 3), some(5000, 200))

    return {"chain": lambda say: chain.measured(say, some(7, 2), 3.0 * min(scale, 1.0)), "decisions": policy}


def _on_rig(scale: float) -> dict[str, OnRig]:
    """Those on one server process and one client."""
    some = _some(scale)
    return {
        "kept": lambda r, say: measures.kept_connections(r, say, some(15, 3), some(800, 80)),
        "handshakes": lambda r, say: measures.full_handshakes(r, say, some(15, 3), some(100, 10)),
        "stall": lambda r, say: measures.stall_per_rotation(r, say, some(100, 5)),
        "rotation": lambda r, say: measures.rotation_under_load(r, say, some(100, 5), some(20)),
        "closing": lambda r, say: measures.closing_detrusted(r, say, some(1000, 20), some(7)),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="ztmtls beside hand-written TLS with fixed certificates and beside plain HTTP: a chain "
        "of services, a policy's decision, kept connections, full handshakes, the event loop's stall at a "
        "rotation, rotation under load, closing de-trusted connections. Everything is interleaved in one "
        "run; ratios say more than times.",
        epilog="On a machine that does other things, too, quote the ratios of several runs.",
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        choices=sorted({**_alone(1), **_on_rig(1)}),
        help="these measurements alone",
    )
    parser.add_argument("--scale", metavar="X", type=float, default=1.0, help="numbers times X (default: 1)")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=Path("build/bench.json"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--guard", action="store_true", help="fail when a ratio is worse than bench/guard.py allows"
    )
    return parser.parse_args()


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }


async def _run(alone: dict[str, Measure], on_rig: dict[str, OnRig], say: Say) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": _machine()}

    def seen(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        say("")
        print(f"{name}\n{_readable(result)}", flush=True)

    for name, measure in alone.items():
        seen(name, await measure(say))
    if on_rig:
        async with rig() as made:
            for name, measured in on_rig.items():
                seen(name, await measured(made, say))
    return results


def _readable(result: Any, depth: int = 1) -> str:
    lines = []
    for key, value in result.items():
        if isinstance(value, dict) and any(isinstance(each, dict) for each in value.values()):
            lines.append("  " * depth + f"{key}:\n{_readable(value, depth + 1)}")
        else:
            shown = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append("  " * depth + f"{key + ':':26}{shown}")
    return "\n".join(lines)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main() -> None:
    arguments = _arguments()
    alone, on_rig = _alone(arguments.scale), _on_rig(arguments.scale)
    wanted = set(arguments.only or [*alone, *on_rig])
    try:
        results = asyncio.run(
            _run(
                {name: measure for name, measure in alone.items() if name in wanted},
                {name: measure for name, measure in on_rig.items() if name in wanted},
                _progress,
            )
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {arguments.json}")
    if results.get("rotation", {}).get("failed"):
        raise SystemExit("requests failed during rotation")
    if arguments.guard and (faults := guard.crossed(results)):
        raise SystemExit("worse than it may be:\n" + "\n".join(f"  {fault}" for fault in faults))


if __name__ == "__main__":
    main()
