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

from rich.console import Console

from tests.attacks.catalogue import load_attacks
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


async def _prove_all(
    attacks: list[Attack], stack: Stack, console: Console, progress: Progress, proofs: list[Proof]
) -> None:
    try:
        async with stack:
            progress.close()
            lab = Lab(stack)
            for number, attack in enumerate(attacks, 1):
                proof = await prove(attack, lab)
                proofs.append(proof)
                _tell(console, f"{number:3}/{len(attacks)}", attack, proof)
    finally:
        progress.close()


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


def _arguments(attacks: list[Attack]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks",
        description="Prove every control: attack a stack of its own, and the same with the control left out.",
    )
    parser.add_argument("attack", nargs="*", help="ids of attacks (see --list); all when none is named")
    parser.add_argument("--pillar", choices=PILLARS, help="only the attacks on this pillar's controls")
    parser.add_argument("--list", action="store_true", help="list the attacks, and run none")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "build" / "proof.json", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.attack) - {attack.id for attack in attacks}:
        parser.error(f"no attack is called {sorted(unknown)[0]!r}; --list shows them")
    return arguments


def main() -> int:
    attacks, controls, console = load_attacks(), load_controls(), make_console()
    arguments, began = _arguments(attacks), time.monotonic()
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
        proofs = asyncio.run(prove_all(chosen, console))
    except StackError as error:
        print_error(str(error))
        return int(error.exit_status)
    write_proofs(arguments.json, proofs, attacks, controls)
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
