"""`docs/controls.yaml` says what is there: every file, every attack, both ways."""

from __future__ import annotations

import pytest

from tests.attacks.catalogue import CONTAINERS, load_all_attacks, load_attacks, load_container_attacks
from tests.attacks.controls import PILLARS, ROOT, Control, load_controls, load_pillars
from tests.attacks.weak_cloud import LEFT_OUT as LEFT_OUT_OF_THE_CLOUD
from tests.attacks.without import LEFT_OUT

ATTACKS = load_all_attacks()
CONTROLS = load_controls()


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS.keys())
def test_a_control_has_files_attacks_and_a_pillar(control: Control) -> None:
    assert control.pillar in PILLARS
    assert control.files
    assert [file for file in control.files if not (ROOT / file).is_file()] == []
    assert control.attacks
    assert set(control.attacks) <= set(ATTACKS)
    assert control.promise.endswith(".")
    assert control.not_covered.endswith(".")


def test_every_pillar_has_a_meaning_and_controls() -> None:
    assert tuple(load_pillars()) == PILLARS
    assert {control.pillar for control in CONTROLS.values()} == set(PILLARS)


def test_an_attack_lives_with_the_pillar_of_the_control_that_refuses_it() -> None:
    for attack in load_attacks():
        assert attack.file.split("/")[2] == CONTROLS[attack.first.control].pillar, attack.id
    assert {attack.file.split("/")[2] for attack in load_container_attacks()} == {CONTAINERS}


def test_an_attack_names_its_own_module() -> None:
    assert [attack.id for attack in ATTACKS.values() if not (ROOT / attack.file).is_file()] == []
    assert len({attack.file for attack in ATTACKS.values()}) == len(ATTACKS)


def test_the_controls_name_each_attack_that_proves_them() -> None:
    """So each control is left out at least once: an attack leaves out its layers one after the other."""
    named = {(control.id, attack) for control in CONTROLS.values() for attack in control.attacks}
    assert named == {(control, attack.id) for attack in ATTACKS.values() for control in attack.controls}


def test_every_function_that_leaves_a_control_out_is_of_a_control() -> None:
    assert {*LEFT_OUT, *LEFT_OUT_OF_THE_CLOUD} <= set(CONTROLS)


def test_nothing_that_is_shipped_knows_how_to_leave_a_control_out() -> None:
    shipped = [
        file for part in ("libs", "services", "functions", "dev") for file in (ROOT / part).rglob("*.py")
    ]
    assert len(shipped) > 50
    assert [file for file in shipped if "tests.attacks" in file.read_text()] == []


def test_the_readme_counts_the_attacks() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"makes {len(load_attacks())} attacks" in readme
    assert f"makes {len(load_container_attacks())} more on the containers" in readme
    assert len(load_attacks()) >= 30
