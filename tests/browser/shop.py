"""The pages as a person uses them: nothing here knows more than what can be seen and clicked."""

from __future__ import annotations

from dataclasses import dataclass

from playwright.sync_api import Locator, Page


class Shop:
    """The order page at `url`."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url

    def open(self) -> Shop:
        """Go there."""
        self.page.goto(self.url)
        return self

    def goods(self) -> list[str]:
        """The names of what is on offer."""
        return self.page.locator(".row label").all_inner_texts()

    def choose(self, **quantities: int | str) -> Shop:
        """Type quantities, by SKU."""
        for sku, quantity in quantities.items():
            self.field(sku).fill(str(quantity))
        return self

    def choose_first(self, quantity: int = 1) -> Shop:
        """Type a quantity of whatever stands first."""
        self.page.locator('.row input[name^="quantity."]').first.fill(str(quantity))
        return self

    def field(self, sku: str) -> Locator:
        """The quantity of one thing."""
        return self.page.locator(f'input[name="quantity.{sku}"]')

    @property
    def button(self) -> Locator:
        """The one that places the order."""
        return self.page.get_by_role("button", name="Place the order")

    def place(self) -> OrderPage:
        """Press it, and wait for the order's page."""
        self.button.click()
        self.page.wait_for_url("**/orders/*")
        return OrderPage(self.page)

    def part(self, name: str) -> Locator:
        """One part of the live picture of the chain."""
        return self.page.locator(f".line .stop.{name}")


@dataclass(frozen=True)
class HopCard:
    """What the card of one hop says."""

    title: str
    verdict: str
    ids: list[str]
    serials: list[str]
    text: str


class OrderPage:
    """The page of one order."""

    def __init__(self, page: Page) -> None:
        self.page = page

    @property
    def order_id(self) -> str:
        """The order's id, from the address."""
        return self.page.url.rpartition("/")[2]

    @property
    def status(self) -> str:
        """paid, pending or declined."""
        return self.page.locator(".crumb .badge").inner_text()

    @property
    def heading(self) -> str:
        """The first thing read."""
        return self.page.get_by_role("heading", level=1).inner_text()

    @property
    def finding(self) -> str:
        """What comparing all views came to."""
        return self.page.locator(".finding").first.inner_text().strip()

    def nodes(self) -> list[str]:
        """The chain, from the browser on."""
        return self.page.locator(".chain > .node .name").all_inner_texts()

    def hops(self) -> list[HopCard]:
        """Every mutually authenticated hop of the chain."""
        cards = self.page.locator(".chain > .hop:not(.door) .card")
        return [read_hop(cards.nth(index)) for index in range(cards.count())]

    def databases(self) -> list[str]:
        """What is said of each database."""
        return self.page.locator(".chain > .base dl").all_inner_texts()


def read_hop(card: Locator) -> HopCard:
    """Read one hop card."""
    return HopCard(
        title=card.get_attribute("aria-label") or "",
        verdict=card.locator(".verdict").inner_text().strip(),
        ids=[text.strip() for text in card.locator(".id").all_text_contents()],
        serials=[
            text.removeprefix("Serial number ") for text in card.locator(".serial code").all_text_contents()
        ],
        text=card.inner_text(),
    )


def assert_whole_chain(order: OrderPage, prefix: str) -> None:
    """The chain of a paid order, proven on every hop. `prefix` is what all SPIFFE IDs begin with."""
    assert order.status == "paid"
    assert order.nodes() == ["browser", "frontend", "orders", "payments"]
    assert order.finding == "On every hop both sides saw the same two identities."
    first, second = order.hops()
    for hop, caller, callee in ((first, "frontend", "orders"), (second, "orders", "payments")):
        assert hop.verdict == "Both sides agree"
        assert hop.ids == [prefix + caller] * 2 + [prefix + callee] * 2
        assert hop.serials[0] == hop.serials[1] != hop.serials[2] == hop.serials[3]
        assert "TLSv1.3" in hop.text
        assert "Allowed by rule" in hop.text
    databases = order.databases()
    for service, text in zip(("orders", "payments"), databases, strict=True):
        assert f"{service}_app" in text
        assert f"zt-demo/{service}/db" in text.replace("\n", "")
        assert "TLSv1.3" in text


def assert_no_sideways_scroll(page: Page) -> None:
    """Nothing is wider than the window."""
    wide: list[str] = page.evaluate(
        """() => document.documentElement.scrollWidth <= document.documentElement.clientWidth ? [] :
          [...document.querySelectorAll("body *")]
            .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
            .map((element) => element.tagName + "." + element.className)"""
    )
    assert not wide, wide


CONTRAST = """
() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (...colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => {
      const c = value / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faults = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest(".vh, .skip, svg")) continue;
    const backgrounds = [];
    for (let at = element; at; at = at.parentElement) {
      backgrounds.unshift(getComputedStyle(at).backgroundColor);
    }
    const style = getComputedStyle(element);
    const ground = paint("white", ...backgrounds);
    const ink = paint("white", ...backgrounds, style.color);
    const [light, dark] = [luminance(ground), luminance(ink)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) faults.push(`${ratio.toFixed(2)} ${node.textContent.trim().slice(0, 40)}`);
  }
  return faults;
}
"""


def assert_readable(page: Page) -> None:
    """All text contrasts with its ground as WCAG 2.2 level AA asks (1.4.3)."""
    faint: list[str] = page.evaluate(CONTRAST)
    assert not faint, faint
