"""The attack lab and the pillars in a browser, on the running stack: pressed by a person, and refused."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.attacks.catalogue import load_attacks
from tests.attacks.controls import load_controls
from tests.browser.conftest import OpenPage
from tests.browser.shop import assert_accessible, assert_no_sideways_scroll
from ztdev.stack import BackgroundStack

WITHIN = 60_000  # milliseconds: an attack starts processes of its own
ATTACKS = load_attacks()


def press(page: Page, stack: BackgroundStack, attack: str) -> None:
    page.goto(f"{stack.urls.page}/lab")
    page.locator(f'[data-attack="{attack}"] button').click()


@pytest.mark.parametrize("width", [360, 1600])
def test_press_an_attack_and_watch_it_stop(stack: BackgroundStack, open_page: OpenPage, width: int) -> None:
    page = open_page(width=width)
    press(page, stack, "rogue-workload")
    caption = page.locator("[data-caption]")
    expect(caption).to_have_text(
        "Refused by route-policy: caller_not_allowed. Without this control it succeeds.", timeout=WITHIN
    )
    expect(page.locator('[data-at="payments"]')).to_have_class(re.compile(r"\bheld\b"))
    shown = page.locator("[data-lab] .evidence")
    expect(shown.locator('[data-fact="peer"]')).to_have_text("spiffe://zt.example/ns/zt-demo/sa/rogue")
    expect(shown.locator('[data-fact="line"]')).to_contain_text('"decision": "deny"')
    expect(shown.locator('[data-fact="ablation"]')).to_have_text("it succeeds: 201")
    row = page.locator('[data-attack="rogue-workload"]')
    expect(row.locator("[data-verdict]")).to_have_text("refused: caller_not_allowed")
    row.get_by_text("Evidence").click()
    expect(row.locator('[data-fact="seen"]')).to_have_text("403 caller_not_allowed")
    assert_no_sideways_scroll(page)

    page.reload()  # what was proved is there without having been watched
    expect(row.locator("[data-verdict]")).to_have_text("refused: caller_not_allowed")


def test_run_all_goes_on_until_it_is_stopped(stack: BackgroundStack, page: Page) -> None:
    page.goto(f"{stack.urls.page}/lab")
    before = page.locator(".arm.refused").count()
    page.get_by_role("button", name=f"Run all {len(ATTACKS)}").click()
    progress = page.locator("[data-progress]")
    expect(progress).to_have_text(re.compile(r"; \d+ to go\."), timeout=WITHIN)
    expect(page.locator(".arm.waits").first).to_be_visible()
    expect(page.locator(".arm.refused")).to_have_count(before + 2, timeout=WITHIN)
    page.get_by_role("button", name="Stop after this one").click()
    expect(progress).to_have_text(
        re.compile(rf"^\d+ of {len(ATTACKS)} attacked since this stack was started, all refused\.$"),
        timeout=WITHIN,
    )
    assert page.locator(".arm.waits, .arm.runs, .arm.fault").count() == 0


def test_the_lab_without_javascript(stack: BackgroundStack, open_page: OpenPage) -> None:
    page = open_page(java_script_enabled=False)
    press(page, stack, "other-host-name")
    assert page.url.endswith("/lab#other-host-name")
    verdict = page.locator('[data-attack="other-host-name"] [data-verdict]')
    for _ in range(60):
        if verdict.inner_text().strip() == "refused: host_not_allowed":
            break
        page.wait_for_timeout(500)
        page.reload()
    expect(verdict).to_have_text("refused: host_not_allowed")


def test_the_stream_is_taken_up_again_after_the_frontend_was_away(
    stack: BackgroundStack, open_page: OpenPage
) -> None:
    page = open_page(watched=False)  # the browser complains of the connection that broke
    page.goto(f"{stack.urls.page}/lab")
    expect(page.locator("[data-progress]")).to_contain_text("attacked since")
    stack.run(stack.stack.process("frontend").restart())
    expect(page.locator(".theatre")).to_have_class(re.compile("cut-off"), timeout=WITHIN)
    stack.run(stack.stack.process("frontend").wait_ready(30))
    expect(page.locator(".theatre")).not_to_have_class(re.compile("cut-off"), timeout=WITHIN)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_every_page_of_proofs_fits_and_can_be_read(
    stack: BackgroundStack, open_page: OpenPage, width: int, scheme: str
) -> None:
    page = open_page(width=width, color_scheme=scheme)
    for path in ("/lab", "/pillars", "/lab/code/libs/ztmtls/src/ztmtls/verify.py"):
        page.goto(stack.urls.page + path)
        assert_no_sideways_scroll(page)
        assert_accessible(page)


def test_a_control_leads_to_its_code_and_to_the_attack_on_it(stack: BackgroundStack, page: Page) -> None:
    page.goto(f"{stack.urls.page}/pillars")
    assert page.locator(".control").count() == len(load_controls())
    control = page.locator("#control-route-policy")
    control.get_by_role("link", name="authz.py").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("libs/ztmtls/src/ztmtls/authz.py")
    expect(page.locator(".code")).to_contain_text("class Policy")
    page.go_back()
    control.get_by_role("link", name="Rogue workload of the same domain").click()
    assert page.url.endswith("/lab#rogue-workload")
