"""The attack lab beside a running stack, for the page: HTTP on a Unix socket that this user alone can reach.

`ztdev up --lab tests.attacks.serve` calls `serve`. Attacks need what only the supervisor has (the authority,
the registrations, the processes), so they run there; the frontend asks over the socket. Beside the containers
it is `tests.attacks.containers` that serves.

    GET  /catalogue   every attack and every control
    GET  /state       what `Runner.state` says
    GET  /events      the same as server-sent events: the state, then each change
    POST /press       {"attacks": [ID, ...]}: queue them
    POST /stop        forget those that wait
    GET  /code?file=  a file that a control names, or an attack's own
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.attacks.catalogue import load_attacks
from tests.attacks.controls import ROOT, Control, load_controls
from tests.attacks.lab import Attack, Lab
from tests.attacks.runner import Runner, UnknownAttack
from ztdev.stack import Stack

#: Seconds between signs of life on a stream that has nothing to tell.
HEARTBEAT = 10.0


@asynccontextmanager
async def serve(stack: Stack, socket: Path) -> AsyncIterator[None]:
    """Serve the lab of `stack` on `socket` until left."""
    async with serve_lab(Lab(stack), load_attacks(), socket):
        yield


@asynccontextmanager
async def serve_lab(lab: Any, attacks: Sequence[Attack], socket: Path) -> AsyncIterator[None]:
    """Serve `lab` with its `attacks` on `socket` until left; an attack that is under way ends then."""
    async with Runner(lab, attacks) as runner:
        app = web.AppRunner(make_app(runner, attacks, load_controls()), access_log=None, shutdown_timeout=0.5)
        await app.setup()
        try:
            await web.UnixSite(app, str(socket)).start()
            yield
        finally:
            await app.cleanup()


def make_app(runner: Runner, attacks: Iterable[Attack], controls: dict[str, Control]) -> web.Application:
    """The lab's HTTP application."""
    catalogue = describe(attacks, controls)
    shown = {file for control in controls.values() for file in control.files}
    shown |= {attack["file"] for attack in catalogue["attacks"]}

    async def get_catalogue(_: web.Request) -> web.Response:
        return web.json_response(catalogue)

    async def get_state(_: web.Request) -> web.Response:
        return web.json_response(runner.state())

    async def get_events(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        async for state in runner.changes(HEARTBEAT):
            await stream.write(f"data: {json.dumps(state)}\n\n".encode() if state else b":\n\n")
        return stream

    async def post_press(request: web.Request) -> web.Response:
        try:
            runner.press((await request.json())["attacks"])
        except UnknownAttack as error:
            raise web.HTTPNotFound(text=f"There is no attack {error.args[0]!r}.") from None
        return web.json_response(runner.state(), status=202)

    async def post_stop(_: web.Request) -> web.Response:
        runner.stop()
        return web.json_response(runner.state(), status=202)

    async def get_code(request: web.Request) -> web.Response:
        file = request.query.get("file", "")
        if file not in shown:
            raise web.HTTPNotFound(text="No control names this file.")
        return web.Response(text=(ROOT / file).read_text())

    app = web.Application(client_max_size=1 << 16)
    app.add_routes(
        [
            web.get("/catalogue", get_catalogue),
            web.get("/state", get_state),
            web.get("/events", get_events),
            web.get("/code", get_code),
            web.post("/press", post_press),
            web.post("/stop", post_stop),
        ]
    )
    return app


def describe(attacks: Iterable[Attack], controls: dict[str, Control]) -> dict[str, Any]:
    """Attacks and controls as the page shows them."""
    return {
        "attacks": [
            {
                "id": attack.id,
                "title": attack.title,
                "story": attack.story,
                "pillar": controls[attack.first.control].pillar,
                "target": attack.target,
                "control": attack.first.control,
                "reason": attack.first.reason,
                "further": attack.controls[1:],
                "file": attack.file,
            }
            for attack in attacks
        ],
        "controls": {
            control.id: {"layer": control.layer, "promise": control.promise, "pillar": control.pillar}
            for control in controls.values()
        },
    }
