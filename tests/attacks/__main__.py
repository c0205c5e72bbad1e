"""`make attack`: every attack against a stack of its own, the matrix of layers, and `build/proof.json`.

Exits with 1 when an attack is not proved as it declares, with 130 when interrupted; what was proved by then
is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.attacks.catalogue import load_all_attacks, load_attacks, load_container_attacks
from tests.attacks.controls import PILLARS, ROOT, Control, load_controls
from tests.attacks.lab import Attack, Lab, Proof, prove
from tests.attacks.matrix import matrix
from tests.attacks.proof import write_proofs
from ztdev.console import Progress, make_console, print_error
from ztdev.errors import StackError
from ztdev.interrupts import stop_signals
from ztdev.options import StackOptions
from ztdev.stack import Stack

INTERRUPTED = 130


async def prove_all(attacks: list[Attack], console: Console) -> list[Proof]:
    """Start a stack, run `attacks` one after the other, stop it.

    Ctrl-C ends it early, with the proofs so far; a second one hurries.
    """
    progress = Progress(console)
    proofs: list[Proof] = []
    with tempfile.TemporaryDirectory(prefix="zt-attack-") as state:
        stack = Stack(
            StackOptions(
                state_dir=Path(state), free_ports=True, rotate_every=0, log_level="warning", report=progress
            )
        )
        async with stop_signals(stack.hurry, console) as stop:
            work = asyncio.create_task(_prove_all(attacks, stack, console, progress, proofs))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if work.done():
                await work
            else:
                work.cancel()
                await asyncio.wait({work})
    return proofs


async def prove_in_containers(attacks: list[Attack], console: Console) -> list[Proof]:
    """Start the compose project under a name of its own, run `attacks`, take it down."""
    from tests.attacks.containers.container_lab import ContainerLab
    from tests.compose.project import running

    console.print("  • building the images, and starting docker-compose.yml")
    with running() as project:
        return await _prove_each(attacks, ContainerLab(project), console, [])


async def _prove_all(
    attacks: list[Attack], stack: Stack, console: Console, progress: Progress, proofs: list[Proof]
) -> None:
    try:
        async with stack:
            progress.close()
            await _prove_each(attacks, Lab(stack), console, proofs)
    finally:
        progress.close()


async def _prove_each(attacks: list[Attack], lab: Any, console: Console, proofs: list[Proof]) -> list[Proof]:
    for number, attack in enumerate(attacks, 1):
        proof = await prove(attack, lab)
        proofs.append(proof)
        _tell(console, f"{number:3}/{len(attacks)}", attack, proof)
    return proofs


def _tell(console: Console, place: str, attack: Attack, proof: Proof) -> None:
    if proof.ok:
        verdict = f"refused: {proof.reason}; without {proof.control}: {proof.ablation}"
    else:
        verdict = f"NOT PROVED: {proof.fault}"
    console.print(f"{place}  {attack.id:26} {proof.seconds:5.1f} s  {verdict}", markup=False, soft_wrap=True)


def _list(attacks: list[Attack], controls: dict[str, Control], console: Console) -> None:
    for attack in attacks:
        pillar = controls[attack.first.control].pillar
        console.print(f"{attack.id:26} {pillar:12} {attack.title}", markup=False, soft_wrap=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks",
        description="Prove every control: attack a stack of its own, and the same with the control left out.",
    )
    parser.add_argument("attack", nargs="*", help="ids of attacks (see --list); all when none is named")
    parser.add_argument("--pillar", choices=PILLARS, help="only the attacks on this pillar's controls")
    parser.add_argument(
        "--containers", action="store_true", help="those on docker-compose.yml, with the Docker engine here"
    )
    parser.add_argument("--list", action="store_true", help="list the attacks, and run none")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "build" / "proof.json", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    here = load_container_attacks() if arguments.containers else load_attacks()
    if unknown := set(arguments.attack) - {attack.id for attack in here}:
        parser.error(f"no attack is called {sorted(unknown)[0]!r}; --list shows them")
    return arguments


def main() -> int:
    controls, console = load_controls(), make_console()
    arguments, began = _arguments(), time.monotonic()
    attacks = load_container_attacks() if arguments.containers else load_attacks()
    chosen = [
        attack
        for attack in attacks
        if (not arguments.attack or attack.id in arguments.attack)
        and arguments.pillar in (None, controls[attack.first.control].pillar)
    ]
    if arguments.list:
        _list(chosen, controls, console)
        return 0
    try:
        run = prove_in_containers if arguments.containers else prove_all
        proofs = asyncio.run(run(chosen, console))
    except StackError as error:
        print_error(str(error))
        return int(error.exit_status)
    except KeyboardInterrupt:
        return INTERRUPTED
    write_proofs(arguments.json, proofs, load_all_attacks().values(), controls)
    console.print(matrix(chosen[: len(proofs)], proofs, controls))
    failed = [proof.attack for proof in proofs if not proof.ok]
    console.print(
        f"{len(proofs) - len(failed)} of {len(chosen)} attacks proved in {time.monotonic() - began:.0f} s. "
        f"Evidence: {arguments.json}",
        soft_wrap=True,
    )
    if len(proofs) < len(chosen):
        return INTERRUPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
