"""Chromium, driven by Playwright. Every page is watched: script errors and policy violations fail a test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from .small_chain import SECRET_VERSION, SmallChain

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")

# A refusal is an answer, not a fault of the page: the browser logs its status all the same.
EXPECTED = "Failed to load resource: the server responded with a status of"

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser for a module. Without one its tests are skipped, but under CI they fail."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"no browser: none of {', '.join(NAMES)} is installed and CHROMIUM names none"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """Open a page; keywords are those of a Playwright browser context, with `width` for short.

    With ``watched=False`` what the page complains of is the test's own business.
    """
    contexts, complaints = [], []

    def complain(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(EXPECTED):
            complaints.append(message.text)

    def opened(width: int = 1280, watched: bool = True, **options: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        if watched:
            page.on("console", complain)
            page.on("pageerror", lambda error: complaints.append(str(error)))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """One page, as most people see it."""
    return open_page()


@pytest.fixture(scope="module")
def _small_chain() -> Iterator[SmallChain]:
    with SmallChain() as chain:
        yield chain


@pytest.fixture
def chain(_small_chain: SmallChain) -> Iterator[SmallChain]:
    """The frontend over a small chain, back in order after each test."""
    yield _small_chain
    _small_chain.payment = "paid"
    _small_chain.orders_down = False
    _small_chain.secret_version = SECRET_VERSION
