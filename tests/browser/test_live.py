"""The live page and the tour in a browser, on the running stack."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.shop import assert_accessible, assert_no_sideways_scroll
from ztdev.options import spiffe_id
from ztdev.stack import BackgroundStack

WITHIN = 60_000  # milliseconds

SHIFTS = """
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shifted = (window.shifted ?? 0) + entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""


def certificate(page: Page, service: str) -> Locator:
    return page.locator(f'[data-part="services"] .{service} .held-now code').first


def renew(stack: BackgroundStack, service: str) -> None:
    """A new SVID now, as the agent pushes one."""

    async def push() -> None:
        stack.stack.workload_api.workloads[service].rotate()

    stack.run(push())


def test_watch_a_rotation_while_orders_go_on(stack: BackgroundStack, page: Page) -> None:
    page.add_init_script(SHIFTS)
    page.goto(f"{stack.urls.page}/live")
    expect(page.locator("[data-link]")).to_have_text("Live.")
    page.get_by_role("button", name="Keep ordering").click()
    ordered = page.locator("[data-ordered]")
    expect(ordered).to_have_text(re.compile(r"^[3-9] placed, 0 failed\.$"), timeout=WITHIN)
    before = certificate(page, "payments").get_attribute("title")

    for service in ("frontend", "orders", "payments"):
        renew(stack, service)
    rotated = stack.run(stack.stack.rotations.rotate("payments"), timeout=60)

    expect(certificate(page, "payments")).not_to_have_attribute("title", before or "", timeout=WITHIN)
    changes = page.locator('[data-part="changes"] tbody')
    for service in ("frontend", "orders", "payments"):
        expect(changes).to_contain_text(f"{service} certificate", timeout=WITHIN)
    expect(changes).to_contain_text(rotated.after.id[:8], timeout=WITHIN)
    expect(ordered).to_have_text(re.compile(r"^\d\d placed, 0 failed\.$"), timeout=WITHIN)
    expect(page.locator('[data-number="failed"]')).to_have_text("0")
    assert "failed" in changes.inner_text()
    assert re.findall(r"(\d+) failed", changes.inner_text()) == ["0"] * changes.locator("tr").count()

    page.get_by_role("button", name="Stop ordering").click()
    assert page.evaluate("window.shifted ?? 0") < 0.01


def test_a_refusal_shows_up_with_its_reason(stack: BackgroundStack, page: Page) -> None:
    page.goto(f"{stack.urls.page}/live")
    expect(page.locator("[data-link]")).to_have_text("Live.")
    page.request.get(f"{stack.urls.page}/", headers={"Host": "elsewhere.example"})
    denials = page.locator('[data-part="denials"] tbody')
    expect(denials).to_contain_text("host_not_allowed", timeout=WITHIN)


def test_the_page_says_when_orders_is_away_and_recovers(stack: BackgroundStack, page: Page) -> None:
    page.goto(f"{stack.urls.page}/live")
    orders = page.locator('[data-part="services"] .orders')
    expect(orders).to_contain_text("serving")
    stack.run(stack.stack.process("orders").restart())
    expect(orders).to_contain_text("not heard from", timeout=WITHIN)
    expect(orders).to_contain_text(spiffe_id("orders"))  # as it was heard last
    stack.run(stack.stack.process("orders").wait_ready(30))
    expect(orders).to_contain_text("serving", timeout=WITHIN)


def test_the_stream_is_taken_up_again_after_the_frontend_was_away(
    stack: BackgroundStack, open_page: OpenPage
) -> None:
    page = open_page(watched=False)  # the browser complains of the connection that broke
    page.goto(f"{stack.urls.page}/live")
    expect(page.locator("[data-link]")).to_have_text("Live.")
    stack.run(stack.stack.process("frontend").restart())
    expect(page.locator("[data-link]")).to_have_text(
        "The frontend does not answer; asking again.", timeout=WITHIN
    )
    stack.run(stack.stack.process("frontend").wait_ready(30))
    expect(page.locator("[data-link]")).to_have_text("Live.", timeout=WITHIN)


def test_a_slow_link_shows_the_page_and_keeps_up(stack: BackgroundStack, page: Page) -> None:
    conditions = {
        "offline": False,
        "latency": 400,  # milliseconds
        "downloadThroughput": 50_000,  # bytes per second: a slow 3G
        "uploadThroughput": 50_000,
    }
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", conditions)
    page.goto(f"{stack.urls.page}/live", timeout=WITHIN)
    expect(page.locator("[data-link]")).to_have_text("Live.", timeout=WITHIN)
    before = certificate(page, "orders").get_attribute("title")
    renew(stack, "orders")
    expect(certificate(page, "orders")).not_to_have_attribute("title", before or "", timeout=WITHIN)
    page.goto(f"{stack.urls.page}/lab", timeout=WITHIN)
    expect(page.locator("[data-progress]")).to_contain_text("attacked since", timeout=WITHIN)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_live_and_tour_fit_and_can_be_read(
    stack: BackgroundStack, open_page: OpenPage, width: int, scheme: str
) -> None:
    page = open_page(width=width, color_scheme=scheme)
    for path in ("/live", "/tour"):
        page.goto(stack.urls.page + path)
        assert_no_sideways_scroll(page)
        assert_accessible(page)


@pytest.mark.parametrize("path", ["/tour", "/tour#step-3", "/lab", "/pillars"])
def test_nothing_moves_while_a_page_appears(stack: BackgroundStack, page: Page, path: str) -> None:
    page.add_init_script(SHIFTS)
    page.goto(stack.urls.page + path, wait_until="load")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("window.shifted ?? 0") < 0.01


def test_walk_the_tour_by_keyboard(stack: BackgroundStack, page: Page) -> None:
    page.goto(f"{stack.urls.page}/tour")
    steps = page.locator(".tour-step")
    assert steps.count() == 6
    titles = [steps.nth(index).locator("h2").text_content() for index in range(6)]
    for title in titles:
        expect(page.locator(".tour-step:visible h2")).to_have_text(title or "")
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    for _ in range(4):  # faster than the browser tells of a new address
        page.keyboard.press("ArrowRight", delay=0)
    expect(page.locator(".tour-step:visible h2")).to_have_text(titles[4] or "")
    page.keyboard.press("End")
    page.keyboard.press("3")
    expect(page.locator(".tour-step:visible h2")).to_have_text("Attack it")
    assert page.url.endswith("#step-3")
    with page.context.expect_page() as opened:
        page.keyboard.press("Enter")
    expect(opened.value.get_by_role("heading", level=1)).to_have_text("Attack it.")
    page.go_back()
    expect(page.locator(".tour-step:visible h2")).to_have_text("Read what is proved")


def test_the_tour_without_javascript_shows_every_step(stack: BackgroundStack, open_page: OpenPage) -> None:
    page = open_page(java_script_enabled=False)
    page.goto(f"{stack.urls.page}/tour")
    expect(page.locator(".tour-step:visible")).to_have_count(6)
