"""Problem documents (RFC 9457): how a refusal looks to the caller who gets it over HTTP."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from .reasons import Reason

MEDIA_TYPE = "application/problem+json"


def problem_body(
    status: int, reason: Reason, title: str = "", detail: str = "", **extra: Any
) -> dict[str, Any]:
    """The members of a problem document: type, title, status, detail, reason, and `extra`."""
    return {
        "type": f"urn:ztmtls:problem:{reason}",
        "title": title or _phrase(status),
        "status": status,
        "detail": detail,
        "reason": str(reason),
        **extra,
    }


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"Status {status}"
