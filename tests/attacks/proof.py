"""`make proof`: what `make attack` saw, as a page for readers (`docs/proof.md`) and for the frontend
(`build/pillars.json`).

Both are rendered from `build/proof.json`, never written by hand. With `--page-only` only the frontend's copy
is made; without any evidence it says of each attack that it has not been run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.attacks.catalogue import load_all_attacks, load_container_attacks
from tests.attacks.controls import ROOT, Control, load_controls, load_pillars
from tests.attacks.lab import Attack, Proof
from ztdev.files import replace_file

EVIDENCE = ROOT / "build" / "proof.json"
PAGE = ROOT / "build" / "pillars.json"
DOCUMENT = ROOT / "docs" / "proof.md"


def write_proofs(
    file: Path, proofs: Iterable[Proof], attacks: Iterable[Attack], controls: dict[str, Control]
) -> None:
    """Write the evidence: an array with one object for each attack, with the time at which it was written.
    What is there already of attacks that were not made this time stays."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    entries = read_proofs(file) | {
        proof.attack: {"pillar": controls[proof.control].pillar, "ok": proof.ok, "at": at, **proof.as_dict()}
        for proof in proofs
    }
    known = [entries[attack.id] for attack in attacks if attack.id in entries]
    _write_json(file, known)


def read_proofs(file: Path) -> dict[str, dict[str, Any]]:
    """The evidence by attack; empty when there is none."""
    if not file.exists():
        return {}
    entries: list[dict[str, Any]] = json.loads(file.read_text())
    return {entry["attack"]: entry for entry in entries}


def pillars(
    proofs: dict[str, dict[str, Any]], attacks: dict[str, Attack], controls: dict[str, Control]
) -> list[dict[str, Any]]:
    """Pillar, its controls, their files, the attacks that prove them, and what came of those."""

    def shown(attack: Attack, control: str) -> dict[str, Any]:
        proof, place = proofs.get(attack.id), attack.controls.index(control)
        return {
            "id": attack.id,
            "title": attack.title,
            "file": attack.file,
            "in_containers": attack.file.startswith("tests/attacks/containers/"),
            "after": attack.controls[:place],
            "then": attack.controls[place + 1 : place + 2],
            "proof": proof and _of_layer(proof, place),
        }

    return [
        {
            "id": name,
            "title": pillar.title,
            "meaning": pillar.meaning,
            "controls": [
                {
                    "id": control.id,
                    "layer": control.layer,
                    "promise": control.promise,
                    "not_covered": control.not_covered,
                    "files": list(control.files),
                    "attacks": [shown(attacks[attack], control.id) for attack in control.attacks],
                }
                for control in controls.values()
                if control.pillar == name
            ],
        }
        for name, pillar in load_pillars().items()
    ]


def _of_layer(proof: dict[str, Any], place: int) -> dict[str, Any]:
    """What the pages show of a proof for the layer that stands at `place`; the lines of the log stay in the
    evidence. Of an attack that is not proved, no layer is."""
    stops = [proof, *proof["further"]]
    found = stops[place] if place < len(stops) else {"reason": "", "line": {}}
    audited = proof["audited"] if place == 0 else bool(found["line"])
    return {"ok": proof["ok"], "at": proof["at"], "reason": found["reason"], "audited": audited}


def document(content: list[dict[str, Any]]) -> str:
    """The page for readers, in Markdown."""
    lines = [
        "# What is proved",
        "",
        "Made by `make proof` from what `make attack` saw: each attack was refused by its control, the "
        "refusal was read back from the log, and the attack was made once more with only that control left "
        "out. Where another control stopped it then, that one was left out, too, until the attack succeeded.",
    ]
    for pillar in content:
        lines += ["", f"## {pillar['title']}", "", pillar["meaning"]]
        for control in pillar["controls"]:
            files = ", ".join(f"[`{Path(file).name}`](../{file})" for file in control["files"])
            lines += [
                "",
                f"### {control['id']}",
                "",
                f"{control['promise']} ({control['layer']}; {files})",
                "",
                "| attack | with left out | refused for | in the log | without this control, too | when |",
                "|---|---|---|---|---|---|",
                *(_row(attack) for attack in control["attacks"]),
                "",
                f"Not covered: {control['not_covered']}",
            ]
    return "\n".join(lines) + "\n"


def _row(attack: dict[str, Any]) -> str:
    link, proof = f"[{attack['title']}](../{attack['file']})", attack["proof"]
    after = ", ".join(f"`{control}`" for control in attack["after"]) or "nothing"
    if proof is None:
        return f"| {link} | {after} | not run | | | |"
    if not proof["ok"]:
        return f"| {link} | {after} | **not proved** | | | {proof['at']} |"
    audited = "yes" if proof["audited"] else "no"
    then = f"stopped by `{attack['then'][0]}`" if attack["then"] else "it succeeds"
    return f"| {link} | {after} | `{proof['reason']}` | {audited} | {then} | {proof['at']} |"


def write_page(file: Path, proofs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the frontend's copy, and give what is in it."""
    content = pillars(proofs, load_all_attacks(), load_controls())
    _write_json(file, {"pillars": content})  # a frontend may read it meanwhile
    return content


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(content, indent=2) + "\n").encode(), 0o644)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.proof", description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="make the frontend's copy only")
    arguments = parser.parse_args()
    proofs = read_proofs(EVIDENCE)
    if not proofs and not arguments.page_only:
        print(f"There is no evidence in {EVIDENCE}: run `make attack` first.", file=sys.stderr)
        return 1
    content = write_page(PAGE, proofs)
    if arguments.page_only:
        return 0
    DOCUMENT.write_text(document(content))
    shown = [attack for pillar in content for control in pillar["controls"] for attack in control["attacks"]]
    elsewhere = {attack.id for attack in load_container_attacks()}
    missing = [attack["id"] for attack in shown if attack["proof"] is None and attack["id"] not in elsewhere]
    failed = [attack["id"] for attack in shown if attack["proof"] and not attack["proof"]["ok"]]
    print(f"{DOCUMENT} and {PAGE}")
    for fault, which in (("not run", missing), ("not proved", failed)):
        if which:
            print(f"{fault}: {', '.join(dict.fromkeys(which))}", file=sys.stderr)
    return 1 if missing or failed else 0


if __name__ == "__main__":
    sys.exit(main())
