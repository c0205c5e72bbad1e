"""The pages in a real browser, with and without scripts, by mouse and by keyboard, small and large."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from playwright.sync_api import Page, Request, expect

from .conftest import OpenPage
from .shop import OrderPage, Shop, assert_accessible, assert_no_sideways_scroll, assert_whole_chain
from .small_chain import PREFIX, SmallChain

WIDTHS = [360, 768, 1280, 1600]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_ordering_shows_the_proven_chain(
    open_page: OpenPage, chain: SmallChain, width: int, scheme: str
) -> None:
    page = open_page(width=width, color_scheme=scheme)
    shop = Shop(page, chain.url).open()
    assert_no_sideways_scroll(page)
    assert_accessible(page)

    order = shop.choose(lamp=1, pencil=12).place()

    assert_whole_chain(order, PREFIX)
    assert_no_sideways_scroll(page)
    assert_accessible(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_every_other_page_fits_and_can_be_read(
    open_page: OpenPage, chain: SmallChain, width: int, scheme: str
) -> None:
    page = open_page(width=width, color_scheme=scheme)

    def look(path: str = "") -> None:
        if path:
            page.goto(chain.url + path)
        assert_no_sideways_scroll(page)
        assert_accessible(page)

    look("/status")
    look("/pillars")
    look("/nothing")
    Shop(page, chain.url).open().choose(lamp="many").button.click()
    expect(page.get_by_role("alert")).to_be_visible()
    look()
    chain.payment = "pending"
    pending = Shop(page, chain.url).open().choose(lamp=1).place()
    assert pending.status == "pending"
    look()
    chain.payment = "refused"
    Shop(page, chain.url).open().choose(lamp=1).button.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The call to payments was refused")
    look()
    chain.orders_down = True
    look("/status")
    look("/")


def test_everything_works_without_scripts(open_page: OpenPage, chain: SmallChain) -> None:
    page = open_page(java_script_enabled=False)
    shop = Shop(page, chain.url).open()
    expect(page.get_by_text("orders computes the total.")).to_be_visible()
    expect(page.locator("[data-total]")).to_be_hidden()
    assert page.locator(".step, .copy").count() == 0

    shop.choose(mug="some").button.click()
    expect(page.get_by_text("Type a whole number from 0 to 99.")).to_be_visible()
    assert shop.field("mug").input_value() == "some"

    order = shop.choose(mug=2).place()
    assert_whole_chain(order, PREFIX)
    assert re.search(r"\d+:\d\d left|\d h left|\d+ s left", page.locator(".left").first.inner_text())
    page.goto(f"{chain.url}/status")
    expect(page.get_by_role("heading", name="Identities and credentials")).to_be_visible()


def test_everything_works_by_keyboard(page: Page, chain: SmallChain) -> None:
    Shop(page, chain.url).open()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()

    page.keyboard.press("Tab")  # the link in the picture of the chain
    assert focus_is_visible(page)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Desk lamp", exact=True)).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement.parentElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.locator("[data-total] output")).to_have_text("€98.00")
    for _ in chain.products:
        page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Place the order")).to_be_focused()
    assert focus_is_visible(page)
    page.keyboard.press("Enter")

    page.wait_for_url("**/orders/*")
    assert_whole_chain(OrderPage(page), PREFIX)


def focus_is_visible(page: Page) -> bool:
    style: str = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    return style == "solid"


def test_the_total_follows_what_is_chosen(page: Page, chain: SmallChain) -> None:
    shop = Shop(page, chain.url).open()
    total = page.locator("[data-total] output")
    expect(total).to_have_text("€0.00")
    shop.choose(lamp=2, pencil=5)
    expect(total).to_have_text("€107.00")
    page.get_by_role("button", name="One Enamel mug more").click()
    expect(total).to_have_text("€119.90")
    page.get_by_role("button", name="One Desk lamp less").click()
    expect(total).to_have_text("€70.90")
    shop.choose(lamp="many")
    expect(total).to_have_text("€21.90")


def test_two_clicks_order_once(page: Page, chain: SmallChain) -> None:
    before = len(chain.placed)
    shop = Shop(page, chain.url).open().choose(lamp=1)
    shop.button.dblclick()
    page.wait_for_url("**/orders/*")
    assert len(chain.placed) == before + 1


def test_a_form_found_by_going_back_orders_nothing_new(page: Page, chain: SmallChain) -> None:
    shop = Shop(page, chain.url).open().choose(lamp=1)
    first = shop.place().order_id
    page.go_back()
    if shop.field("lamp").input_value() == "1":  # the browser kept the page, and with it the key
        before = len(chain.placed)
        assert shop.place().order_id == first
        assert len(chain.placed) == before


def test_a_failed_order_can_be_sent_again_safely(page: Page, chain: SmallChain) -> None:
    shop = Shop(page, chain.url).open().choose(lamp=1)
    chain.orders_down = True
    shop.button.click()
    expect(page.get_by_text("database_unavailable")).to_be_visible()
    expect(page.locator(".wire.bad .note")).to_have_text("failed here")
    chain.orders_down = False
    page.get_by_role("button", name="Send the order again").click()
    page.wait_for_url("**/orders/*")
    assert_whole_chain(OrderPage(page), PREFIX)


def test_after_a_restart_the_page_says_what_it_no_longer_knows(page: Page, chain: SmallChain) -> None:
    Shop(page, chain.url).open().choose(lamp=1).place()
    chain.forget_placings()
    page.reload()
    order = OrderPage(page)
    assert "its own view is gone" in order.finding
    assert [hop.verdict for hop in order.hops()] == [
        "One side\N{RIGHT SINGLE QUOTATION MARK}s view",
        "Both sides agree",
    ]
    this_call = page.get_by_role("region", name="The call that fetched this page")
    expect(this_call.get_by_text("Both sides agree")).to_be_visible()


def test_a_pending_order_shows_its_end_by_itself(page: Page, chain: SmallChain) -> None:
    chain.payment = "pending"
    order = Shop(page, chain.url).open().choose(lamp=1).place()
    assert order.heading == "Ordered. The payment is not settled yet."
    chain.placed[order.order_id]["order"]["status"] = "paid"  # as the reconciler does, behind the scenes
    expect(page.get_by_role("heading", level=1)).to_have_text("Ordered and paid.")


# --- live ------------------------------------------------------------------------------------------------


def test_a_rotation_is_seen_as_it_happens(page: Page, chain: SmallChain) -> None:
    page.clock.install()
    page.goto(f"{chain.url}/status")
    card = page.locator('[data-service="orders"]')
    before = card.get_attribute("data-serial")
    after = chain.rotate("orders")
    assert before != after
    page.clock.run_for(6000)
    expect(card).to_have_attribute("data-serial", after)
    expect(page.locator(".log li").first).to_contain_text(
        f"orders got a new certificate: {(before or '')[:8]}"
    )


def test_a_new_database_password_is_seen_as_it_is_taken_up(page: Page, chain: SmallChain) -> None:
    page.clock.install()
    page.goto(f"{chain.url}/status")
    facts = page.locator('[data-login="payments"]')
    before = chain.secret_version
    expect(facts).to_contain_text(before[:8])
    chain.secret_version = "c0ffee00-7c0e-4b5e-9d2b-3f1a8c6d4e21"
    page.clock.run_for(6000)
    expect(facts).to_contain_text("c0ffee00, made")
    expect(page.locator(".log li", has_text="payments")).to_contain_text(
        f"payments took up a new database password: {before[:8]}… → c0ffee00…"
    )


def test_the_next_rotation_counts_down_and_is_due(page: Page, chain: SmallChain) -> None:
    page.clock.install()
    page.goto(f"{chain.url}/status")
    due = page.locator('[data-login="orders"] .left').last
    expect(due).to_have_text(re.compile(r"4[0-9] s left"))
    page.clock.run_for(60_000)
    expect(due).to_have_text(re.compile(r"due 1[0-9] s ago"))


def test_the_time_left_counts_down(page: Page, chain: SmallChain) -> None:
    page.clock.install()
    Shop(page, chain.url).open()
    note = page.locator(".stop.frontend .left")
    shown = note.inner_text()
    page.clock.run_for(2000)
    expect(note).not_to_have_text(shown)


def test_the_picture_follows_the_chain(page: Page, chain: SmallChain) -> None:
    page.clock.install()
    shop = Shop(page, chain.url).open()
    expect(shop.part("orders")).to_have_class(re.compile(r"\bok\b"))
    chain.orders_down = True
    page.clock.run_for(6000)
    expect(shop.part("orders")).to_have_class(re.compile(r"\bunknown\b"))
    expect(page.locator(".live-fault")).to_contain_text("frontend → orders does not work now")
    chain.orders_down = False
    page.clock.run_for(6000)
    expect(shop.part("orders")).to_have_class(re.compile(r"\bok\b"))


def test_an_id_can_be_copied(open_page: OpenPage, chain: SmallChain) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto(f"{chain.url}/status")
    page.get_by_role("button", name=f"Copy {PREFIX}payments").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == PREFIX + "payments"


# --- for those who hear the page -------------------------------------------------------------------------


def test_the_page_reads_in_order(page: Page, chain: SmallChain) -> None:
    Shop(page, chain.url).open().choose(lamp=1).place()
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    levels = [
        int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    table = page.get_by_role("table", name="What orders and payments each saw of this call")
    expect(table.get_by_role("columnheader")).to_have_text(
        ["orders\N{RIGHT SINGLE QUOTATION MARK} view", "payments\N{RIGHT SINGLE QUOTATION MARK} view"]
    )
    assert page.locator("ol.chain > li").count() == 9
    assert page.locator(".left[aria-live=off]").count() == page.locator(".left").count()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, a[href], input:not([type=hidden])')]"
        ".filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_motion_stops_for_those_who_ask(open_page: OpenPage, chain: SmallChain) -> None:
    page = open_page(reduced_motion="reduce")
    Shop(page, chain.url).open()
    moving = page.evaluate(
        "[...document.querySelectorAll('*')]"
        ".filter(e => getComputedStyle(e).transitionDuration !== '0s').length"
    )
    assert moving == 0
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_paper_shows_the_proof_without_the_frame(page: Page, chain: SmallChain) -> None:
    Shop(page, chain.url).open().choose(lamp=1).place()
    page.emulate_media(media="print")
    expect(page.get_by_role("banner")).to_be_hidden()
    expect(page.locator(".copy").first).to_be_hidden()
    expect(page.locator(".hop .card").nth(1)).to_be_visible()


@contextmanager
def other_site(body: str) -> Iterator[str]:
    """A site of somebody else's on this machine, with one page."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f"<!doctype html><link rel=icon href=data:,>{body}".encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


