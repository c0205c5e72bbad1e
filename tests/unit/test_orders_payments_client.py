"""How orders asks payments: what it repeats, what it never repeats, and what it makes of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from orders.payments import Charged, Declined, Payments, Refused, Retry, Unknown
from ztmtls.client import NoIdentityError, RefusedByServer, ServerRefused
from ztmtls.reasons import Reason, Refusal
from ztmtls.source import StaticSource
from ztmtls.testing import CertificateAuthority
from ztmtls.tls import Connection
from ztmtls.verify import verify_peer

ORDER = uuid4()
TOTAL = 2190
PAYMENT = uuid4()
QUICK = Retry(deadline=5.0, attempt=2.0, attempts=4, first_pause=0.001, longest_pause=0.002)

Step = Callable[[httpx.Request], httpx.Response] | httpx.Response | Exception


@pytest.fixture(scope="module")
def verified() -> Connection:
    """The client's side of a connection on which payments proved itself."""
    ca = CertificateAuthority("zt.example")
    source = StaticSource(ca.context(ca.issue("spiffe://zt.example/ns/zt-demo/sa/orders")))
    chain = ca.issue("spiffe://zt.example/ns/zt-demo/sa/payments").chain
    peer = verify_peer(chain, source.context.bundles, datetime.now(UTC))
    return Connection("caller", source.context, peer, None, "TLSv1.3", "TLS_AES_256_GCM_SHA384")


class Script:
    """A payments service that answers as it is told, one step per request; the last step repeats."""

    def __init__(self, connection: Connection, *steps: Step) -> None:
        self.requests: list[httpx.Request] = []
        self._connection = connection
        self._steps = list(steps)

    def payments(self, retry: Retry = QUICK) -> Payments:
        transport = httpx.MockTransport(self._answer)
        return Payments(httpx.AsyncClient(transport=transport, base_url="https://payments"), retry)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        if isinstance(step, Exception):
            raise step
        answer = step if isinstance(step, httpx.Response) else step(request)
        return httpx.Response(
            answer.status_code,
            content=answer.content,
            headers={"content-type": "application/json"},
            extensions={"ztmtls_connection": self._connection},
        )

    @property
    def keys(self) -> set[str]:
        return {request.headers["Idempotency-Key"] for request in self.requests}


def _charged(status: int = 201, order_id: UUID = ORDER, amount: int = TOTAL) -> httpx.Response:
    return httpx.Response(
        status,
        json={
            "payment": {
                "id": str(PAYMENT),
                "order_id": str(order_id),
                "amount": amount,
                "currency": "EUR",
                "status": "charged",
            },
            "seen_by_callee": {"side": "callee", "rule": "orders-charges"},
            "database": {"service": "payments", "user": "payments_app"},
        },
    )


def _problem(status: int, reason: str) -> httpx.Response:
    return httpx.Response(
        status, json={"reason": reason, "status": status, "detail": "because", "title": "No"}
    )


async def test_a_charge_comes_back_with_both_views_of_the_hop(verified: Connection) -> None:
    script = Script(verified, _charged())

    outcome = await script.payments().charge(ORDER, TOTAL)

    assert isinstance(outcome, Charged)
    assert outcome.payment_id == PAYMENT
    assert outcome.database["service"] == "payments"
    link = outcome.link.as_dict()
    assert (link["from"], link["to"], link["method"], link["path"]) == (
        "orders",
        "payments",
        "POST",
        "/payments",
    )
    assert link["seen_by_caller"]["peer"]["id"] == "spiffe://zt.example/ns/zt-demo/sa/payments"
    assert link["seen_by_callee"]["rule"] == "orders-charges"
    assert link["duration_ms"] >= 0
    (request,) = script.requests
    assert request.headers["Idempotency-Key"] == f"order-{ORDER}"


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ReadTimeout("slow"),
        httpx.ConnectTimeout("slow"),
        httpx.ConnectError("nobody there"),
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        httpx.RemoteProtocolError("closed without an answer"),
        _problem(502, "http_error"),
        _problem(503, "database_unavailable"),
        httpx.Response(504, text="<html>gateway</html>"),
    ],
    ids=lambda failure: (
        type(failure).__name__ if isinstance(failure, Exception) else str(failure.status_code)
    ),
)
async def test_what_may_be_lost_is_repeated_with_the_same_key(verified: Connection, failure: Step) -> None:
    script = Script(verified, failure, failure, _charged(200))

    outcome = await script.payments().charge(ORDER, TOTAL)

    assert isinstance(outcome, Charged)
    assert len(script.requests) == 3
    assert script.keys == {f"order-{ORDER}"}
    assert len({request.content for request in script.requests}) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        ServerRefused(Refusal(Reason.WRONG_SERVER_IDENTITY, "the server is somebody else")),
        RefusedByServer("the server refused our certificate"),
        NoIdentityError(Refusal(Reason.NO_IDENTITY, "no SVID yet")),
    ],
    ids=lambda refusal: type(refusal).__name__,
)
async def test_a_refused_identity_is_never_repeated(verified: Connection, refusal: Exception) -> None:
    script = Script(verified, refusal)

    outcome = await script.payments().charge(ORDER, TOTAL)

    assert isinstance(outcome, Refused)
    assert isinstance(refusal, Refusal)
    assert (outcome.reason, outcome.status) == (refusal.reason, None)
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "idempotency_key_invalid"),
        (403, "caller_not_allowed"),
        (404, "not_found"),
        (422, "invalid_request"),
    ],
)
async def test_a_4xx_is_never_repeated(verified: Connection, status: int, reason: str) -> None:
    script = Script(verified, _problem(status, reason))

    outcome = await script.payments().charge(ORDER, TOTAL)

    assert isinstance(outcome, Refused)
    assert (outcome.status, outcome.reason, outcome.detail) == (status, reason, "because")
    assert outcome.link.seen_by_caller is not None
    assert len(script.requests) == 1


