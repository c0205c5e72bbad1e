"""Ask payments to charge an order: repeated safely, and never in doubt about what is not known.

Every attempt for an order carries the same Idempotency-Key, made from the order's id, so payments charges
it once however often it is asked. What comes back is one of four outcomes, and only two of them are known
to be final. Anything that looks like the network, a timeout included, leaves open whether the charge was
made: a lost answer is not a lost request.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import UUID

import httpx
from pydantic import BaseModel, Field, ValidationError

from ztmtls.client import NoIdentityError, RefusedByServer, ServerRefused, hop
from ztmtls.reasons import Reason

from .schemas import HopDict, Link

SERVICE = "payments"


@dataclass(frozen=True, slots=True)
class Retry:
    """How long and how often to ask. Times are seconds; pauses are random up to a doubling limit."""

    deadline: float = 8.0
    attempt: float = 3.0
    attempts: int = 6
    first_pause: float = 0.1
    longest_pause: float = 1.5


@dataclass(frozen=True, slots=True)
class Charged:
    """The money was taken, now or by an earlier attempt."""

    payment_id: UUID
    link: Link
    database: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Declined:
    """Payments decided against it: no money was taken, nor will be."""

    reason: Reason
    detail: str
    link: Link


@dataclass(frozen=True, slots=True)
class Refused:
    """The call was refused before it was carried out, by an identity check, a policy or as invalid.

    `status` is the answer's, or None when there was none.
    """

    reason: Reason
    detail: str
    status: int | None
    link: Link


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nobody here can tell whether the money was taken. Asking again with the same key will."""

    detail: str
    worth_repeating: bool = True


Outcome = Charged | Declined | Refused | Unknown


class Payments:
    """The payments service, as orders sees it through a `ztmtls.client.AsyncClient`."""

    def __init__(self, client: httpx.AsyncClient, retry: Retry | None = None) -> None:
        self._client = client
        self._retry = retry or Retry()

    async def charge(self, order_id: UUID, amount: int) -> Outcome:
        """Have `amount` (minor units, EUR) charged once for this order.

        Transport failures and 502, 503 and 504 are repeated within the deadline. Refusals are not, save
        for one fresh connection after a 401, which says that this connection's identity ran out.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + self._retry.deadline
        in_doubt = renewed = False
        for attempt in range(1, self._retry.attempts + 1):
            outcome = await self._attempt(order_id, amount, min(self._retry.attempt, end - clock()))
            match outcome:
                case Unknown():
                    in_doubt = True
                    again = outcome.worth_repeating
                case Refused(status=401):
                    again, renewed = not renewed, True
                case _:
                    again = False
            pause = self._pause(attempt)
            if not again or clock() + pause >= end:
                break
            await asyncio.sleep(pause)
        if in_doubt and isinstance(outcome, Refused):
            return Unknown(f"refused now ({outcome.reason}), but an earlier attempt may have passed")
        return outcome

    def _pause(self, attempt: int) -> float:
        limit = min(self._retry.longest_pause, self._retry.first_pause * 2**attempt)
        return random.uniform(limit / 4, limit)  # noqa: S311 - spreads load, guards nothing

    async def _attempt(self, order_id: UUID, amount: int, seconds: float) -> Outcome:
        started = time.monotonic()
        link = Link(source="orders", target=SERVICE, method="POST", path="/payments")
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.post(
                    "/payments",
                    json={"order_id": str(order_id), "amount": amount, "currency": "EUR"},
                    headers={"Idempotency-Key": idempotency_key(order_id)},
                    timeout=seconds,
                )
        except (ServerRefused, RefusedByServer, NoIdentityError) as refusal:
            return Refused(refusal.reason, refusal.detail, None, link)
        except (httpx.TransportError, OSError) as error:  # TimeoutError is an OSError
            return Unknown(f"no answer from payments: {type(error).__name__}")
        link.duration_ms = round((time.monotonic() - started) * 1000, 1)
        link.seen_by_caller = hop(response).as_dict()
        return _read(response, order_id, amount, link)

    async def status(self) -> tuple[dict[str, Any], Link]:
        """Where payments stands, in its own words or, when it can't be asked, in ours."""
        started = time.monotonic()
        link = Link(source="orders", target=SERVICE, method="GET", path="/status")
        try:
            async with asyncio.timeout(self._retry.attempt):
                response = await self._client.get("/status", timeout=self._retry.attempt)
        except (ServerRefused, RefusedByServer, NoIdentityError) as refusal:
            return _no_status(refusal.reason, refusal.detail), link
        except (httpx.TransportError, OSError) as error:
            return _no_status(Reason.DEPENDENCY_UNAVAILABLE, type(error).__name__), link
        link.duration_ms = round((time.monotonic() - started) * 1000, 1)
        link.seen_by_caller = hop(response).as_dict()
        if response.status_code != 200:
            answer = _problem_of(response)
            return _no_status(answer.reason, answer.detail), link
        try:
            body: dict[str, Any] = _Status.model_validate_json(response.content).model_dump()
        except ValidationError:
            return _no_status(Reason.DEPENDENCY_UNAVAILABLE, "its answer can't be read"), link
        link.seen_by_callee = body.get("seen_by_callee")
        return body, link


def idempotency_key(order_id: UUID) -> str:
    """The one key under which this order is ever charged."""
    return f"order-{order_id}"


class _Payment(BaseModel):
    id: UUID
    order_id: UUID
    amount: int
    currency: Literal["EUR"]


class _Answer(BaseModel):
    payment: _Payment
    seen_by_callee: HopDict
    database: dict[str, Any]


class _Status(BaseModel, extra="allow"):
    service: Literal["payments"]
    seen_by_callee: HopDict


class _ProblemBody(BaseModel):
    reason: Reason = Reason.HTTP_ERROR
    title: str = ""
    detail: Annotated[str, Field(max_length=1000)] = ""


def _read(response: httpx.Response, order_id: UUID, amount: int, link: Link) -> Outcome:
    status = response.status_code
    if status in (200, 201):
        return _read_charge(response, order_id, amount, link)
    answer = _problem_of(response)
    if status == 402:
        return Declined(answer.reason, answer.detail or answer.title, link)
    if 400 <= status < 500:
        return Refused(answer.reason, answer.detail or answer.title, status, link)
    return Unknown(f"payments answered {status} ({answer.reason})", worth_repeating=status in (502, 503, 504))


def _read_charge(response: httpx.Response, order_id: UUID, amount: int, link: Link) -> Outcome:
    try:
        answer = _Answer.model_validate_json(response.content)
    except ValidationError:
        return Unknown("payments sent an answer that can't be read", worth_repeating=False)
    if (answer.payment.order_id, answer.payment.amount) != (order_id, amount):
        return Unknown("payments answered for another order or amount", worth_repeating=False)
    link.seen_by_callee = answer.seen_by_callee
    return Charged(answer.payment.id, link, answer.database)


def _problem_of(response: httpx.Response) -> _ProblemBody:
    try:
        return _ProblemBody.model_validate_json(response.content)
    except ValidationError:
        return _ProblemBody()


def _no_status(reason: Reason, detail: str) -> dict[str, Any]:
    return {"service": SERVICE, "unreachable": True, "reason": str(reason), "detail": detail}
