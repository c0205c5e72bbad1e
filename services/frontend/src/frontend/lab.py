"""The attack lab, which runs beside the stack: asked over a Unix socket, shown at `/lab`.

Only on a person's own machine. Without `LAB_SOCKET` none of these addresses exists, and on EKS the setting is
refused. The frontend itself can't attack anything: it passes on which attack was pressed, and shows what the
lab saw.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import httpx
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from ztmtls.audit import AuditLog
from ztmtls.reasons import Reason

from .models import Model
from .pages import Pages, wants_json
from .pillars import TITLES
from .security import Csrf
from .streams import Streams

READ = ["GET", "HEAD"]
TIMEOUT = 5.0

#: Seconds without a byte after which the lab's stream counts as broken; it gives a sign of life every ten.
SILENCE = 30.0


#: In the place of an attack's id: every attack.
EVERY = "all"


class LabUnavailable(Exception):
    """The lab does not answer. `args[0]` says why."""


class Attack(Model):
    """One attack, as the lab describes it. `target` is a part of the drawn chain."""

    id: str
    title: str
    story: str
    pillar: str
    target: str
    control: str
    reason: str
    further: tuple[str, ...]
    file: str


class Control(Model):
    """What a control promises, and the layer that it is in."""

    layer: str
    promise: str
    pillar: str


class Stop(Model):
    """How one more layer stopped an attack, where those before it were left out."""

    control: str
    reason: str
    seen: str


class Proof(Model):
    """What was seen of an attack. `seen_without` is what the attacker saw with every layer left out."""

    control: str
    reason: str
    refused: bool
    audited: bool
    ablation: str
    seen: str
    line: Mapping[str, Any]
    further: tuple[Stop, ...]
    seen_without: str
    seconds: float
    fault: str


class Running(Model):
    """The attack that is under way."""

    attack: str
    step: str


class State(Model):
    """What waits, what runs, and what was proved since the stack was started."""

    waiting: tuple[str, ...]
    running: Running | None
    proofs: Mapping[str, Proof]


class Catalogue(Model):
    """Every attack, in the order of the pillars, and every control."""

    attacks: tuple[Attack, ...]
    controls: Mapping[str, Control]

    def by_pillar(self) -> list[tuple[str, list[Attack]]]:
        """Each pillar's title with its attacks, of those that are attacked here."""
        sorted_out = [
            (title, [attack for attack in self.attacks if attack.pillar == pillar])
            for pillar, title in TITLES.items()
        ]
        return [(title, attacks) for title, attacks in sorted_out if attacks]


class Lab:
    """The lab on its socket; an async context. Raises `LabUnavailable` when nobody answers there."""

    def __init__(self, socket: Path) -> None:
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket)), base_url="http://lab", timeout=TIMEOUT
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def catalogue(self) -> Catalogue:
        """What there is."""
        return Catalogue.model_validate((await self._ask("GET", "/catalogue")).json())

    async def state(self) -> State:
        """What came of it until now."""
        return State.model_validate((await self._ask("GET", "/state")).json())

    async def press(self, attacks: list[str]) -> None:
        """Queue attacks. Raises a 404 for one that the lab does not know."""
        await self._ask("POST", "/press", json={"attacks": attacks})

    async def stop(self) -> None:
        """Forget those that wait."""
        await self._ask("POST", "/stop")

    async def code(self, file: str) -> str:
        """The text of a file that a control names. Raises a 404 for any other."""
        return (await self._ask("GET", "/code", params={"file": file})).text

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lab's server-sent events, as they come."""
        timeout = httpx.Timeout(TIMEOUT, read=SILENCE)
        try:
            async with self._http.stream("GET", "/events", timeout=timeout) as answer:
                yield answer.aiter_raw()
        except httpx.TransportError as error:
            raise LabUnavailable(str(error) or type(error).__name__) from error

    async def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, **more)
        except httpx.TransportError as error:
            raise LabUnavailable(str(error) or type(error).__name__) from error
        if answer.status_code == 404:
            raise HTTPException(404, answer.text)
        if answer.is_error:
            raise LabUnavailable(f"It answered {answer.status_code} to {path}.")
        return answer


def lab_routes(lab: Lab, pages: Pages, csrf: Csrf, audit: AuditLog, streams: Streams) -> APIRouter:
    """The addresses below `/lab`."""
    router = APIRouter()

    @router.api_route("/lab", methods=READ)
    async def show(request: Request) -> Response:
        """Every attack by pillar, and what came of it."""
        return pages.render(
            request, "lab.html", form=True, catalogue=await lab.catalogue(), state=await lab.state()
        )

    @router.post("/lab/press")
    async def press(request: Request) -> Response:
        """Run the attacks that the form names, or `all`, one after the other."""
        attacks = [value for name, value in await csrf.take(request, audit) if name == "attack"]
        if attacks == [EVERY]:
            await lab.press([attack.id for attack in (await lab.catalogue()).attacks])
            return _answer(request, "/lab")
        await lab.press(attacks)
        return _answer(request, f"/lab#{attacks[0]}" if attacks else "/lab")

    @router.post("/lab/stop")
    async def stop(request: Request) -> Response:
        """Let the attack that runs end, and forget the others."""
        await csrf.take(request, audit)
        await lab.stop()
        return _answer(request, "/lab")

    @router.get("/lab/events")
    async def events() -> Response:
        """What the lab sees, as server-sent events: its whole state first, then each change."""
        return streams.answer("/lab/events", _listen(lab))

    @router.api_route("/lab/code/{file:path}", methods=READ)
    async def code(request: Request, file: str) -> Response:
        """A file that a control or an attack is in."""
        return pages.render(request, "code.html", file=file, text=await lab.code(file))

    return router


async def _listen(lab: Lab) -> AsyncGenerator[bytes, None]:
    with contextlib.suppress(LabUnavailable):  # the browser asks again
        async with lab.events() as chunks:
            async for chunk in chunks:
                yield chunk


def _answer(request: Request, page: str) -> Response:
    return JSONResponse({}, 202) if wants_json(request) else RedirectResponse(page, 303)


def lab_problem(pages: Pages, request: Request, error: LabUnavailable) -> Response:
    """The page that says that the lab does not answer."""
    return pages.problem(
        request,
        503,
        Reason.DEPENDENCY_UNAVAILABLE,
        "The attack lab does not answer",
        f"It is run by whoever started this stack. {error.args[0]}",
    )
