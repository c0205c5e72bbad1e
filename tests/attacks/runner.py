"""Runs attacks one at a time, in the order in which they were pressed, and tells listeners what is seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

from tests.attacks.lab import Attack, Lab, Proof, Report, Step, prove


class UnknownAttack(LookupError):
    """No attack has this id."""


class Prove(Protocol):
    """`tests.attacks.lab.prove`."""

    async def __call__(self, attack: Attack, lab: Lab, report: Report) -> Proof: ...


class Runner:
    """Belongs to one event loop. Start it with `async with`; leaving ends the attack that is under way.

    What it knows is one state with a version; `changes` gives a listener what is newer than what it has, so
    that a slow one misses steps and never holds anything up.
    """

    def __init__(self, lab: Lab, attacks: Iterable[Attack], prove: Prove = prove) -> None:
        self._lab, self._prove = lab, prove
        self._attacks = {attack.id: attack for attack in attacks}
        self._waiting: list[str] = []
        self._running: dict[str, Any] | None = None
        self._proofs: dict[str, tuple[int, dict[str, Any]]] = {}
        self._version = 1
        self._news = asyncio.Event()  # a new one after each change
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Runner:
        self._task = asyncio.create_task(self._run(), name="attack lab")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def press(self, attacks: Iterable[str]) -> None:
        """Queue `attacks`; one that waits or runs already is not queued again. Raises `UnknownAttack`."""
        wanted = list(attacks)
        for attack in wanted:
            if attack not in self._attacks:
                raise UnknownAttack(attack)
        queued = {*self._waiting, self._running["attack"] if self._running else None}
        self._waiting += [attack for attack in dict.fromkeys(wanted) if attack not in queued]
        self._changed()

    def stop(self) -> None:
        """Forget those that wait. The one under way goes on to its end: it puts back what it left out."""
        self._waiting.clear()
        self._changed()

    def state(self, since: int = 0) -> dict[str, Any]:
        """`version`, `waiting` (ids), `running` (`attack`, `step`, the `proof` so far) or None, and the
        `proofs` that are newer than version `since`, by attack."""
        return {
            "version": self._version,
            "waiting": list(self._waiting),
            "running": self._running,
            "proofs": {attack: proof for attack, (version, proof) in self._proofs.items() if version > since},
        }

    async def changes(self, heartbeat: float) -> AsyncIterator[dict[str, Any] | None]:
        """The state now, then each time that it has changed; None after `heartbeat` seconds without a change.
        Without end."""
        seen = 0
        while True:
            if self._version > seen:
                state, seen = self.state(seen), self._version
                yield state
            elif not await self._wait(heartbeat):
                yield None

    async def _wait(self, timeout: float | None = None) -> bool:
        """False when nothing has changed within `timeout` seconds."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                await self._wait()
            attack = self._attacks[self._waiting.pop(0)]
            try:
                proof = await self._prove(attack, self._lab, self._report)
            finally:
                self._running = None
            self._proofs[attack.id] = self._version + 1, proof.as_dict()
            self._changed()

    def _report(self, step: Step, proof: Proof) -> None:
        self._running = {"attack": proof.attack, "step": step, "proof": proof.as_dict()}
        self._changed()

    def _changed(self) -> None:
        self._version += 1
        self._news.set()
        self._news = asyncio.Event()
