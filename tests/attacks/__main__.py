"""`make attack`: every attack against a stack of its own, the matrix of layers, and `build/proof.json`.

    python -m tests.attacks [--json FILE] [ATTACK ...]

Exits with 1 when an attack is not proved as it declares.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from tests.attacks.catalogue import load_attacks
from tests.attacks.controls import ROOT, Control, load_controls
from tests.attacks.lab import Attack, Lab, Proof, prove
from ztdev.console import Progress, make_console
from ztdev.options import StackOptions
from ztdev.stack import Stack

REFUSED, SECOND, NOTHING = "R", "s", "-"


async def prove_all(attacks: list[Attack], console: Console) -> list[Proof]:
    """Start a stack, run `attacks` one after the other, stop it."""
    progress = Progress(console)
    with tempfile.TemporaryDirectory(prefix="zt-attack-") as state:
        options = StackOptions(
            state_dir=Path(state), free_ports=True, rotate_every=0, log_level="warning", report=progress
        )
        try:
            async with Stack(options) as stack:
                progress.close()
                lab, proofs = Lab(stack), []
                for number, attack in enumerate(attacks, 1):
                    proof = await prove(attack, lab)
                    _tell(console, f"{number:3}/{len(attacks)}", attack, proof)
                    proofs.append(proof)
                return proofs
        finally:
            progress.close()


def _tell(console: Console, place: str, attack: Attack, proof: Proof) -> None:
    if proof.ok:
        verdict = f"refused: {proof.reason}; without {proof.control}: {proof.ablation}"
    else:
        verdict = f"NOT PROVED: {proof.fault}"
    console.print(f"{place}  {attack.id:26} {proof.seconds:5.1f} s  {verdict}", markup=False, soft_wrap=True)


def matrix(attacks: list[Attack], proofs: list[Proof], controls: dict[str, Control]) -> Table:
    """Attack by layer: which one refused it, which would also stop it, as it was seen."""
    layers = list(dict.fromkeys(control.layer for control in controls.values()))
    table = Table(
        Column("attack", no_wrap=True),
        *(Column(layer, justify="center") for layer in layers),
        "log",
        caption="R: refused it. s: would also stop it, seen with R left out. -: not covered. "
        "log: the refusal was read back.",
    )
    for attack, proof in zip(attacks, proofs, strict=True):
        cells = dict.fromkeys(layers, NOTHING)
        if proof.ablation.startswith("stopped-by:"):
            cells[controls[proof.ablation.partition(":")[2]].layer] = SECOND
        if proof.refused:
            cells[controls[proof.control].layer] = REFUSED
        table.add_row(attack.id, *cells.values(), "yes" if proof.audited else "no")
    return table


def document(proofs: list[Proof], controls: dict[str, Control]) -> list[dict[str, object]]:
    """What `build/proof.json` holds."""
    return [{"pillar": controls[proof.control].pillar, "ok": proof.ok, **proof.as_dict()} for proof in proofs]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description="Prove every control.")
    parser.add_argument("attack", nargs="*", help="ids of attacks; all when none is named")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "build" / "proof.json", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    attacks = [each for each in load_attacks() if not arguments.attack or each.id in arguments.attack]
    if unknown := set(arguments.attack) - {attack.id for attack in attacks}:
        parser.error(f"no attack is called {sorted(unknown)[0]!r}")
    console, controls, began = make_console(), load_controls(), time.monotonic()
    proofs = asyncio.run(prove_all(attacks, console))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document(proofs, controls), indent=2) + "\n")
    console.print(matrix(attacks, proofs, controls))
    failed = [proof.attack for proof in proofs if not proof.ok]
    console.print(
        f"{len(proofs) - len(failed)} of {len(proofs)} attacks proved in {time.monotonic() - began:.0f} s. "
        f"Evidence: {arguments.json}",
        soft_wrap=True,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
