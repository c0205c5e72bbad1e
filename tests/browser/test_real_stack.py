"""A person orders on the running stack, and reads who vouched for whom."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import OpenPage
from tests.browser.shop import Shop, assert_no_sideways_scroll, assert_whole_chain
from ztdev.stack import BackgroundStack

PREFIX = "spiffe://zt.example/ns/zt-demo/sa/"


@pytest.mark.parametrize("width", [360, 1600])
def test_order_through_the_page_and_read_the_chain(
    stack: BackgroundStack, open_page: OpenPage, width: int
) -> None:
    page = open_page(width=width)
    assert_whole_chain(Shop(page, stack.urls.page).open().choose_first(2).place(), PREFIX)
    assert_no_sideways_scroll(page)


def test_order_without_javascript(stack: BackgroundStack, open_page: OpenPage) -> None:
    page = open_page(java_script_enabled=False)
    assert_whole_chain(Shop(page, stack.urls.page).open().choose_first(1).place(), PREFIX)


def test_status_page_shows_every_service(stack: BackgroundStack, page: Page) -> None:
    page.goto(f"{stack.urls.page}/status")
    text = page.locator("main").inner_text()
    for service in ("frontend", "orders", "payments"):
        assert PREFIX + service in text
    assert "zt-demo/orders/db" in text
    assert "zt-demo/payments/db" in text
    for service in ("orders", "payments"):
        facts = page.locator(f'[data-login="{service}"]').inner_text()
        assert f"{service}_app" in facts
        assert re.search(r"\b[0-9a-f]{8}, made \d\S*( [a-z])? ago", facts)
        assert "not scheduled" in facts  # tests rotate when they like
