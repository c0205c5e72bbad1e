"""The controls as data: `docs/controls.yaml`, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CONTROLS = ROOT / "docs" / "controls.yaml"

PILLARS = ("identity", "workload", "network", "application", "data")


@dataclass(frozen=True, kw_only=True)
class Control:
    """One control: what it promises, where it is, which attacks prove it, and what it does not cover."""

    id: str
    pillar: str
    layer: str
    promise: str
    files: tuple[str, ...]
    attacks: tuple[str, ...]
    not_covered: str


@dataclass(frozen=True, kw_only=True)
class Pillar:
    """One of the five, and what it means here."""

    title: str
    meaning: str


def load_pillars() -> dict[str, Pillar]:
    """The pillars by their ids, in the order of `PILLARS`."""
    entries: dict[str, dict[str, str]] = yaml.safe_load(CONTROLS.read_text())["pillars"]
    return {pillar: Pillar(**entries[pillar]) for pillar in PILLARS}


def load_controls() -> dict[str, Control]:
    """Every control by its id. Raises `TypeError` for a field too many or too few."""
    entries: list[dict[str, Any]] = yaml.safe_load(CONTROLS.read_text())["controls"]
    controls = [
        Control(**entry | {"files": tuple(entry["files"]), "attacks": tuple(entry["attacks"])})
        for entry in entries
    ]
    return {control.id: control for control in controls}
