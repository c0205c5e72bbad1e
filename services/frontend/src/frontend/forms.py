"""The order form: what a person typed, and what is wrong with it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .models import FieldError, Product

QUANTITY = "quantity."
"""Form fields are named ``quantity.<sku>``."""
KEY = "key"
MAX_QUANTITY = 99
MAX_ITEMS = 20

_KEY = re.compile(r"[A-Za-z0-9._~-]{1,128}")
_ITEM_FIELD = re.compile(r"items\[(\d+)\]")


def new_key() -> str:
    """An idempotency key: one per rendered form, so that the form orders once however often it is sent."""
    return secrets.token_urlsafe(24)


@dataclass(slots=True)
class OrderForm:
    """A filled-in form. `errors` holds messages by SKU, `fault` one that concerns the whole form."""

    key: str = field(default_factory=new_key)
    typed: dict[str, str] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    fault: str = ""

    @property
    def valid(self) -> bool:
        """True when there is something to order and nothing wrong."""
        return not self.errors and not self.fault

    @classmethod
    def read(cls, fields: Iterable[tuple[str, str]]) -> OrderForm:
        """Read what a browser sent. Never raises: faults are kept to be shown beside what was typed."""
        form = cls(key="")
        for name, value in fields:
            if name == KEY:
                form.key = value
            elif name.startswith(QUANTITY):
                form._take(name.removeprefix(QUANTITY), value.strip())
        if not _KEY.fullmatch(form.key):
            form.key = new_key()
            form.fault = "This form was not complete. Look it over and send it again."
        elif len(form.items) > MAX_ITEMS:
            form.fault = f"One order takes at most {MAX_ITEMS} different goods."
        elif not form.items and not form.errors:
            form.fault = "Choose at least one thing: every quantity is 0."
        return form

    def _take(self, sku: str, text: str) -> None:
        self.typed[sku] = text
        if not text:
            return
        if not (text.isascii() and text.isdecimal()):
            self.errors[sku] = f"Type a whole number from 0 to {MAX_QUANTITY}."
        elif len(text) > 4 or int(text) > MAX_QUANTITY:
            self.errors[sku] = f"At most {MAX_QUANTITY} in one order."
        elif int(text) > 0:
            self.items[sku] = int(text)

    def refuse(self, errors: Sequence[FieldError], detail: str) -> None:
        """Put what orders found wrong beside the fields it means; the rest above the form."""
        skus = list(self.items)
        rest = []
        for error in errors:
            found = _ITEM_FIELD.match(error.field)
            if found and int(found[1]) < len(skus):
                self.errors[skus[int(found[1])]] = error.message
            else:
                rest.append(f"{error.field}: {error.message}")
        if rest or not errors:
            self.fault = "; ".join(rest) or detail or "orders did not accept this."

    def renew(self, fault: str) -> None:
        """Make it a new form with the same quantities."""
        self.key = new_key()
        self.fault = fault

    def total(self, products: Iterable[Product]) -> int:
        """What the chosen goods cost, in minor units."""
        prices: Mapping[str, int] = {product.sku: product.price for product in products}
        return sum(prices.get(sku, 0) * quantity for sku, quantity in self.items.items())
