"""The audit log: every decision as one line of JSON.

Lines go to a text stream (standard output by default, where a container's log collector takes them).
They are written whole, one per decision, with values escaped, and never hold key material, passwords,
tokens or bodies.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from .hop import HopView
from .reasons import Reason

Decision = Literal["allow", "deny"]


class AuditLog:
    """Writes audit lines for one service and counts them by event, decision and reason."""

    def __init__(self, service: str, stream: TextIO | None = None) -> None:
        self.service = service
        self.counts: Counter[tuple[str, Decision, str]] = Counter()
        self._stream = stream
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
        text = json.dumps(line, default=str) + "\n"
        with self._lock:
            self.counts[event, decision, reason or ""] += 1
            stream = self._stream or sys.stdout
            stream.write(text)
            stream.flush()
