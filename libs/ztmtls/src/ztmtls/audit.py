"""The audit log: every decision as one line of JSON.

Lines go to a text stream (standard output by default, where a container's log collector takes them).
They are written whole, one per decision, with values escaped, and never hold key material, passwords,
tokens or bodies.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from .hop import HopView
from .reasons import Reason

Decision = Literal["allow", "deny"]
_encode = json.JSONEncoder(default=str).encode


class AuditLog:
    """Writes audit lines for one service and counts decisions by event, decision and reason.

    `stream` is where the lines go: a text stream, standard output by default. `counts` maps ``(event,
    decision, reason)`` to how often; the reason of what was allowed is empty. Any thread may record.

    Anybody who reaches the port can cause refused handshakes: of these no more than `HANDSHAKES_PER_SECOND`
    lines are written per reason, and the next line says how many were not (``suppressed``). The counts are
    always complete.
    """

    HANDSHAKES_PER_SECOND = 20
    #: How many denials `report` tells, and what it tells of each.
    REPORTED = 20
    _TOLD = ("time", "event", "reason", "peer_id", "method", "path")

    def __init__(self, service: str, stream: TextIO | None = None) -> None:
        self.service = service
        self.counts: Counter[tuple[str, Decision, str]] = Counter()
        self._stream = stream
        self._floods: dict[str, _Flood] = {}
        self._denials: deque[dict[str, Any]] = deque(maxlen=self.REPORTED)
        self._lock = threading.Lock()

    def record(
        self,
        event: str,
        decision: Decision,
        *,
        reason: Reason | None = None,
        hop: HopView | None = None,
        detail: str | None = None,
        **more: Any,
    ) -> None:
        """Write one line.

        `event` is what was decided on (``request``, ``handshake``, ``credentials``, …). `hop` adds both
        identities as they were verified. A denial must carry a reason.
        """
        if decision == "deny" and reason is None:
            raise ValueError("a denial needs a reason code")
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "log": "audit",
            "service": self.service,
            "event": event,
            "decision": decision,
            "reason": reason,
        }
        if hop is not None:
            line |= {
                "side": hop.side,
                "own_id": hop.own.id,
                "own_serial": hop.own.serial,
                "peer_id": hop.peer.id,
                "peer_serial": hop.peer.serial,
                "peer_not_after": hop.peer.not_after,
                "authority": hop.authority,
                "rule": hop.rule,
                "connection": hop.connection,
                "generation": hop.generation,
            }
        if detail is not None:
            line["detail"] = detail
        line |= more
        with self._lock:
            self.counts[event, decision, reason or ""] += 1
            if event == "handshake":
                flood = self._floods.setdefault(reason or "", _Flood(self.HANDSHAKES_PER_SECOND))
                if not flood.admits(time.monotonic()):
                    return
                if flood.suppressed:
                    line["suppressed"], flood.suppressed = flood.suppressed, 0
            if decision == "deny":
                told = {name: line.get(name) for name in self._TOLD}
                self._denials.append(
                    told | {name: told[name] and str(told[name])[:256] for name in ("method", "path")}
                )
            text = _encode(line) + "\n"
            stream = self._stream or sys.stdout
            stream.write(text)
            stream.flush()

    def report(self) -> dict[str, Any]:
        """For a status page: how many decisions were `allowed` and `denied`, and the `latest` denials.

        A request that was allowed and then refused by the application counts as denied, and one whose answer
        was repeated as allowed once. Of each denial, the oldest first: `time` (RFC 3339, UTC), `event`,
        `reason`, `peer_id`, `method`, `path`; None where there is none.
        """
        with self._lock:
            totals: Counter[str] = Counter()
            for (event, decision, _), count in self.counts.items():
                if event != "application":
                    totals[decision] += count
                elif decision == "deny":  # of a request that the guard had allowed
                    totals["deny"] += count
                    totals["allow"] -= count
            return {"allowed": totals["allow"], "denied": totals["deny"], "latest": list(self._denials)}

    def count(self, event: str, decision: Decision) -> None:
        """Count a decision that is worth no line: a handshake that went well is told by its requests."""
        with self._lock:
            self.counts[event, decision, ""] += 1


class _Flood:
    """Lines of one kind: so many a second, the rest is counted."""

    def __init__(self, per_second: int) -> None:
        self.suppressed = 0
        self._per_second = per_second
        self._second = 0
        self._written = 0

    def admits(self, now: float) -> bool:
        if int(now) != self._second:
            self._second, self._written = int(now), 0
        if self._written < self._per_second:
            self._written += 1
            return True
        self.suppressed += 1
        return False
