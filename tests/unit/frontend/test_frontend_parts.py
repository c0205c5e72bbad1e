"""The small parts: settings, formats, comparing views, keeping placings, readiness."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from pydantic import ValidationError

from frontend import formats
from frontend.evidence import Hop, Placings, Verdict, chain_of
from frontend.forms import OrderForm
from frontend.guidance import guidance
from frontend.models import Link, PlacedOrder
from frontend.orders import Orders
from frontend.settings import Settings
from frontend.status import Fault, Health, IdentityReport, overview
from ztmtls.reasons import Reason

from .conftest import ScriptedOrders, identity, placed, problem, seen_by_frontend, view

# --- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"mode": "production"}, "'local' or 'eks'"),
        ({"orders_url": "http://orders:8443"}, "https://"),
        ({"orders_url": "https://orders:8443/api"}, "nothing after it"),
        ({"orders_url": "https://user:pw@orders:8443"}, "nothing after it"),
        ({"orders_spiffe_id": "orders"}, "spiffe://"),
        ({"orders_spiffe_id": "spiffe://zt.example"}, "path"),
        ({"mode": "eks"}, "name the host"),
        ({"allowed_hosts": "*"}, "not patterns"),
        ({"max_body_bytes": 10}, "1024"),
        ({"csrf_key_file": "/nowhere/key"}, "can't be read"),
    ],
)
def test_a_wrong_setting_stops_the_start(
    settings: dict[str, Any], changes: dict[str, Any], fault: str
) -> None:
    assert Settings(**settings)
    with pytest.raises(ValidationError, match=fault):
        Settings(**settings | changes)


def test_a_short_signing_key_is_refused(settings: dict[str, Any], key_file: Path) -> None:
    assert Settings(**settings, csrf_key_file=key_file).csrf_key() == b"k" * 32
    key_file.write_bytes(b"short")
    with pytest.raises(ValidationError, match="at least 32"):
        Settings(**settings, csrf_key_file=key_file)


def test_hosts_come_from_one_variable(settings: dict[str, Any]) -> None:
    assert Settings(**settings).allowed_hosts == ("localhost", "127.0.0.1", "[::1]")
    given = Settings(**settings | {"mode": "eks", "allowed_hosts": "Shop.example, www.shop.example"})
    assert given.allowed_hosts == ("shop.example", "www.shop.example")


def test_the_signing_key_is_new_in_each_process(settings: dict[str, Any]) -> None:
    assert Settings(**settings).csrf_key() != Settings(**settings).csrf_key()


def test_the_command_names_its_settings_and_its_faults() -> None:
    environ = {"PATH": os.environ["PATH"]}
    told = subprocess.run(
        [sys.executable, "-m", "frontend", "--help"], capture_output=True, text=True, env=environ, check=True
    )
    for name in Settings.model_fields:
        assert name.upper() in told.stdout
    refused = subprocess.run([sys.executable, "-m", "frontend"], capture_output=True, text=True, env=environ)
    assert refused.returncode == 78
    assert "ORDERS_URL: is not set" in refused.stderr
    assert "Traceback" not in refused.stderr


# --- formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minor", "currency", "text"),
    [
        (0, "EUR", "€0.00"),
        (5, "EUR", "€0.05"),
        (123456, "EUR", "€1,234.56"),
        (-1, "EUR", "-€0.01"),
        (100, "CHF", "1.00 CHF"),
    ],
)
def test_money(minor: int, currency: str, text: str) -> None:
    assert formats.money(minor, currency) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1:00"),
        (200, "3:20"),
        (3599, "59:59"),
        (7200, "2 h"),
        (200000, "2 d"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert formats.span(seconds) == text


def test_what_is_left() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert formats.left(now + timedelta(seconds=48), now) == "48 s left"
    assert formats.left(now - timedelta(seconds=200), now) == "ended 3:20 ago"


def test_an_id_breaks_after_its_slashes() -> None:
    text = formats.spiffe("spiffe://zt.example/a/b")
    assert text == (
        '<span class="seg">spiffe://</span><span class="seg">zt.example/</span>'
        '<span class="seg">a/</span><span class="seg">b</span>'
    )


def test_a_figure_stands_for_one_serial_number() -> None:
    assert formats.glyph("ab") == formats.glyph("ab")
    assert len({formats.glyph(f"{number:040x}") for number in range(200)}) == 200


def test_every_reason_has_something_to_say() -> None:
    for reason in Reason:
        assert all(guidance(reason))
    assert guidance("something else").meaning


# --- evidence --------------------------------------------------------------------------------------------


def link(caller: dict[str, Any] | None, callee: dict[str, Any] | None) -> Link:
    return Link.model_validate(
        {"from": "orders", "to": "payments", "method": "POST", "path": "/payments"}
        | {"seen_by_caller": caller, "seen_by_callee": callee}
    )


NEAR, FAR = view("caller", "orders", "payments"), view("callee", "payments", "orders")


@pytest.mark.parametrize(
    ("near", "far", "verdict"),
    [
        (NEAR, FAR, Verdict.AGREE),
        (NEAR, None, Verdict.ONE_SIDED),
        (None, FAR, Verdict.ONE_SIDED),
        (None, None, Verdict.ABSENT),
        (NEAR, FAR | {"tls_version": "TLSv1.2"}, Verdict.DIFFER),
        (NEAR, FAR | {"cipher": "other"}, Verdict.DIFFER),
        (NEAR, FAR | {"own": {**FAR["own"], "serial": "00"}}, Verdict.DIFFER),
        (NEAR, FAR | {"own": {**FAR["own"], "id": "spiffe://zt.example/other"}}, Verdict.DIFFER),
        (NEAR, FAR | {"peer": {**FAR["peer"], "serial": "00"}}, Verdict.DIFFER),
        (NEAR, FAR | {"peer": {**FAR["peer"], "not_after": "2031-01-01T00:00:00Z"}}, Verdict.DIFFER),
        (NEAR, FAR | {"peer": {**FAR["peer"], "authority": "known to one side only"}}, Verdict.AGREE),
        (NEAR, FAR | {"generation": 9, "connection": "c-other"}, Verdict.AGREE),
    ],
)
def test_two_views_are_compared_in_all_they_both_say(
    near: dict[str, Any] | None, far: dict[str, Any] | None, verdict: Verdict
) -> None:
    assert Hop(link(near, far)).verdict is verdict


def test_our_own_view_completes_the_first_hop_only() -> None:
    stored = PlacedOrder.model_validate(placed())
    assert chain_of(stored, None).verdict is Verdict.ONE_SIDED
    own = Link.model_validate(placed()["links"][0] | {"seen_by_caller": view("caller", "frontend", "orders")})
    chain = chain_of(stored, own)
    assert chain.verdict is Verdict.AGREE
    assert chain.links[1] == stored.links[1]
    assert chain.database_of("orders") == stored.databases[0]


def test_a_chain_without_links_proves_nothing() -> None:
    stored = PlacedOrder.model_validate(placed() | {"links": []})
    assert chain_of(stored, None).verdict is Verdict.ABSENT


def test_placings_are_bounded_and_the_first_stays() -> None:
    placings, first = Placings(limit=3), uuid4()
    kept = link(NEAR, FAR)
    placings.keep(first, kept)
    placings.keep(first, link(None, None))
    assert placings.of(first) is kept
    for _ in range(3):
        placings.keep(uuid4(), kept)
    assert len(placings) == 3
    assert placings.of(first) is None
    assert placings.of(UUID(int=0)) is None


def test_a_form_adds_up() -> None:
    form = OrderForm.read([("key", "k"), ("quantity.a", " 2 "), ("quantity.b", ""), ("other", "x")])
    assert form.valid
    assert form.items == {"a": 2}


# --- the chain now ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "health"),
    [("serving", "ok"), ("degraded", "warn"), ("expired", "bad"), ("denied", "bad"), ("closed", "bad")],
)
def test_the_health_of_an_identity(state: str, health: str) -> None:
    assert IdentityReport.model_validate(identity("orders", state=state)).health == health


def test_without_orders_the_rest_is_unknown() -> None:
    own = IdentityReport.model_validate(identity("frontend"))
    seen = overview(datetime.now(UTC), own, Fault("dependency_unavailable"))
    assert seen.to_orders.health is Health.BAD
    assert seen.to_payments.health is Health.UNKNOWN
    assert seen.databases is Health.UNKNOWN


# --- readiness -------------------------------------------------------------------------------------------


async def test_readiness_asks_orders_only_when_it_was_quiet(orders: ScriptedOrders) -> None:
    async with httpx.AsyncClient(transport=httpx.MockTransport(orders), base_url="https://orders") as client:
        service = Orders(client, seen_by_frontend)
        assert await service.answered_recently() is None
        assert await service.answered_recently() is None
        assert len(orders.requests) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (httpx.ConnectError("refused"), "dependency_unavailable"),
        (problem(503, "database_unavailable"), "database_unavailable"),
        (problem(403, "caller_not_allowed"), "caller_not_allowed"),
    ],
)
async def test_readiness_says_why_not(orders: ScriptedOrders, answer: Any, reason: str) -> None:
    orders.answers["GET", "/products"] = answer
    async with httpx.AsyncClient(transport=httpx.MockTransport(orders), base_url="https://orders") as client:
        assert await Orders(client, seen_by_frontend).answered_recently() == reason


def test_the_readme_names_every_setting() -> None:
    readme = (Path(__file__).parents[3] / "services" / "frontend" / "README.md").read_text()
    for name in Settings.model_fields:
        assert f"`{name.upper()}`" in readme, name
