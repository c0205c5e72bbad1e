"""Idempotency keys: the name a caller gives to one intended action, so that repeating it is harmless."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from fastapi import Depends, Path, Request

from ztmtls.fastapi import Problem
from ztmtls.reasons import Reason

_KEY = re.compile(r"[A-Za-z0-9._~-]{1,128}")


def _key_header(request: Request) -> str:
    values = request.headers.getlist("idempotency-key")
    if not any(values):
        raise Problem(
            400,
            Reason.IDEMPOTENCY_KEY_MISSING,
            "Idempotency-Key is missing",
            "Name this action with an Idempotency-Key header, and repeat it with the same key.",
        )
    if len(values) > 1 or not _KEY.fullmatch(values[0]):
        raise Problem(
            400,
            Reason.IDEMPOTENCY_KEY_INVALID,
            "Idempotency-Key is malformed",
            "Send one Idempotency-Key of 1 to 128 characters out of A-Z a-z 0-9 . _ ~ -",
        )
    return values[0]


IdempotencyKey = Annotated[str, Depends(_key_header)]
"""The request's Idempotency-Key, or a 400 problem. Checked before the body is."""

KeyInPath = Annotated[str, Path(pattern=f"^{_KEY.pattern}$")]


def fingerprint(action: str, fields: dict[str, Any]) -> str:
    """Return the SHA-256 of what was asked for, independent of how its JSON was written."""
    canonical = json.dumps([action, fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def key_reused() -> Problem:
    """The key already names another action of this caller."""
    return Problem(
        422,
        Reason.IDEMPOTENCY_KEY_REUSED,
        "Idempotency-Key already names another request",
        "This key was used with a different body. Use a new key for a new action.",
    )
