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

from . import measures
from .rig import Rig, rig

Say = Callable[[str], None]
Measure = Callable[[Rig, Say], Awaitable[dict[str, Any]]]


def _measures(scale: float) -> dict[str, Measure]:
    def some(number: int, least: int = 1) -> int:
        return max(least, round(number * scale))

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
        description="ztmtls beside hand-written TLS with fixed certificates and beside plain HTTP: kept "
        "connections, full handshakes, the event loop's stall at a rotation, rotation under load, closing "
        "de-trusted connections. Everything is interleaved in one run; ratios say more than times.",
        epilog="On a machine that does other things, too, quote the ratios of several runs.",
    )
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", choices=sorted(_measures(1)), help="these measurements alone"
    )
    parser.add_argument("--scale", metavar="X", type=float, default=1.0, help="numbers times X (default: 1)")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=Path("build/bench.json"), help="(default: %(default)s)"
    )
    return parser.parse_args()


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }


async def _run(chosen: dict[str, Measure], say: Say) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": _machine()}
    async with rig() as made:
        for name, measure in chosen.items():
            results[name] = await measure(made, say)
            say("")
            print(f"{name}\n{_readable(results[name])}", flush=True)
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
    chosen = {n: m for n, m in _measures(arguments.scale).items() if n in (arguments.only or [n])}
    try:
        results = asyncio.run(_run(chosen, _progress))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {arguments.json}")
    if results.get("rotation", {}).get("failed"):
        raise SystemExit("requests failed during rotation")


if __name__ == "__main__":
    main()
