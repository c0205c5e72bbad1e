"""The matrix of `make attack`: attack by layer, in at most 100 columns."""

from __future__ import annotations

from string import ascii_uppercase

from rich.table import Column, Table

from tests.attacks.controls import Control
from tests.attacks.lab import Attack, Proof

REFUSED, SECOND, NOTHING, FAULT = "■", "□", "·", "✗"

LEGEND = (
    f"{REFUSED} refused it   {SECOND} would also stop it, as seen with those before left out   "
    f"{NOTHING} not covered   {FAULT} not proved\n"
    "log: the refusal was read back from the log of who refused"
)


def layers_of(controls: dict[str, Control]) -> dict[str, str]:
    """A letter for each layer, in the order of the controls."""
    layers = dict.fromkeys(control.layer for control in controls.values())
    return dict(zip(layers, ascii_uppercase, strict=False))


def row(proof: Proof, controls: dict[str, Control]) -> dict[str, str]:
    """A mark for each layer that had something to do with this attack."""
    cells: dict[str, str] = {}
    for stop in proof.further:
        cells[controls[stop.control].layer] = SECOND
    cells[controls[proof.control].layer] = REFUSED if proof.ok else FAULT
    return cells


def matrix(attacks: list[Attack], proofs: list[Proof], controls: dict[str, Control]) -> Table:
    """Attack by layer: which one refused it, which would also stop it, as it was seen."""
    letters = layers_of(controls)
    key = "   ".join(f"{letter} {layer}" for layer, letter in letters.items())
    table = Table(
        Column("attack", no_wrap=True),
        *(Column(letter, justify="center", min_width=1) for letter in letters.values()),
        "log",
        box=None,
        padding=(0, 1),
        pad_edge=False,
        caption=f"{key}\n{LEGEND}",
        caption_justify="left",
        width=100,
    )
    pillar = None
    for attack, proof in zip(attacks, proofs, strict=True):
        own = controls[proof.control].pillar
        if own != pillar:
            pillar = own
            table.add_section()
            table.add_row(f"[bold]{pillar}[/]")
        cells = row(proof, controls)
        marks = (cells.get(layer, NOTHING) for layer in letters)
        table.add_row(f" {attack.id}", *marks, "yes" if proof.audited else "no")
    return table
