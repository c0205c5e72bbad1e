"""What is proved: the file that `make proof` writes, read and checked."""

from __future__ import annotations

from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from .models import Model

TITLES = {
    "identity": "Identity",
    "workload": "Workload",
    "network": "Network",
    "application": "Application",
    "data": "Data",
}


class Proof(Model):
    """What came of an attack, and when: why the control refused it, and whether that stands in the log."""

    reason: str
    audited: bool
    ok: bool
    at: AwareDatetime


class Attack(Model):
    """An attack that proves a control. `proof` is None when it was not run; `in_containers` says that it is
    made on docker-compose.yml, and not by the page's lab.

    The control stopped it with those in `after` left out (none: it was the first to refuse it), and with the
    control left out, too, the one in `then` stopped it (none: it succeeded).
    """

    id: str
    title: str
    file: str
    in_containers: bool
    after: tuple[str, ...]
    then: tuple[str, ...]
    proof: Proof | None


class Control(Model):
    """What a control promises, where it is, what proves it, and what it does not cover."""

    id: str
    layer: str
    promise: str
    not_covered: str
    files: tuple[str, ...]
    attacks: tuple[Attack, ...]


class Pillar(Model):
    """One of the five."""

    id: str
    title: str
    meaning: str
    controls: tuple[Control, ...]


class Record(Model):
    """The five pillars, with what is proved of each."""

    pillars: tuple[Pillar, ...]

    @property
    def attacks(self) -> dict[str, Attack]:
        """Every attack once."""
        controls = (control for pillar in self.pillars for control in pillar.controls)
        return {attack.id: attack for control in controls for attack in control.attacks}

    @property
    def proved(self) -> int:
        """How many attacks were refused as they should be."""
        return sum(attack.proof is not None and attack.proof.ok for attack in self.attacks.values())


def read_record(file: Path) -> Record:
    """What `make proof` wrote. Raises `ValueError` that says what is wrong with it."""
    try:
        return Record.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"is not what `make proof` writes: {where}: {first['msg']}") from None