async def test_a_decline_is_final(verified: Connection) -> None:
    script = Script(verified, _problem(402, "payment_declined"))

    outcome = await script.payments().charge(ORDER, TOTAL)

    assert isinstance(outcome, Declined)
    assert outcome.reason is Reason.PAYMENT_DECLINED
    assert len(script.requests) == 1


async def test_an_identity_that_ran_out_gets_one_fresh_connection(verified: Connection) -> None:
    renewed = Script(verified, _problem(401, "expired"), _charged())
    assert isinstance(await renewed.payments().charge(ORDER, TOTAL), Charged)

    useless = Script(verified, _problem(401, "expired"))
    outcome = await useless.payments().charge(ORDER, TOTAL)

    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.EXPIRED
    assert len(useless.requests) == 2


@pytest.mark.parametrize("refusal", [_problem(403, "caller_not_allowed"), _problem(401, "expired")])
async def test_a_refusal_after_a_lost_answer_leaves_it_unknown(
    verified: Connection, refusal: httpx.Response
) -> None:
    script = Script(verified, httpx.ReadTimeout("slow"), refusal)

    outcome = await script.payments().charge(ORDER, TOTAL)

    assert isinstance(outcome, Unknown)
    assert str(refusal.json()["reason"]) in outcome.detail


async def test_an_unexpected_failure_is_unknown_and_not_hammered(verified: Connection) -> None:
    script = Script(verified, _problem(500, "internal_error"))

    assert isinstance(await script.payments().charge(ORDER, TOTAL), Unknown)
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(201, text="{"),
        httpx.Response(201, json={"payment": {"id": "no uuid"}}),
        _charged(order_id=uuid4()),
        _charged(amount=TOTAL + 1),
    ],
    ids=["not JSON", "not a payment", "another order", "another amount"],
)
async def test_an_answer_that_makes_no_sense_is_unknown(verified: Connection, answer: httpx.Response) -> None:
    assert isinstance(await Script(verified, answer).payments().charge(ORDER, TOTAL), Unknown)


async def test_attempts_are_bounded_in_number(verified: Connection) -> None:
    script = Script(verified, httpx.ConnectError("nobody there"))

    assert isinstance(await script.payments().charge(ORDER, TOTAL), Unknown)
    assert len(script.requests) == QUICK.attempts


async def test_attempts_are_bounded_in_time() -> None:
    class Silent(httpx.AsyncBaseTransport):
        requests = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.requests += 1
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

    silent = Silent()
    client = httpx.AsyncClient(transport=silent, base_url="https://payments")
    retry = Retry(deadline=0.3, attempt=0.1, attempts=100, first_pause=0.001, longest_pause=0.002)
    started = asyncio.get_running_loop().time()

    outcome = await Payments(client, retry).charge(ORDER, TOTAL)

    assert isinstance(outcome, Unknown)
    assert 2 <= silent.requests <= 4
    assert asyncio.get_running_loop().time() - started < 1.0


async def test_status_passes_on_what_payments_says(verified: Connection) -> None:
    said: dict[str, Any] = {"service": "payments", "seen_by_callee": {"side": "callee"}, "identity": {"x": 1}}
    script = Script(verified, httpx.Response(200, json=said))

    status, link = await script.payments().status()

    assert status == said
    assert link.seen_by_caller is not None
    assert link.seen_by_callee == {"side": "callee"}


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (_problem(403, "route_not_allowed"), "route_not_allowed"),
        (httpx.ConnectError("nobody there"), "dependency_unavailable"),
        (ServerRefused(Refusal(Reason.WRONG_SERVER_IDENTITY, "no")), "wrong_server_identity"),
        (httpx.Response(200, text="?"), "dependency_unavailable"),
    ],
)
async def test_status_says_why_payments_cannot_be_asked(
    verified: Connection, step: Step, reason: str
) -> None:
    status, _ = await Script(verified, step).payments().status()

    assert (status["service"], status["unreachable"], status["reason"]) == ("payments", True, reason)