# --- the door, by a real browser ------------------------------------------------------------------------


def test_the_browser_names_the_page_a_form_comes_from(page: Page, chain: SmallChain) -> None:
    sent: list[Request] = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    Shop(page, chain.url).open().choose(lamp=1).place()
    headers = sent[0].all_headers()
    assert headers["origin"] == chain.url
    assert headers["sec-fetch-site"] == "same-origin"


def test_a_form_on_another_site_orders_nothing(page: Page, chain: SmallChain) -> None:
    Shop(page, chain.url).open().choose(lamp=1).place()  # this browser has the cookie, and may order
    before = len(chain.placed)
    form = f"""<form method="post" action="{chain.url}/orders">
      <input name="quantity.lamp" value="99"><input name="key" value="stolen">
      <input name="csrf" value="guess"><button>Win a prize</button></form>"""
    with other_site(form) as address:
        page.goto(address)
        page.get_by_role("button").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("This form was refused")
    expect(page.get_by_text("csrf_failed")).to_be_visible()
    assert len(chain.placed) == before


def test_the_pages_cannot_be_framed(open_page: OpenPage, chain: SmallChain) -> None:
    page = open_page(watched=False)
    Shop(page, chain.url).open()
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    with (
        other_site(f'<iframe src="{chain.url}/"></iframe>') as address,
        page.expect_console_message(lambda message: "frame-ancestors" in message.text),
    ):
        page.goto(address)
    expect(page.frame_locator("iframe").get_by_role("heading", level=1)).to_have_count(0)


def test_a_script_that_got_into_a_page_would_not_run(open_page: OpenPage, chain: SmallChain) -> None:
    page = open_page(watched=False)
    Shop(page, chain.url).open()
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate(
            """() => {
              const script = document.createElement("script");
              script.textContent = "document.title = 'taken'";
              document.body.append(script);
            }"""
        )
    assert page.title() == "Order \N{MIDDLE DOT} Zero Trust on EKS"
