"""What the running processes say about themselves on their probe ports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from .processes import ProcessRef


def probe(process: Mapping[str, Any], timeout: float = 2.0) -> dict[str, Any]:
    """One process of the state file as it is now: `state` for people, `ready`, `checks`,
    `identity_status`."""
    result: dict[str, Any] = {name: process.get(name) for name in ("name", "pid", "address", "identity")}
    result["restarts"] = process.get("restarts", 0)
    reference = ProcessRef.parse(process.get("ref"))
    if reference is None or not reference.alive():
        return result | {"pid": None, "ready": False, "state": str(process.get("state") or "not running")}
    url = process.get("probe")
    if not url:
        return result | {"ready": True, "state": "running"}
    try:
        answer = httpx.get(f"{url}/readyz", timeout=timeout, trust_env=False)
        report = answer.json()
        checks = report.get("checks", {}) if isinstance(report, dict) else {}
    except (httpx.HTTPError, ValueError) as error:
        state = f"no answer from its probe port ({type(error).__name__})"
        return result | {"ready": False, "state": state}
    ready = answer.status_code == 200
    faults = [f"{name}: {what}" for name, what in checks.items() if what != "ok"]
    return result | {
        "ready": ready,
        "state": "ready" if ready else "not ready: " + ("; ".join(faults) or "no reason given"),
        "checks": checks,
        "identity_status": report.get("identity"),
    }


def probe_all(processes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All of them at the same time."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(probe, processes))
