"""The tour: the same words on the page and in the document, and pages that exist."""

from __future__ import annotations

from pathlib import Path

from frontend.tour import PAGES, STEPS, markdown

from .conftest import Browser, text_of

DOCUMENT = Path(__file__).parents[3] / "docs" / "tour.md"


def test_the_document_has_the_words_of_the_page() -> None:
    assert DOCUMENT.read_text() == markdown()


async def test_the_page_has_every_step(browser: Browser) -> None:
    text = text_of((await browser.get("/tour")).text)
    assert len(STEPS) == 6
    for step in STEPS:
        for words in (step.title, step.do, step.see, step.why):
            assert words.replace("`", "") in text


async def test_every_page_of_the_tour_exists(browser: Browser) -> None:
    for page in {step.page for step in STEPS}:
        assert page in PAGES
        if page != "/lab":  # there without a lab, too
            assert (await browser.get(page)).status_code == 200, page
    assert 'href="/lab' not in (await browser.get("/tour")).text
