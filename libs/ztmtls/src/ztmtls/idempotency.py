"""Idempotency keys: the name a caller gives to one intended action, so that repeating it is harmless.

What a FastAPI application does with them is in `ztmtls.fastapi`: `IdempotencyKey`, `key_reused`.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

KEY = re.compile(r"[A-Za-z0-9._~-]{1,128}")
"""A key, whole: characters that need no escaping in a path (RFC 3986 section 2.3)."""


def fingerprint(action: str, fields: dict[str, Any]) -> str:
    """Return the SHA-256 of what was asked for, independent of how its JSON was written."""
    canonical = json.dumps([action, fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
