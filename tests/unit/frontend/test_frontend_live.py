"""The live page: what is counted as replaced, who listens, and how streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from frontend import streams as streams_module
from frontend.live import AUTHORITY, CERTIFICATE, LOGIN, Watch, Watcher
from frontend.models import Link, View
from frontend.orders import Calls, Orders, OrdersFailure
from frontend.status import Decisions, Fault, IdentityReport, Overview, ServiceReport, overview
from frontend.streams import Streams, TooManyStreams, event

from .conftest import (
    Audit,
    Browser,
    ScriptedOrders,
    identity,
    problem,
    report,
    seen_by_frontend,
    status_answer,
    text_of,
    view,
)

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def looked(
    seconds: float = 0, payments: dict[str, Any] | None = None, authority: str = "cafe", **own: Any
) -> Overview:
    """The chain `seconds` later, with changes of the frontend's identity and of payments' report, and with
    the authority that signed for orders."""
    seen = view("caller", "frontend", "orders")
    seen["peer"] |= {"authority": authority}
    answer = ServiceReport.model_validate(status_answer(report("payments", **(payments or {}))))
    link = Link(
        caller="frontend",
        callee="orders",
        method="GET",
        path="/status",
        seen_by_caller=View.model_validate(seen),
        seen_by_callee=answer.seen_by_callee,
    )
    mine = IdentityReport.model_validate(identity("frontend", **own))
    decisions = Decisions(allowed=3, denied=0, latest=())
    return overview(AT + timedelta(seconds=seconds), mine, (answer, link), decisions)


def test_a_look_that_took_longer_than_the_next_one_is_no_news() -> None:
    watch = Watch()
    watch.see(looked(0), Calls(0, 0))
    watch.see(looked(2, serial="02"), Calls(2, 0))
    watch.see(looked(1), Calls(1, 0))
    assert len(watch.changes) == 1
    assert watch.calls == Calls(2, 0)
    assert watch.overview == looked(2, serial="02")


def test_the_first_look_is_no_change() -> None:
    watch = Watch()
    watch.see(looked(), Calls(100, 3))
    assert not watch.changes
    assert watch.calls == Calls(0, 0)
    for service in ("frontend", "orders", "payments"):
        certificate = watch.subject(service, CERTIFICATE)
        assert certificate is not None
        assert (certificate.before, certificate.changes) == ("", 0)
        assert watch.subject(service, AUTHORITY) is not None
    assert watch.subject("orders", LOGIN) is not None
    assert watch.subject("frontend", LOGIN) is None


def test_a_change_tells_the_calls_since_the_same_thing_was_replaced_before() -> None:
    watch = Watch()
    watch.see(looked(), Calls(100, 3))
    watch.see(looked(10, serial="bbbb"), Calls(112, 3))
    watch.see(looked(20, serial="cccc"), Calls(150, 4))
    newest, oldest = watch.changes
    assert (newest.service, newest.what) == ("frontend", CERTIFICATE)
    assert (newest.before, newest.after, newest.calls) == ("bbbb", "cccc", Calls(38, 1))
    assert (oldest.after, oldest.calls) == ("bbbb", Calls(12, 0))
    certificate = watch.subject("frontend", CERTIFICATE)
    assert certificate is not None
    assert (certificate.now, certificate.before, certificate.changes) == ("cccc", "bbbb", 2)


def test_logins_and_authorities_are_watched_too() -> None:
    watch = Watch()
    watch.see(looked(), Calls())
    held = report("payments")["credentials"] | {"version": "ffff0000"}
    watch.see(looked(5, payments={"credentials": held}, authority="beef"), Calls())
    assert {(change.service, change.what, change.after) for change in watch.changes} == {
        ("payments", LOGIN, "ffff0000"),
        ("orders", AUTHORITY, "beef"),
    }


def test_a_service_that_is_away_is_shown_as_it_was_heard_last() -> None:
    watch = Watch()
    watch.see(looked(), Calls())
    own = IdentityReport.model_validate(identity("frontend"))
    watch.see(overview(AT, own, Fault("dependency_unavailable")), Calls(0, 4))
    assert watch.overview is not None
    assert watch.overview.orders.identity is None
    heard = watch.report("orders")
    assert heard is not None
    assert heard.identity is not None
    assert watch.calls == Calls(0, 4)
    assert not watch.changes


def test_denials_of_all_services_come_newest_first() -> None:
    watch = Watch()
    denial = {"event": "request", "reason": "caller_not_allowed", "peer_id": "spiffe://zt.example/x"}
    decisions = {
        "allowed": 5,
        "denied": 2,
        "latest": [
            denial | {"time": "2026-01-02T03:04:00Z", "path": "/older"},
            denial | {"time": "2026-01-02T03:04:02Z", "path": "/newer"},
        ],
    }
    watch.see(looked(payments={"decisions": decisions}), Calls())
    assert [(name, each.path) for name, each in watch.denials] == [
        ("payments", "/newer"),
        ("payments", "/older"),
    ]


async def test_the_chain_is_looked_at_only_while_somebody_listens() -> None:
    looks = 0

    async def look() -> Overview:
        nonlocal looks
        looks += 1
        return looked(looks)

    watcher = Watcher(look, Calls)
    first, second = watcher.listen(), watcher.listen()
    async with asyncio.timeout(5):
        assert await anext(first) is await anext(second) is watcher.watch
    assert looks == 1  # one look for both
    await first.aclose()
    assert watcher._task is not None
    await second.aclose()
    assert watcher._task is None


async def test_a_look_that_fails_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frontend.live.EVERY", 0.01)
    looks = 0

    async def look() -> Overview:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise RuntimeError("a fault of ours")
        return looked()

    watcher = Watcher(look, Calls)
    listener = watcher.listen()
    async with asyncio.timeout(5):
        assert await anext(listener) is watcher.watch
    await listener.aclose()


async def test_a_listener_that_comes_later_gets_the_state_at_once() -> None:
    async def look() -> Overview:
        return looked()

    watcher = Watcher(look, Calls)
    await watcher.look()
    async with asyncio.timeout(0.5):
        assert await anext(watcher.listen()) is watcher.watch


async def numbers(seen: list[str]) -> AsyncGenerator[bytes, None]:
    try:
        yield event("1")
        await asyncio.sleep(60)
    finally:
        seen.append("ended")


class Reader:
    """A browser that reads one stream: what it was sent until now."""

    def __init__(self, response: Any) -> None:
        self.read = b""
        self.task = asyncio.create_task(response({"type": "http"}, asyncio.Event().wait, self._send))

    async def _send(self, message: Any) -> None:
        self.read += message.get("body", b"")

    async def until(self, read: bytes) -> None:
        async with asyncio.timeout(5):
            while read not in self.read:
                await asyncio.sleep(0)

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_streams_end_when_the_process_stops_and_are_given_back(audit: Audit) -> None:
    streams, ended = Streams(audit.log), list[str]()
    reader = Reader(streams.answer("/live/events", numbers(ended)))
    await reader.until(b"event: message\ndata: 1\n\n")
    assert streams._open == 1
    streams.close()
    async with asyncio.timeout(5):
        await reader.task
        late = Reader(streams.answer("/live/events", numbers(ended)))
        await late.task
    assert late.read == b""
    assert streams._open == 0
    assert ended == ["ended"]


async def test_streams_are_bounded_and_a_refusal_is_audited(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "LIMIT", 2)
    streams, ended = Streams(audit.log), list[str]()
    answers = [streams.answer("/live/events", numbers(ended)) for _ in range(5)]  # all in one moment
    readers = [Reader(answer) for answer in answers]
    await readers[0].until(b"data: 1")
    refused = [reader for reader in readers if reader.task.done()]
    assert [type(reader.task.exception()) for reader in refused] == [TooManyStreams] * 3
    assert [denial["reason"] for denial in audit.denials()] == ["too_many_streams"] * 3
    for reader in readers:
        await reader.leave()
    assert ended == ["ended"] * 2
    again = Reader(streams.answer("/live/events", numbers(ended)))
    await again.until(b"data: 1")
    await again.leave()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_event_has_a_field_for_each_line(end: str) -> None:
    assert event(f"a{end}b", "part") == b"event: part\ndata: a\ndata: b\n\n"


async def test_the_page_shows_the_chain_without_scripts(browser: Browser) -> None:
    page = await browser.get("/live")
    text = text_of(page.text)
    assert page.status_code == 200
    for words in ("Calls answered", "not replaced yet", "frontend", "payments", "Nothing yet."):
        assert words in text


async def test_the_page_stays_when_orders_does_not_answer(browser: Browser, orders: ScriptedOrders) -> None:
    assert "serving" in text_of((await browser.get("/live")).text)
    orders.answers["GET", "/status"] = problem(503, "database_unavailable")
    orders.answers["GET", "/products"] = httpx.ConnectError("refused")
    page = await browser.get("/live")
    assert page.status_code == 200
    text = text_of(page.text)
    assert "not heard from" in text
    assert "What is shown is what it said last." in text
    assert "orders did not say what is on offer" in text


async def test_a_hostile_denial_is_shown_escaped(browser: Browser) -> None:
    await browser.get("/<script>alert(1)</script>", host="evil.example")
    page = (await browser.get("/live")).text
    assert "host_not_allowed" in page
    assert "<script>alert" not in page


async def test_calls_to_orders_are_counted_but_those_for_its_status(orders: ScriptedOrders) -> None:
    async with httpx.AsyncClient(
        transport=httpx.MockTransport(orders), base_url="https://orders.zt.example"
    ) as client:
        asked = Orders(client, seen_by_frontend)
        await asked.products()
        await asked.status()
        assert asked.calls == Calls(1, 0)
        orders.answers["GET", "/products"] = [problem(503, "x"), problem(404, "not_found")]
        for expected in (Calls(1, 1), Calls(2, 1)):
            with pytest.raises(OrdersFailure):
                await asked.products()
            assert asked.calls == expected
        orders.answers["GET", "/products"] = httpx.ConnectError("refused")
        with pytest.raises(OrdersFailure):
            await asked.products()
        assert asked.calls == replace(Calls(2, 1), failed=2)
