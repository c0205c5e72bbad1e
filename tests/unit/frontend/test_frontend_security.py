"""The door: headers, hosts, bodies, forms of other sites. Each refusal after its positive control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from frontend.security import CONTENT_SECURITY_POLICY, Guard
from ztmtls.reasons import Refusal

from .conftest import ORDER_ID, Audit, Browser, ScriptedOrders, text_of

# --- forms -----------------------------------------------------------------------------------------------


async def refused_after_control(
    browser: Browser, orders: ScriptedOrders, audit: Audit, fields: dict[str, str], **headers: str | None
) -> None:
    """The rightful form is taken; then the changed one is refused, as page, audit line, and in effect."""
    form = await browser.form() | {"quantity.lamp": "1"}
    assert (await browser.send(form)).status_code == 303
    taken = len(orders.asked("POST", "/orders"))

    page = await browser.send(form | fields, **headers)
    assert page.status_code == 403
    assert "csrf_failed" in text_of(page.text)
    assert len(orders.asked("POST", "/orders")) == taken
    denial = audit.denials()[-1]
    assert (denial["event"], denial["reason"], denial["path"]) == ("form", "csrf_failed", "/orders")


@pytest.mark.parametrize("token", ["", "0" * 64, "ключ", "x"])
async def test_a_wrong_form_token_is_refused(
    browser: Browser, orders: ScriptedOrders, audit: Audit, token: str
) -> None:
    await refused_after_control(browser, orders, audit, {"csrf": token})


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null", "Sec_Fetch_Site": None},
        {"Origin": "http://localhost:9999", "Sec_Fetch_Site": None},
        {"Origin": "http://localhost:8080.evil.example", "Sec_Fetch_Site": None},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": None, "Sec_Fetch_Site": "cross-site"},
        {"Origin": None, "Sec_Fetch_Site": None},
    ],
    ids=str,
)
async def test_a_form_of_another_site_is_refused(
    browser: Browser, orders: ScriptedOrders, audit: Audit, headers: dict[str, str | None]
) -> None:
    await refused_after_control(browser, orders, audit, {}, **headers)


@pytest.mark.parametrize("left", [{"Origin": None}, {"Sec_Fetch_Site": None}], ids=str)
async def test_one_word_of_the_browser_is_enough(browser: Browser, left: dict[str, str | None]) -> None:
    form = await browser.form() | {"quantity.lamp": "1"}
    assert (await browser.send(form, **left)).status_code == 303


async def test_a_form_without_the_cookie_is_refused(browser: Browser, orders: ScriptedOrders) -> None:
    form = await browser.form() | {"quantity.lamp": "1"}
    assert (await browser.send(form)).status_code == 303
    browser.http.cookies.clear()
    assert (await browser.send(form)).status_code == 403
    assert len(orders.asked("POST", "/orders")) == 1


async def test_a_token_belongs_to_one_browser(browser: Browser) -> None:
    mine = await browser.form() | {"quantity.lamp": "1"}
    assert (await browser.send(mine)).status_code == 303
    browser.http.cookies.clear()
    theirs = await browser.form()
    assert theirs["csrf"] != mine["csrf"]
    assert (await browser.send(mine)).status_code == 403


async def test_a_planted_cookie_has_no_token(browser: Browser) -> None:
    form = await browser.form() | {"quantity.lamp": "1"}
    assert (await browser.send(form)).status_code == 303
    browser.http.cookies.clear()
    browser.http.cookies.set("zt-form", "A" * 43, domain="localhost.local")
    assert (await browser.send(form)).status_code == 403


async def test_a_refused_form_is_a_problem_document_for_programs(browser: Browser) -> None:
    answer = await browser.send(await browser.form() | {"csrf": "x"}, Accept="application/json")
    assert answer.status_code == 403
    assert answer.json()["reason"] == "csrf_failed"


async def test_the_cookie_is_strict_and_hidden_from_scripts(browser: Browser) -> None:
    cookie = (await browser.get("/")).headers["set-cookie"]
    assert cookie.startswith("zt-form=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie


@pytest.mark.usefixtures("on_eks")
async def test_over_tls_the_cookie_is_bound_to_the_host(browser: Browser) -> None:
    cookie = (await browser.get("/")).headers["set-cookie"]
    assert cookie.startswith("__Host-zt-form=")
    assert "Secure" in cookie
    assert "Path=/" in cookie
    assert "Domain" not in cookie
    assert (await browser.order(lamp=1)).status_code == 303


@pytest.mark.usefixtures("on_eks")
async def test_over_tls_a_plain_origin_is_another_origin(browser: Browser) -> None:
    form = await browser.form() | {"quantity.lamp": "1"}
    assert (await browser.send(form)).status_code == 303
    assert (await browser.send(form, Origin="http://shop.example")).status_code == 403


@pytest.fixture
def on_eks(settings: dict[str, Any], key_file: Path) -> None:
    settings |= {"mode": "eks", "allowed_hosts": "shop.example", "csrf_key_file": key_file}


# --- headers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/pillars"),
        ("GET", "/status"),
        ("GET", f"/orders/{ORDER_ID}"),
        ("GET", "/orders"),
        ("GET", "/nothing"),
        ("POST", "/orders"),
        ("DELETE", "/"),
        ("GET", "/static/nothing.js"),
    ],
)
async def test_every_answer_carries_the_headers(browser: Browser, method: str, path: str) -> None:
    guarded(await browser.http.request(method, path), "no-store")


async def test_failures_carry_the_headers_too(browser: Browser, orders: ScriptedOrders) -> None:
    orders.answers["GET", f"/orders/{ORDER_ID}"] = RuntimeError("boom")
    answer = await browser.get(f"/orders/{ORDER_ID}")
    assert answer.status_code == 500
    guarded(answer, "no-store")
    guarded(await browser.get("/", host="evil.example"), "no-store")
    guarded(await browser.http.post("/orders", content=b"x" * 20_000), "no-store")


def guarded(answer: httpx.Response, cache: str) -> None:
    headers = answer.headers
    assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-frame-options"] == "DENY"
    assert "camera=()" in headers["permissions-policy"]
    assert headers["cache-control"] == cache
    assert "server" not in headers
    assert "strict-transport-security" not in headers


async def test_static_files_may_be_kept_for_ever(browser: Browser) -> None:
    page = (await browser.get("/")).text
    for kind, suffix in (("text/css", ".css"), ("text/javascript", ".js"), ("image/svg+xml", ".svg")):
        path = next(part for part in page.split('"') if part.startswith("/static/") and part.endswith(suffix))
        answer = await browser.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        guarded(answer, "public, max-age=31536000, immutable")


@pytest.mark.usefixtures("on_eks")
async def test_hsts_is_sent_on_eks_only(browser: Browser) -> None:
    answer = await browser.get("/pillars")
    assert answer.headers["strict-transport-security"] == "max-age=31536000"


async def test_pages_hold_nothing_inline(browser: Browser) -> None:
    for path in ("/", "/pillars", "/status", f"/orders/{ORDER_ID}", "/nothing"):
        page = (await browser.get(path)).text
        assert " style=" not in page
        assert "<style" not in page
        assert " onclick=" not in page
        assert page.count("<script") == page.count("<script src=") == 1
        assert "http://" not in page.replace("http://www.w3.org", "")
        assert "https://" not in page


# --- what a browser may say ------------------------------------------------------------------------------

FORGED = {
    "X-Forwarded-Client-Cert": "URI=spiffe://zt.example/ns/zt-demo/sa/payments",
    "x-SPIFFE-id": "spiffe://zt.example/ns/zt-demo/sa/payments",
    "X-Client-Verify": "SUCCESS",
    "Forwarded": "for=10.0.0.1;proto=https",
    "X-Forwarded-For": "10.0.0.1",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example",
    "X-Real-IP": "10.0.0.1",
    "X-Amzn-Mtls-Clientcert-Leaf": "-----BEGIN",
    "X-Original-URL": "/status",
    "Authorization": "Bearer forged",
    "Idempotency-Key": "chosen-by-the-client",
}


async def test_identity_headers_of_a_browser_go_nowhere(browser: Browser, orders: ScriptedOrders) -> None:
    form = await browser.form() | {"quantity.lamp": "1"}
    plain, cookie_before = await browser.send(form), browser.http.cookies
    forged = await browser.send(form, **FORGED)
    assert (forged.status_code, forged.headers["location"]) == (plain.status_code, plain.headers["location"])
    assert browser.http.cookies == cookie_before

    await browser.get("/", **FORGED)
    for request in orders.requests:
        names = {name.lower() for name in FORGED} - {"idempotency-key"}
        assert not names & set(request.headers)
        assert "payments" not in str(request.headers)
    assert {r.headers["idempotency-key"] for r in orders.asked("POST", "/orders")} == {form["key"]}


async def test_the_application_sees_only_the_headers_it_reads() -> None:
    seen: dict[str, str] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(Request(scope).headers)
        await PlainTextResponse("ok")(scope, receive, send)

    async with behind_guard(app) as client:
        await client.get("/", headers={**FORGED, "Accept": "text/html", "Accept-Language": "de"})
    assert set(seen) == {"host", "accept"}


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "[::2]:1"]
)
async def test_another_host_name_is_refused(browser: Browser, audit: Audit, host: str) -> None:
    for good in ("localhost", "LOCALHOST:1234", "127.0.0.1:8080", "[::1]:8080"):
        assert (await browser.get("/pillars", host=good)).status_code == 200
    page = await browser.get("/pillars", host=host)
    assert page.status_code == 421
    assert "host_not_allowed" in text_of(page.text)
    assert audit.denials()[-1]["reason"] == "host_not_allowed"


async def test_two_host_headers_are_refused(browser: Browser) -> None:
    headers = httpx.Headers([("Host", "localhost"), ("Host", "evil.example")])
    assert (await browser.http.get("/pillars", headers=headers)).status_code == 421


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_a_body_above_the_limit_is_refused(
    browser: Browser, orders: ScriptedOrders, declared: bool
) -> None:
    form = await browser.form() | {"quantity.lamp": "1"}
    small = await browser.send(form | {"note": "x" * 10_000})
    assert small.status_code == 303

    async def chunks() -> Any:
        for _ in range(40):
            yield b"x" * 1000

    body: dict[str, Any] = {"content": b"x" * 40_000 if declared else chunks()}
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    page = await browser.http.post("/orders", headers=headers, **body)
    assert page.status_code == 413
    assert "too_large" in text_of(page.text)
    assert page.headers["connection"] == "close"
    assert len(orders.asked("POST", "/orders")) == 1


async def test_more_fields_than_a_form_has_are_refused(browser: Browser) -> None:
    form = await browser.form() | {f"quantity.{i}": "1" for i in range(80)}
    assert (await browser.send(form)).status_code == 400


async def test_more_goods_than_an_order_takes_are_refused(browser: Browser, orders: ScriptedOrders) -> None:
    page = await browser.send(await browser.form() | {f"quantity.{i}": "1" for i in range(21)})
    assert page.status_code == 422
    assert "at most 20 different goods" in text_of(page.text)
    assert not orders.asked("POST", "/orders")


async def test_there_are_no_websockets() -> None:
    sent: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("reached the application")

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await guard(app)({"type": "websocket", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def guard(app: Any) -> Guard:
    def refuse(request: Request, status: int, refusal: Refusal) -> Response:
        return PlainTextResponse(str(refusal), status)

    return Guard(app, hosts=("localhost",), max_body=1024, https=False, refuse=refuse)


def behind_guard(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=guard(app)), base_url="http://localhost")
