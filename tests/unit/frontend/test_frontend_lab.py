"""`/lab` and `/pillars`: where they exist, what they pass on, and what they say when the lab is away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from pydantic import ValidationError

from frontend.app import create_app
from frontend.lab import Lab
from frontend.orders import Orders
from frontend.settings import Settings
from frontend.streams import Streams
from tests.attacks.catalogue import load_all_attacks, load_attacks
from tests.attacks.controls import load_controls
from tests.attacks.lab import Attack, Proof, Report
from tests.attacks.lab import Lab as RunningLab
from tests.attacks.proof import write_page
from tests.attacks.runner import Runner
from tests.attacks.serve import make_app

from .conftest import Audit, Browser, ScriptedOrders, identity, seen_by_frontend, text_of

ATTACK = "rogue-workload"
ADDRESSES = [
    ("GET", "/lab"),
    ("POST", "/lab/press"),
    ("POST", "/lab/stop"),
    ("GET", "/lab/events"),
    ("GET", "/lab/code/docs/controls.yaml"),
]


async def refused(attack: Attack, lab: RunningLab, report: Report) -> Proof:
    """In the place of `prove`: what it says when all goes well."""
    return Proof(
        attack=attack.id,
        control=attack.first.control,
        reason=attack.first.reason,
        refused=True,
        audited=True,
        ablation="succeeds",
        seen="403 caller_not_allowed",
        seen_without="201",
        line={"peer_id": "spiffe://zt.example/<script>"},
    )


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "lab.sock"


@pytest.fixture
async def running(socket: Path) -> AsyncIterator[Runner]:
    """The lab on its socket; no attack is made."""
    attacks = load_attacks()
    async with Runner(RunningLab(None), attacks, refused) as runner:  # type: ignore[arg-type]
        app = web.AppRunner(make_app(runner, attacks, load_controls()), shutdown_timeout=0.1)
        await app.setup()
        await web.UnixSite(app, str(socket)).start()
        yield runner
        await app.cleanup()


@pytest.fixture
async def shop(
    orders: ScriptedOrders, audit: Audit, settings: dict[str, Any], socket: Path
) -> AsyncIterator[Browser]:
    async with opened(Settings(**settings, lab_socket=socket), orders, audit) as browser:
        yield browser


@asynccontextmanager
async def opened(settings: Settings, orders: ScriptedOrders, audit: Audit) -> AsyncIterator[Browser]:
    assert settings.lab_socket is not None
    async with (
        Lab(settings.lab_socket) as lab,
        httpx.AsyncClient(transport=httpx.MockTransport(orders), base_url=settings.orders_url) as client,
    ):
        app = create_app(
            settings,
            orders=Orders(client, seen_by_frontend),
            identity=lambda: identity("frontend"),
            audit=audit.log,
            streams=Streams(audit.log),
            lab=lab,
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as http:
            yield Browser(http)


async def press(shop: Browser, attack: str, to: str = "/lab/press", **headers: str) -> httpx.Response:
    form = await shop.form()
    origin = {"Origin": "http://localhost:8080", "Sec-Fetch-Site": "same-origin"}
    return await shop.http.post(to, data={"csrf": form["csrf"], "attack": attack}, headers=origin | headers)


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
async def test_without_a_lab_there_is_no_such_address(browser: Browser, method: str, path: str) -> None:
    assert (await browser.http.request(method, path)).status_code == 404
    assert '"/lab"' not in (await browser.get("/")).text


def test_a_lab_is_for_this_machine_only(settings: dict[str, Any], socket: Path) -> None:
    assert Settings(**settings, lab_socket="").lab_socket is None
    Settings(**settings, lab_socket=socket)
    with pytest.raises(ValidationError, match="MODE=local"):
        Settings(**settings | {"mode": "eks", "allowed_hosts": "shop.example"}, lab_socket=socket)


async def test_the_page_lists_every_attack_by_pillar(running: Runner, shop: Browser) -> None:
    page = await shop.get("/lab")
    assert page.status_code == 200
    text = text_of(page.text)
    for attack in load_attacks():
        assert attack.title.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") in text
    assert 'aria-current="page"' in page.text


async def test_a_pressed_attack_runs_and_its_proof_is_shown_escaped(
    running: Runner, shop: Browser, audit: Audit
) -> None:
    sent = await press(shop, ATTACK)
    assert (sent.status_code, sent.headers["location"]) == (303, f"/lab#{ATTACK}")
    async with asyncio.timeout(5):
        while ATTACK not in running.state()["proofs"]:
            await asyncio.sleep(0.01)
    page = (await shop.get("/lab")).text
    assert "refused: caller_not_allowed" in text_of(page)
    assert "it succeeds: 201" in text_of(page)
    assert "<script>" not in page.partition("<body>")[2]
    assert audit.lines[-1]["decision"] == "allow"


async def test_all_means_every_attack(running: Runner, shop: Browser) -> None:
    sent = await press(shop, "all", Accept="application/json")
    assert sent.status_code == 202
    async with asyncio.timeout(5):
        while len(running.state()["proofs"]) < len(load_attacks()):
            await asyncio.sleep(0.01)
    assert (await press(shop, "", to="/lab/stop")).headers["location"] == "/lab"


async def test_an_unknown_attack_is_not_found(running: Runner, shop: Browser) -> None:
    answer = await press(shop, "make-coffee", Accept="application/json")
    assert (answer.status_code, answer.json()["reason"]) == (404, "not_found")
    assert "make-coffee" in answer.json()["detail"]


@pytest.mark.parametrize("to", ["/lab/press", "/lab/stop"])
async def test_another_site_presses_nothing(running: Runner, shop: Browser, audit: Audit, to: str) -> None:
    assert (await press(shop, ATTACK, to=to)).status_code == 303
    running.state()["proofs"].clear()
    answer = await press(shop, ATTACK, to=to, **{"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403
    assert (audit.denials()[-1]["reason"], audit.denials()[-1]["path"]) == ("csrf_failed", to)


async def test_code_that_a_control_names_is_shown_and_no_other(running: Runner, shop: Browser) -> None:
    page = await shop.get("/lab/code/libs/ztmtls/src/ztmtls/verify.py")
    assert "def verify_peer" in text_of(page.text)
    others = ("README.md", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd")
    of_the_lab = (
        "..%2Fstate",
        "..%2Fevents",
        "%2e%2e%2fcatalogue",
        "x?file=../state",
        "%00",
        "%0d%0a",
        "%E2%82%AC",
    )
    async with asyncio.timeout(10):
        for file in (*others, *of_the_lab):
            assert (await shop.get(f"/lab/code/{file}")).status_code == 404


async def test_events_pass_through(running: Runner, socket: Path) -> None:
    async with Lab(socket) as lab, lab.events() as chunks:
        first = await anext(chunks)
    assert json.loads(first.decode().removeprefix("data: "))["waiting"] == []


async def test_listeners_are_bounded(
    running: Runner, shop: Browser, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frontend.streams.LIMIT", 0)
    answer = await shop.get("/lab/events", Accept="application/json")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert answer.json()["reason"] == audit.denials()[-1]["reason"] == "too_many_streams"


async def test_a_lab_that_is_away_is_said_to_be(shop: Browser) -> None:
    page = await shop.get("/lab")
    assert page.status_code == 503
    assert "The attack lab does not answer" in text_of(page.text)
    answer = await press(shop, ATTACK, Accept="application/json")
    assert (answer.status_code, answer.json()["reason"]) == (503, "dependency_unavailable")


async def test_the_pillars_without_a_record_say_how_to_get_one(browser: Browser) -> None:
    assert "make proof writes it" in text_of((await browser.get("/pillars")).text)


async def test_the_pillars_show_what_is_proved_and_what_is_not(
    orders: ScriptedOrders, audit: Audit, settings: dict[str, Any], socket: Path, tmp_path: Path
) -> None:
    proof = {
        "reason": "first_reason",
        "audited": True,
        "ok": True,
        "at": "2026-01-02T03:04:05Z",
        "further": [],
    }
    second = {"control": "served-routes", "reason": "second_reason", "line": {"status": 405}}
    proofs = {
        ATTACK: proof,
        "wrong-route": proof | {"further": [second]},
        "framed-page": proof | {"further": [second | {"reason": "told_reason", "line": {}}]},
        "older-tls": proof | {"ok": False},
        "plain-http": proof | {"ok": False},
    }
    write_page(tmp_path / "pillars.json", proofs)
    made = Settings(**settings, lab_socket=socket, proof_file=tmp_path / "pillars.json")
    async with opened(made, orders, audit) as shop:
        page = (await shop.get("/pillars")).text
    text = text_of(page)
    assert f"3 of {len(load_all_attacks())} attacks proved, last on 2026-01-02 03:04:05 UTC." in text
    first = "first_reason read back from the log. Without this control"
    assert f"{first} it succeeds." in text
    assert f"{first} served-routes stops it." in text
    left_out = (
        "With route-policy left out: second_reason read back from the log. Without this control, too, it"
    )
    assert f"{left_out} succeeds." in text
    assert "With no-framing left out: told_reason seen from outside." in text
    assert "not proved" in text
    assert "not run yet" in text
    assert 'href="/lab/code/libs/ztmtls/src/ztmtls/verify.py"' in page


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "can't be read"),
        ("{", "is not what `make proof` writes"),
        ('{"pillars": [{}]}', "pillars.0.id"),
    ],
)
def test_a_wrong_record_stops_the_start(
    settings: dict[str, Any], tmp_path: Path, content: str | None, fault: str
) -> None:
    file = tmp_path / "pillars.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValidationError, match=fault):
        Settings(**settings, proof_file=file)
