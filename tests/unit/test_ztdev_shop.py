"""Ordering through the page as a person does, against a page that behaves, and pages that do not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

import pytest

from ztdev.shop import NotPlaced, Visitor, order_form, parse_items

PAGE = """
<form action="/search"><input name="q"></form>
<form class="goods" method="post" action="/orders">
  <input type="hidden" name="csrf" value="a&amp;b"><input type="hidden" name="key" value="k-1">
  <input name="quantity.bell" type="number" value="0"><input name="quantity.mug" type="number" value="0">
</form>
"""

ORDER: dict[str, Any] = {"order": {"id": "1", "status": "paid"}, "links": [], "databases": []}


class Page:
    """A page whose answers a test can change. `posted` is what its form was sent with."""

    def __init__(self) -> None:
        self.posted: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.home = PAGE
        self.answer: tuple[int, dict[str, str], str] = (303, {"Location": "/orders/1"}, "")


@contextmanager
def _serving(page: Page) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._send(200, {"Content-Type": "text/html", "Set-Cookie": "c=1"}, page.home)
            elif self.path == "/orders/1":
                self._send(200, {"Content-Type": "application/json"}, json.dumps(ORDER))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            page.posted.append(dict(parse_qsl(body)))
            page.headers.append({name.lower(): value for name, value in self.headers.items()})
            self._send(*page.answer)

        def _send(self, status: int, headers: dict[str, str], body: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def page() -> Page:
    return Page()


@pytest.fixture
def visitor(page: Page) -> Iterator[Visitor]:
    with _serving(page) as url, Visitor(url, timeout=5) as visitor:
        yield visitor


def test_form_is_sent_back_with_its_hidden_fields_cookie_and_origin(page: Page, visitor: Visitor) -> None:
    assert visitor.order({"mug": 2}) == ORDER
    assert page.posted == [{"csrf": "a&b", "key": "k-1", "quantity.bell": "0", "quantity.mug": "2"}]
    assert page.headers[0]["cookie"] == "c=1"
    assert page.headers[0]["origin"] == visitor.url


def test_without_a_wish_one_of_the_first_thing_is_ordered(page: Page, visitor: Visitor) -> None:
    visitor.order()
    assert page.posted[0]["quantity.bell"] == "1"
    assert page.posted[0]["quantity.mug"] == "0"


def test_what_is_not_on_the_page_is_not_sent(page: Page, visitor: Visitor) -> None:
    with pytest.raises(NotPlaced, match=r"There is no teapot\. One can order: bell, mug"):
        visitor.order({"teapot": 1})
    assert page.posted == []


def test_refusal_is_told_with_its_reason(page: Page, visitor: Visitor) -> None:
    document = {"reason": "csrf_failed", "title": "This form was refused", "detail": "It is old."}
    page.answer = (403, {"Content-Type": "application/problem+json"}, json.dumps(document))
    with pytest.raises(NotPlaced, match=r"HTTP 403.*csrf_failed: This form was refused: It is old") as raised:
        visitor.order()
    assert raised.value.reason == "csrf_failed"


@pytest.mark.parametrize("location", ["", "http://192.0.2.1/orders/1", "//192.0.2.1/orders/1"])
def test_redirection_elsewhere_is_no_order(page: Page, visitor: Visitor, location: str) -> None:
    page.answer = (303, {"Location": location}, "")
    with pytest.raises(NotPlaced, match="was not placed"):
        visitor.order()


def test_page_without_a_form_is_told(page: Page, visitor: Visitor) -> None:
    page.home = "<p>closed</p>"
    with pytest.raises(NotPlaced, match="holds no order form"):
        visitor.order()


def test_page_that_does_not_answer_is_told() -> None:
    with Visitor("http://127.0.0.1:1") as visitor, pytest.raises(NotPlaced, match="Is the stack up"):
        visitor.order()


def test_form_that_does_not_post_is_not_the_order_form() -> None:
    assert order_form(PAGE.replace('method="post"', "")) is None


def test_items_are_read() -> None:
    assert parse_items(["mug=2", "bell=99"]) == {"mug": 2, "bell": 99}
    assert parse_items([]) == {}


@pytest.mark.parametrize("words", [["mug"], ["mug=0"], ["mug=100"], ["=1"], ["mug=1.5"], ["mug=1", "mug=2"]])
def test_items_that_cannot_be_meant_are_refused(words: list[str]) -> None:
    with pytest.raises(NotPlaced):
        parse_items(words)
