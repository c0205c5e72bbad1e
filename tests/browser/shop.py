"""The pages as a person uses them: nothing here knows more than what can be seen and clicked."""

from __future__ import annotations

from dataclasses import dataclass

from axe_playwright_python.sync_playwright import Axe
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


def assert_accessible(page: Page) -> None:
    """axe-core finds nothing serious: contrast, names, roles, structure (WCAG 2.2 AA and good practice).

    Once the page stands still: half-way through a change of colour nothing contrasts as it should.
    """
    page.evaluate("Promise.all(document.getAnimations().map((each) => each.finished.catch(() => {})))")
    violations = Axe().run(page).response["violations"]
    found = [
        f"{each['impact']}: {each['id']}: {each['help']}: {node['html'][:120]}"
        for each in violations
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert not found, "\n".join(found)
