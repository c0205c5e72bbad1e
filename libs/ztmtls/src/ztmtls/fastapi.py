"""ztmtls in a FastAPI application: the verified peer and the idempotency key, refusals as problem documents.

Problem documents follow RFC 9457. Their `reason` is the stable code that the audit log and the metrics
use too.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path
from fastapi.exceptions import RequestValidationError
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from .hop import HopView
from .idempotency import KEY
from .identity import request_identity
from .problems import MEDIA_TYPE, bearer_challenge, problem_body
from .reasons import JwtRefused, NoDatabase, Reason, Refusal, printable
from .verify import VerifiedPeer

logger = logging.getLogger(__name__)


class Problem(Exception):
    """Raise it in a handler to answer with a problem document (RFC 9457)."""

    def __init__(self, status: int, reason: Reason, title: str, detail: str = "", **extra: Any) -> None:
        super().__init__(f"{reason}: {detail or title}")
        self.status = status
        self.reason = reason
        self.title = title
        self.detail = detail
        self.headers: dict[str, str] = extra.pop("headers", {})
        self.extra = extra


class _ProblemResponse(JSONResponse):
    """JSON in ASCII: text from a request may hold lone surrogates, which UTF-8 can't."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def problem(
    status: int,
    reason: Reason,
    title: str = "",
    detail: str = "",
    *,
    headers: dict[str, str] | None = None,
    **extra: Any,
) -> Response:
    """A response with a problem document (``application/problem+json``)."""
    return _ProblemResponse(problem_body(status, reason, title, detail, **extra), status, headers)


async def _peer(connection: HTTPConnection) -> VerifiedPeer:
    return request_identity(connection.scope).connection.peer


async def _hop(connection: HTTPConnection) -> HopView:
    identity = request_identity(connection.scope)
    return identity.connection.view(identity.rule)


Peer = Annotated[VerifiedPeer, Depends(_peer)]
"""The verified peer of this request's connection. Never from a header; there is none without mTLS."""

Hop = Annotated[HopView, Depends(_hop)]
"""What this service verified about its caller on this request, with the rule that allowed it."""


async def _idempotency_key(request: Request) -> str:
    values = request.headers.getlist("idempotency-key")
    if not any(values):
        raise Problem(
            400,
            Reason.IDEMPOTENCY_KEY_MISSING,
            "Idempotency-Key is missing",
            "Name this action with an Idempotency-Key header, and repeat it with the same key.",
        )
    if len(values) > 1 or not KEY.fullmatch(values[0]):
        raise Problem(
            400,
            Reason.IDEMPOTENCY_KEY_INVALID,
            "Idempotency-Key is malformed",
            "Send one Idempotency-Key of 1 to 128 characters out of A-Z a-z 0-9 . _ ~ -",
        )
    return values[0]


IdempotencyKey = Annotated[str, Depends(_idempotency_key)]
"""The request's Idempotency-Key, or a 400 problem. Checked before the body is."""

IdempotencyKeyInPath = Annotated[str, Path(pattern=f"^{KEY.pattern}$")]
"""The same as a segment of the path."""


def key_reused() -> Problem:
    """The key already names another action of this caller."""
    return Problem(
        422,
        Reason.IDEMPOTENCY_KEY_REUSED,
        "Idempotency-Key already names another request",
        "This key was used with a different body. Use a new key for a new action.",
    )


def install(app: FastAPI) -> None:
    """Answer every failure of `app` with a problem document; details of unexpected ones stay in the log."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem(
        error.status, error.reason, error.title, error.detail, headers=error.headers, **error.extra
    )


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if isinstance(error, JwtRefused):  # a caller's token: what is wrong with our own is a `NoIdentity`
        title, challenge = bearer_challenge(error.reason)
        return problem(401, error.reason, title, error.detail, headers={"WWW-Authenticate": challenge})
    if error.reason in (Reason.NO_PEER, Reason.JWT_MISSING):
        return problem(403, error.reason, "Refused", error.detail)
    if isinstance(error, NoDatabase):  # the transaction has logged it
        return problem(
            503,
            error.reason,
            "The database can't be used at the moment",
            "Nothing is lost: repeat the request, with the same Idempotency-Key if it had one.",
            headers={"Retry-After": "1"},
        )
    logger.error("%s %s failed: %s", request.method, request.url.path, error)
    return problem(503, error.reason, "A part this request needs is not available")


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The place of a JSON syntax error is a number of characters, not a field.
    faults = [
        {
            "field": "body" if e["type"] == "json_invalid" else printable(field_name(e["loc"])),
            "message": str(e["msg"]),
        }
        for e in error.errors()
    ]
    names = ", ".join(sorted({f["field"] for f in faults}))
    return problem(
        422, Reason.INVALID_REQUEST, "The request is not valid", f"Look at: {names}", errors=faults
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = {404: Reason.NOT_FOUND, 405: Reason.METHOD_NOT_ALLOWED, 413: Reason.TOO_LARGE}.get(
        error.status_code, Reason.HTTP_ERROR
    )
    return problem(error.status_code, reason, "", str(error.detail), headers=dict(error.headers or {}))


async def _on_unexpected(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(500, Reason.INTERNAL_ERROR, "Something went wrong on our side")


def field_name(loc: tuple[int | str, ...]) -> str:
    """Name a field of the body as people write it: ``items[0].quantity``; other parts keep their place."""
    parts = list(loc[1:] if loc and loc[0] == "body" else loc)
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip(".")
    return text or "body"
