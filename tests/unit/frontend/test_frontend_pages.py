"""What a person gets to see: ordering, the evidence, and what went wrong."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from frontend.guidance import guidance
from ztmtls.client import NoIdentityError, RefusedByServer, ServerRefused
from ztmtls.reasons import Reason, Refusal

from .conftest import (
    ORDER_ID,
    PREFIX,
    SERIALS,
    Browser,
    ScriptedOrders,
    hidden_fields,
    moment,
    order,
    placed,
    problem,
    report,
    status_answer,
    text_of,
    view,
)

ORDER_PAGE = f"/orders/{ORDER_ID}"


async def test_the_order_form_shows_goods_chain_and_recent_orders(browser: Browser) -> None:
    page = await browser.get("/")
    text = text_of(page.text)
    assert page.status_code == 200
    assert "Desk lamp" in text
    assert "€49.00" in text
    assert "2 \N{MULTIPLICATION SIGN} Desk lamp" in text
    assert "mutual TLS" in text
    assert 'aria-current="page"' in page.text


async def test_ordering_leads_to_the_order_with_its_chain(browser: Browser, orders: ScriptedOrders) -> None:
    sent = await browser.order(lamp=2, mug="")
    assert (sent.status_code, sent.headers["location"]) == (303, ORDER_PAGE)

    asked = orders.asked("POST", "/orders")[0]
    assert asked.read() == b'{"items":[{"sku":"lamp","quantity":2}]}'

    page = await browser.get(ORDER_PAGE)
    text = text_of(page.text)
    assert "Ordered and paid." in text
    assert "On every hop both sides saw the same two identities." in text
    assert text.count("Both sides agree") == 2
    for service in ("frontend", "orders", "payments"):
        assert text.count(PREFIX + service) == {"frontend": 2, "orders": 4, "payments": 2}[service]
        assert SERIALS[service] in text
    for fact in ("frontend-calls-orders", "orders-calls-payments", "12.5 ms", "orders_app", "payments_app"):
        assert fact in text
    assert "0a1b2c3d-aaaa-4bbb-8ccc-ddddeeeeffff" in text
    assert "A person has no SPIFFE ID" in text


async def test_each_rendered_form_has_a_key_of_its_own(browser: Browser) -> None:
    assert (await browser.form())["key"] != (await browser.form())["key"]


async def test_a_form_sent_twice_carries_the_same_key(browser: Browser, orders: ScriptedOrders) -> None:
    form = await browser.form() | {"quantity.lamp": "1"}
    orders.answers["POST", "/orders"] = [
        httpx.Response(201, json=placed()),
        httpx.Response(200, json=placed(), headers={"Idempotency-Replayed": "true"}),
    ]
    first, second = await browser.send(form), await browser.send(form)
    assert first.headers["location"] == second.headers["location"] == ORDER_PAGE
    keys = [request.headers["idempotency-key"] for request in orders.asked("POST", "/orders")]
    assert keys == [form["key"]] * 2


async def test_a_replay_is_not_taken_for_the_placing(browser: Browser, orders: ScriptedOrders) -> None:
    replayed = httpx.Response(200, json=placed(), headers={"Idempotency-Replayed": "true"})
    orders.answers["POST", "/orders"] = replayed
    await browser.order(lamp=1)
    assert "its own view is gone" in text_of((await browser.get(ORDER_PAGE)).text)


async def test_without_our_own_view_the_page_shows_its_own_request_and_says_so(browser: Browser) -> None:
    text = text_of((await browser.get(ORDER_PAGE)).text)
    assert "This frontend did not place the order, or has restarted since" in text
    assert "One side's view" in text
    assert "The call that fetched this page" in text
    assert f"GET {ORDER_PAGE}" in text


async def test_views_that_differ_are_shown_as_what_they_are(browser: Browser, orders: ScriptedOrders) -> None:
    stored = placed()
    stored["links"][1]["seen_by_callee"] = view("callee", "payments", "orders", cipher="TLS_OTHER")
    orders.answers["POST", "/orders"] = httpx.Response(201, json=stored)
    orders.answers["GET", ORDER_PAGE] = httpx.Response(
        200, json=stored | {"this_request": view("callee", "orders", "frontend")}
    )
    await browser.order(lamp=1)
    text = text_of((await browser.get(ORDER_PAGE)).text)
    assert "The sides differ" in text
    assert "That must not happen" in text


async def test_a_pending_payment_says_so_and_looks_again(browser: Browser, orders: ScriptedOrders) -> None:
    pending = placed(status="pending", payment_id=None)
    pending["links"], pending["databases"] = pending["links"][:1], pending["databases"][:1]
    orders.answers["POST", "/orders"] = httpx.Response(202, json=pending)
    orders.answers["GET", ORDER_PAGE] = httpx.Response(
        200, json=pending | {"this_request": view("callee", "orders", "frontend")}
    )
    await browser.order(lamp=1)
    page = await browser.get(ORDER_PAGE)
    assert f'href="{ORDER_PAGE}" data-look-again' in page.text
    assert "not settled yet" in text_of(page.text)
    assert "On every hop so far" in text_of(page.text)
    assert "No answer yet" in text_of(page.text)


async def test_a_declined_payment_names_its_reason(browser: Browser, orders: ScriptedOrders) -> None:
    declined = placed(status="declined", reason="payment_declined", payment_id=None)
    orders.answers["GET", ORDER_PAGE] = httpx.Response(
        200, json=declined | {"this_request": view("callee", "orders", "frontend")}
    )
    text = text_of((await browser.get(ORDER_PAGE)).text)
    assert "the payment was declined" in text
    assert "payment_declined" in text


async def test_evidence_is_there_for_programs_too(browser: Browser) -> None:
    await browser.order(lamp=1)
    answer = await browser.get(ORDER_PAGE, accept="application/json")
    body = answer.json()
    assert answer.headers["vary"] == "Accept"
    assert body["links"][0]["from"] == "frontend"
    assert body["links"][0]["seen_by_caller"]["own"]["id"] == PREFIX + "frontend"
    assert body["links"][0]["duration_ms"] is not None
    assert body["this_request"]["seen_by_callee"]["side"] == "callee"
    assert body["order"]["status"] == "paid"


# --- the form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("1.5", "Type a whole number from 0 to 99."),
        ("-1", "Type a whole number from 0 to 99."),
        ("many", "Type a whole number from 0 to 99."),
        ("٣", "Type a whole number from 0 to 99."),
        ("100", "At most 99 in one order."),
        ("9" * 5000, "At most 99 in one order."),
    ],
)
async def test_a_wrong_quantity_is_said_at_the_field_and_kept(
    browser: Browser, orders: ScriptedOrders, typed: str, message: str
) -> None:
    page = await browser.order(lamp=typed, mug=3)
    assert page.status_code == 422
    assert message in text_of(page.text)
    assert f'value="{typed}"' in page.text
    assert 'value="3"' in page.text
    assert 'aria-invalid="true" aria-describedby="q-1-error"' in page.text
    assert 'role="alert"' in page.text
    assert not orders.asked("POST", "/orders")


async def test_nothing_chosen_is_said_above_the_form(browser: Browser, orders: ScriptedOrders) -> None:
    page = await browser.order(lamp=0, mug="")
    assert page.status_code == 422
    assert "every quantity is 0" in text_of(page.text)
    assert not orders.asked("POST", "/orders")


async def test_a_corrected_form_orders_with_the_same_key(browser: Browser, orders: ScriptedOrders) -> None:
    form = await browser.form()
    page = await browser.send(form | {"quantity.lamp": "x"})
    again = hidden_fields(page.text)
    assert again["key"] == form["key"]
    assert (await browser.send(again | {"quantity.lamp": "1"})).status_code == 303


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "ключ", "a\r\nX-Spiffe-Id: me"])
async def test_a_key_that_is_none_of_ours_is_not_passed_on(
    browser: Browser, orders: ScriptedOrders, key: str
) -> None:
    form = await browser.form() | {"key": key, "quantity.lamp": "1"}
    page = await browser.send(form)
    assert page.status_code == 422
    assert hidden_fields(page.text)["key"] not in ("", key)
    assert not orders.asked("POST", "/orders")


async def test_what_orders_finds_wrong_stands_at_the_field(browser: Browser, orders: ScriptedOrders) -> None:
    orders.answers["POST", "/orders"] = problem(
        422,
        "invalid_request",
        errors=[
            {"field": "items[1].sku", "message": "No longer on offer."},
            {"field": "items", "message": "No."},
        ],
    )
    page = await browser.order(lamp=1, mug=1)
    assert page.status_code == 422
    assert 'id="q-2-error"' in page.text
    assert "No longer on offer." in text_of(page.text)
    assert "items: No." in text_of(page.text)


async def test_a_used_key_gets_a_fresh_form(browser: Browser, orders: ScriptedOrders) -> None:
    orders.answers["POST", "/orders"] = problem(422, "idempotency_key_reused")
    form = await browser.form() | {"quantity.lamp": "4"}
    page = await browser.send(form)
    assert page.status_code == 422
    assert "already placed an order" in text_of(page.text)
    assert 'value="4"' in page.text
    assert hidden_fields(page.text)["key"] != form["key"]


# --- what goes wrong behind us ---------------------------------------------------------------------------


def refused(reason: Reason) -> Refusal:
    return Refusal(reason, "the details")


@pytest.mark.parametrize(
    ("failure", "status", "reason", "sent"),
    [
        (ServerRefused(refused(Reason.WRONG_SERVER_IDENTITY)), 502, "wrong_server_identity", False),
        (ServerRefused(refused(Reason.UNTRUSTED_AUTHORITY)), 502, "untrusted_authority", False),
        (RefusedByServer("bad certificate"), 502, "refused_by_server", False),
        (NoIdentityError(refused(Reason.IDENTITY_EXPIRED)), 503, "identity_expired", False),
        (httpx.ConnectError("connection refused"), 503, "dependency_unavailable", False),
        (httpx.ConnectTimeout("nobody there"), 503, "dependency_unavailable", False),
        (httpx.ReadTimeout("too slow"), 503, "dependency_unavailable", True),
        (httpx.ReadError("cut"), 503, "dependency_unavailable", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_an_order_that_got_no_answer_names_hop_reason_and_remedy(
    browser: Browser, orders: ScriptedOrders, failure: Exception, status: int, reason: str, sent: bool
) -> None:
    form = await browser.form() | {"quantity.lamp": "2"}
    orders.answers["POST", "/orders"] = failure
    page = await browser.send(form)
    text = text_of(page.text)
    assert page.status_code == status
    assert reason in text
    assert guidance(reason).meaning in text
    assert guidance(reason).remedy in text
    assert text.count("failed here") == 1
    assert ("is not known" in text) is sent
    assert "Traceback" not in page.text

    # The page offers to send the same form again: same key, so it orders once at most.
    again = hidden_fields(page.text)
    assert (again["key"], again["quantity.lamp"]) == (form["key"], "2")
    del orders.answers["POST", "/orders"]
    assert (await browser.send(again)).status_code == 303


async def test_a_refusal_further_down_names_that_hop(browser: Browser, orders: ScriptedOrders) -> None:
    orders.answers["POST", "/orders"] = problem(
        502,
        "route_not_allowed",
        "The call to payments was refused",
        "Nothing was charged, and the order is closed.",
        downstream={"service": "payments", "status": 403, "reason": "route_not_allowed", "detail": "no"},
        **placed(status="declined"),
    )
    page = await browser.order(lamp=1)
    text = text_of(page.text)
    assert page.status_code == 502
    assert "The call to payments was refused" in text
    assert text.index("failed here") > text.index("orders")
    assert text.count("went through") == 2
    assert f'href="{ORDER_PAGE}"' in page.text
    assert "Send the order again" not in text


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (problem(403, "caller_not_allowed"), 502, "caller_not_allowed"),
        (problem(401, "expired"), 502, "expired"),
        (problem(500, "internal_error"), 502, "internal_error"),
        (problem(503, "database_unavailable"), 503, "database_unavailable"),
        (httpx.Response(502, text="<html>gateway</html>"), 502, "http_error"),
        (httpx.Response(200, text="not json"), 502, "dependency_unavailable"),
        (httpx.Response(200, json={"order": {}}), 502, "dependency_unavailable"),
        (httpx.Response(500, json=["a", "list"]), 502, "http_error"),
    ],
)
async def test_whatever_orders_answers_the_page_is_ours(
    browser: Browser, orders: ScriptedOrders, answer: httpx.Response, status: int, reason: str
) -> None:
    orders.answers["GET", ORDER_PAGE] = answer
    page = await browser.get(ORDER_PAGE)
    assert page.status_code == status
    assert reason in text_of(page.text)
    assert "failed here" in text_of(page.text)


async def test_a_program_gets_a_problem_document(browser: Browser, orders: ScriptedOrders) -> None:
    orders.answers["GET", ORDER_PAGE] = ServerRefused(refused(Reason.WRONG_SERVER_IDENTITY))
    answer = await browser.get(ORDER_PAGE, accept="application/json")
    assert answer.status_code == 502
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["reason"] == "wrong_server_identity"
    assert (body["caller"], body["callee"]) == ("frontend", "orders")


async def test_without_goods_there_is_a_page_that_says_why(browser: Browser, orders: ScriptedOrders) -> None:
    orders.answers["GET", "/products"] = problem(503, "database_unavailable")
    page = await browser.get("/")
    assert page.status_code == 503
    assert "database_unavailable" in text_of(page.text)


async def test_the_form_works_without_recent_orders_and_status(
    browser: Browser, orders: ScriptedOrders
) -> None:
    orders.answers["GET", "/orders"] = problem(503, "database_unavailable")
    orders.answers["GET", "/status"] = httpx.ReadTimeout("slow")
    page = await browser.get("/")
    text = text_of(page.text)
    assert page.status_code == 200
    assert "did not answer with its list" in text
    assert "frontend → orders does not work now: dependency_unavailable" in text


@pytest.mark.parametrize(
    "first",
    [
        httpx.RemoteProtocolError("server disconnected"),
        httpx.ReadError("connection reset"),
        problem(401, "expired"),
    ],
    ids=["closed", "reset", "expired"],
)
async def test_a_connection_at_its_end_is_replaced_once(
    browser: Browser, orders: ScriptedOrders, first: httpx.Response | Exception
) -> None:
    orders.answers["POST", "/orders"] = [first, httpx.Response(201, json=placed())]
    assert (await browser.order(lamp=1)).status_code == 303
    keys = {request.headers["idempotency-key"] for request in orders.asked("POST", "/orders")}
    assert len(keys) == 1


@pytest.mark.parametrize("failure", [RefusedByServer("no"), ServerRefused(refused(Reason.EXPIRED))])
async def test_a_refused_identity_is_not_tried_again(
    browser: Browser, orders: ScriptedOrders, failure: Exception
) -> None:
    orders.answers["POST", "/orders"] = failure
    await browser.order(lamp=1)
    assert len(orders.asked("POST", "/orders")) == 1


# --- status ----------------------------------------------------------------------------------------------


async def test_status_shows_every_identity_and_secret(browser: Browser) -> None:
    text = text_of((await browser.get("/status")).text)
    for service in ("frontend", "orders", "payments"):
        assert PREFIX + service in text
    assert "zt-demo/orders/db" in text
    assert "arn:aws:iam::123456789012:role/zt-demo-payments" in text
    assert text.count("Both sides agree") == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ["Version 0a1b2c3d, made ", " ago", "Next rotation by ", " left"]),
        ({"next_rotation_at": moment(-5)}, ["Next rotation by ", ", due "]),
        ({"next_rotation_at": None}, ["Next rotation not scheduled"]),
        ({"next_rotation_at": None, "rotation_enabled": False}, ["Next rotation not scheduled"]),
        ({"next_rotation_at": None, "rotation_enabled": None}, ["Next rotation not known"]),
        ({"created_at": None}, ["Version 0a1b2c3d Next rotation"]),
    ],
)
async def test_status_tells_the_rotation_of_each_secret(
    browser: Browser, orders: ScriptedOrders, changes: dict[str, Any], told: list[str]
) -> None:
    behind = report("payments")
    behind["credentials"] |= changes
    orders.answers["GET", "/status"] = httpx.Response(200, json=status_answer(behind))
    text = text_of((await browser.get("/status")).text)
    _, _, of_payments = text.partition("payments_app")
    place = 0
    for words in told:
        assert words in of_payments[place:], of_payments
        place = of_payments.index(words, place)


async def test_status_says_when_payments_cannot_be_reached(browser: Browser, orders: ScriptedOrders) -> None:
    gone = {"service": "payments", "unreachable": True, "reason": "wrong_server_identity", "detail": "x"}
    orders.answers["GET", "/status"] = httpx.Response(200, json=status_answer(gone))
    page = await browser.get("/status")
    text = text_of(page.text)
    assert page.status_code == 200
    assert "orders → payments does not work now: wrong_server_identity" in text
    answer = await browser.get("/status", accept="application/json")
    assert answer.json()["fault"] == {"reason": "wrong_server_identity"}


async def test_status_of_programs_holds_the_identities(browser: Browser) -> None:
    body = (await browser.get("/status", accept="application/json")).json()
    assert [service["service"] for service in body["services"]] == ["frontend", "orders", "payments"]
    assert body["services"][0]["identity"]["id"] == PREFIX + "frontend"
    assert body["fault"] is None


# --- other addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/orders/not-a-uuid", "/orders/..%2f..%2fstatus", "/static/app.css", "/static/../app.py"],
)
async def test_an_unknown_address_is_a_page(browser: Browser, orders: ScriptedOrders, path: str) -> None:
    page = await browser.get(path)
    assert page.status_code == 404
    assert "not_found" in text_of(page.text)
    assert not orders.requests


async def test_an_unknown_order_is_a_page(browser: Browser) -> None:
    page = await browser.get("/orders/00000000-0000-4000-8000-000000000000")
    assert page.status_code == 404
    assert "There is no such order" in text_of(page.text)


async def test_a_wrong_method_is_a_page_or_a_problem(browser: Browser) -> None:
    page = await browser.http.delete("/pillars")
    assert page.status_code == 405
    assert "method_not_allowed" in text_of(page.text)
    answer = await browser.http.delete("/pillars", headers={"Accept": "application/json"})
    assert answer.json()["reason"] == "method_not_allowed"


async def test_reloading_the_answer_to_a_form_leads_back(browser: Browser) -> None:
    answer = await browser.get("/orders")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


async def test_head_answers_as_get_does(browser: Browser) -> None:
    for path in ("/", "/pillars", "/status"):
        assert (await browser.http.head(path)).status_code == 200


async def test_an_unexpected_fault_shows_nothing_of_itself(
    browser: Browser, orders: ScriptedOrders, caplog: pytest.LogCaptureFixture
) -> None:
    orders.answers["GET", ORDER_PAGE] = RuntimeError("the password is hunter2")
    page = await browser.get(ORDER_PAGE)
    assert page.status_code == 500
    assert "internal_error" in text_of(page.text)
    assert "hunter2" not in page.text
    assert any("failed" in record.message for record in caplog.records)


async def test_hostile_text_of_other_services_is_only_text(browser: Browser, orders: ScriptedOrders) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    stored = placed(items=[{"sku": "x", "name": evil, "quantity": 1, "unit_price": 1}], currency=evil)
    stored["links"][1] |= {"path": evil, "method": evil}
    stored["links"][1]["seen_by_callee"] |= {"rule": evil, "cipher": evil, "tls_version": evil}
    stored["links"][1]["seen_by_callee"]["own"] |= {"id": f"spiffe://{evil}", "serial": evil}
    stored["databases"][0] |= {"user": evil, "secret_id": evil, "secret_version": evil, "database": evil}
    seen = view("callee", "orders", "frontend", rule=evil)
    orders.answers["GET", ORDER_PAGE] = httpx.Response(200, json=stored | {"this_request": seen})
    goods = {"sku": evil, "name": evil, "description": evil, "price": 1, "currency": evil}
    orders.answers["GET", "/products"] = httpx.Response(200, json={"products": [goods]})
    orders.answers["GET", "/orders"] = httpx.Response(
        200, json={"orders": [order(items=stored["order"]["items"])]}
    )
    orders.answers["POST", "/orders"] = problem(
        403, evil, evil, evil, errors=[{"field": evil, "message": evil}]
    )
    orders.answers["GET", "/status"] = problem(503, evil, evil, evil)

    form = await browser.form() | {f"quantity.{evil}": evil}
    pages = [
        await browser.get("/"),
        await browser.get(ORDER_PAGE),
        await browser.get("/status"),
        await browser.get(f"/{evil}"),
        await browser.send(form),
        await browser.send(form | {f"quantity.{evil}": "1"}),
    ]
    for page in pages:
        assert "<script>alert" not in page.text
        assert "<img" not in page.text
        assert "onerror=alert(1)&gt;" in page.text or page is pages[3]
