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


def bearer_challenge(reason: Reason) -> tuple[str, str]:
    """The title of a 401 for a bearer token refused for `reason`, and its ``WWW-Authenticate``.

    Who sent no token is told the scheme and nothing else (RFC 6750 section 3).
    """
    if reason is Reason.JWT_MISSING:
        return "A JWT-SVID is needed", "Bearer"
    return "The JWT-SVID is not accepted", 'Bearer error="invalid_token"'


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"Status {status}"
