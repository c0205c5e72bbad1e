"""The chain of an order as text: calls nest, both sides are compared, databases name their secret."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from ztdev.chain import chain_tree, money

AT = datetime(2026, 1, 2, 3, 4, 0, tzinfo=UTC)


def _certificate(name: str, serial: str) -> dict[str, Any]:
    return {
        "id": f"spiffe://zt.example/{name}",
        "serial": serial,
        "not_after": "2026-01-02T03:04:42Z",
    }


def _view(side: str, own: dict[str, Any], peer: dict[str, Any], rule: str | None) -> dict[str, Any]:
    return {"side": side, "own": own, "peer": peer, "tls_version": "TLSv1.3", "cipher": "C", "rule": rule}


def _link(caller: str, callee: str) -> dict[str, Any]:
    near, far = _certificate(caller, f"1{caller[0]}"), _certificate(callee, f"2{callee[0]}")
    return {
        "from": caller,
        "to": callee,
        "method": "POST",
        "path": f"/{callee}",
        "duration_ms": 12.34,
        "seen_by_caller": _view("caller", near, far, None),
        "seen_by_callee": _view("callee", far, near, f"{caller}-calls"),
    }


DOCUMENT: dict[str, Any] = {
    "order": {
        "id": "o-1",
        "status": "paid",
        "total": 2450,
        "currency": "EUR",
        "items": [{"quantity": 2, "name": "Bell"}],
    },
    "links": [_link("frontend", "orders"), _link("orders", "payments")],
    "databases": [
        {
            "service": "payments",
            "database": "payments",
            "user": "payments_app",
            "secret_id": "zt-demo/payments/db",
            "secret_version": "v-7",
            "tls_version": "TLSv1.3",
            "tls_cipher": "C",
        }
    ],
}


def shown(document: dict[str, Any]) -> str:
    output = io.StringIO()
    console = Console(file=output, width=200, color_system=None)
    console.print(chain_tree(document, AT), soft_wrap=True)
    return output.getvalue()


@pytest.fixture
def document() -> dict[str, Any]:
    # Not deepcopy, which would keep what two views share shared.
    copied = json.loads(json.dumps(DOCUMENT))
    assert isinstance(copied, dict)
    return copied


def test_calls_nest_and_tell_who_rule_time_and_secret(document: dict[str, Any]) -> None:
    text = shown(document)
    lines = text.splitlines()
    assert "o-1  paid  24.50 EUR  (2 x Bell)" in lines[0]
    outer = next(line for line in lines if "frontend → orders" in line)
    inner = next(line for line in lines if "orders → payments" in line)
    assert inner.index("orders →") > outer.index("frontend →")
    assert "12.3 ms" in outer
    assert "serial 1f, valid until 2026-01-02T03:04:42Z (in 42 s)" in text
    assert text.count("both sides agree") == 4
    assert "allowed by rule frontend-calls" in text
    assert "user payments_app  secret zt-demo/payments/db version v-7" in text


def test_difference_between_the_sides_is_shouted_with_both_views(document: dict[str, Any]) -> None:
    document["links"][1]["seen_by_callee"]["peer"]["serial"] = "bad"
    text = shown(document)
    assert "THE SIDES DIFFER" in text
    assert "holder: serial 1o" in text
    assert "other side: serial bad" in text


@pytest.mark.parametrize("side", ["seen_by_caller", "seen_by_callee"])
def test_one_silent_side_is_said(document: dict[str, Any], side: str) -> None:
    document["links"][0][side] = None
    text = shown(document)
    assert "told by its holder only" in text
    assert "told by the other side only" in text


def test_order_without_evidence_is_still_shown(document: dict[str, Any]) -> None:
    document["links"] = []
    text = shown(document)
    assert "o-1" in text
    assert "database payments" in text


def test_markup_in_what_services_say_stays_text(document: dict[str, Any]) -> None:
    document["order"]["items"][0]["name"] = "[red]Bell[/]"
    assert "[red]Bell[/]" in shown(document)


def test_money_is_written_in_major_units() -> None:
    assert money(5, "EUR") == "0.05 EUR"
    assert money(123456, "EUR") == "1234.56 EUR"
