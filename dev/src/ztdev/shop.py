"""Order through the page as a person does: read the form, fill it in, send it, look at the order.

A browser's part is played faithfully: the cookie is kept, the hidden fields of the form are sent back, and
the answer is a redirection to the order. Only then is the order read as JSON, the same evidence that the page
shows.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from types import TracebackType
from typing import Any, Self

import httpx

from .errors import StackError

QUANTITY = "quantity."

_ITEM = re.compile(r"(?P<sku>[^=\s]+)=(?P<quantity>[1-9][0-9]?)")


class NotPlaced(StackError):
    """The order was refused or failed. `reason` is the stable reason code when the answer held one."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


def parse_items(arguments: Iterable[str]) -> dict[str, int]:
    """`SKU=QUANTITY` words as quantities by SKU. Raises `NotPlaced` for anything else."""
    items: dict[str, int] = {}
    for argument in arguments:
        found = _ITEM.fullmatch(argument)
        if found is None:
            raise NotPlaced(f"{argument!r} is not SKU=QUANTITY with a quantity from 1 to 99, such as mug=2.")
        if found["sku"] in items:
            raise NotPlaced(f"{found['sku']} is named twice.")
        items[found["sku"]] = int(found["quantity"])
    return items


@dataclass(slots=True)
class Form:
    """An HTML form: where it goes and its fields as they stand in the page."""

    action: str
    method: str
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def skus(self) -> list[str]:
        """What can be ordered, in the order of the page."""
        return [name.removeprefix(QUANTITY) for name in self.fields if name.startswith(QUANTITY)]


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self._open: Form | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._open = Form(values.get("action", ""), values.get("method", "get").lower())
            self.forms.append(self._open)
        elif tag == "input" and self._open is not None and values.get("name"):
            self._open.fields[values["name"]] = values.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._open = None


def order_form(html: str) -> Form | None:
    """The form of a page by which one orders."""
    parser = _Forms()
    parser.feed(html)
    return next((form for form in parser.forms if form.method == "post" and form.skus), None)


class Visitor:
    """A person with a browser at `url`."""

    def __init__(self, url: str, *, timeout: float = 30.0, tls: ssl.SSLContext | None = None) -> None:
        self.url = url.rstrip("/")
        verify = True if tls is None else tls
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def order(self, items: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Place an order (by default one of the first thing on the page) and read it: `order`, `links` and
        `databases`. Raises `NotPlaced`."""
        try:
            return self.read(self.place(items))
        except httpx.HTTPError as error:
            raise NotPlaced(
                f"No answer from {self.url} ({type(error).__name__}). Is the stack up? See `ztdev status`."
            ) from error

    def place(self, items: Mapping[str, int] | None = None) -> str:
        """Place an order; the answer is the path of its page."""
        page = self._http.get("/", headers={"Accept": "text/html"})
        if page.status_code != 200:
            raise self._failure("The page with the order form does not come", page)
        form = order_form(page.text)
        if form is None:
            raise NotPlaced(f"The page at {self.url} holds no order form.")
        wanted = dict(items or {form.skus[0]: 1})
        for sku in wanted:
            if sku not in form.skus:
                raise NotPlaced(f"There is no {sku}. One can order: {', '.join(form.skus)}.")
        fields = form.fields | {QUANTITY + sku: str(wanted.get(sku, 0)) for sku in form.skus}
        answer = self._http.post(
            form.action, data=fields, headers={"Origin": self.url, "Accept": "application/problem+json"}
        )
        location = answer.headers.get("location", "")
        if answer.status_code != 303 or not location.startswith("/orders/"):
            raise self._failure("The order was not placed", answer)
        return str(location)

    def read(self, path: str) -> dict[str, Any]:
        """Read an order by the path of its page."""
        answer = self._http.get(path, headers={"Accept": "application/json"})
        if answer.status_code != 200:
            raise self._failure("The order cannot be read", answer)
        data = answer.json()
        assert isinstance(data, dict)
        return data

    def status(self) -> dict[str, Any]:
        """What the page tells about every service now."""
        answer = self._http.get("/status", headers={"Accept": "application/json"})
        if answer.status_code != 200:
            raise self._failure("The status cannot be read", answer)
        data = answer.json()
        assert isinstance(data, dict)
        return data

    def _failure(self, what: str, answer: httpx.Response) -> NotPlaced:
        """The problem document of an answer (RFC 9457) as one sentence."""
        told, reason = "", None
        if "json" in answer.headers.get("content-type", ""):
            document = answer.json()
            if isinstance(document, dict):
                reason = str(document.get("reason", "")) or None
                told = ": ".join(str(document[name]) for name in ("title", "detail") if document.get(name))
        why = f" {reason}: {told}" if reason else ""
        return NotPlaced(f"{what} (HTTP {answer.status_code}).{why}", reason)
