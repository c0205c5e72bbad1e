"""Every attack: modules with an `ATTACK` each, of the five pillars' packages and of the containers'."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from tests.attacks.controls import PILLARS, load_controls
from tests.attacks.lab import Attack

HOME = Path(__file__).parent

#: The package of the attacks that need the containers.
CONTAINERS = "containers"


def load_attacks() -> list[Attack]:
    """Those on the one-machine stack, in the order of the pillars, then of the modules' names."""
    return [attack for pillar in PILLARS for attack in _load(pillar)]


def load_container_attacks() -> list[Attack]:
    """Those on docker-compose.yml, in the order of the pillars, then of the modules' names."""
    controls = load_controls()
    return sorted(_load(CONTAINERS), key=lambda attack: PILLARS.index(controls[attack.first.control].pillar))


def load_all_attacks() -> dict[str, Attack]:
    """All of them, by their ids."""
    return {attack.id: attack for attack in (*load_attacks(), *load_container_attacks())}


def _load(package: str) -> list[Attack]:
    modules = (
        import_module(f"tests.attacks.{package}.{module.name}")
        for module in iter_modules([str(HOME / package)])
    )
    return [module.ATTACK for module in modules if hasattr(module, "ATTACK")]
