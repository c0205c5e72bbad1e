"""Every attack: the modules of the five pillars' packages, each with its `ATTACK`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from tests.attacks.controls import PILLARS
from tests.attacks.lab import Attack


def load_attacks() -> list[Attack]:
    """In the order of the pillars, then of the modules' names."""
    home = Path(__file__).parent
    return [
        import_module(f"tests.attacks.{pillar}.{module.name}").ATTACK
        for pillar in PILLARS
        for module in iter_modules([str(home / pillar)])
    ]
