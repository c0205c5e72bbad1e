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

from tests.attacks.catalogue import load_attacks
from tests.attacks.controls import ROOT, Control, load_controls, load_pillars
from tests.attacks.lab import Attack, Proof

EVIDENCE = ROOT / "build" / "proof.json"
PAGE = ROOT / "build" / "pillars.json"
DOCUMENT = ROOT / "docs" / "proof.md"

#: What of a proof the pages show; the lines of the log stay in the evidence.
SHOWN = ("reason", "refused", "audited", "ablation", "ok", "at")


def write_proofs(file: Path, proofs: Iterable[Proof], controls: dict[str, Control]) -> None:
    """Write the evidence: an array with one object for each attack, with the time at which it was written."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    entries = [
        {"pillar": controls[proof.control].pillar, "ok": proof.ok, "at": at, **proof.as_dict()}
        for proof in proofs
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries, indent=2) + "\n")


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

    def shown(attack: Attack) -> dict[str, Any]:
        proof = proofs.get(attack.id)
        return {
            "id": attack.id,
            "title": attack.title,
            "file": attack.file,
            "proof": proof and {name: proof[name] for name in SHOWN},
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
                    "attacks": [shown(attacks[attack]) for attack in control.attacks],
                }
                for control in controls.values()
                if control.pillar == name
            ],
        }
        for name, pillar in load_pillars().items()
    ]


def document(content: list[dict[str, Any]]) -> str:
    """The page for readers, in Markdown."""
    lines = [
        "# What is proved",
        "",
        "Made by `make proof` from what `make attack` saw: each attack was refused by its control, the "
        "refusal was read back from the log, and the attack was made once more with only that control left "
        "out.",
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
                "| attack | refused for | in the log | without this control | when |",
                "|---|---|---|---|---|",
                *(_row(attack) for attack in control["attacks"]),
                "",
                f"Not covered: {control['not_covered']}",
            ]
    return "\n".join(lines) + "\n"


def _row(attack: dict[str, Any]) -> str:
    link, proof = f"[{attack['title']}](../{attack['file']})", attack["proof"]
    if proof is None:
        return f"| {link} | not run | | | |"
    if not proof["ok"]:
        return f"| {link} | **not proved** | | | {proof['at']} |"
    audited = "yes" if proof["audited"] else "no"
    return f"| {link} | `{proof['reason']}` | {audited} | {_without(proof['ablation'])} | {proof['at']} |"


def _without(ablation: str) -> str:
    stopped = ablation.removeprefix("stopped-by:")
    return "it succeeds" if stopped == ablation else f"stopped by `{stopped}`"


def write_page(file: Path, proofs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the frontend's copy, and give what is in it."""
    content = pillars(proofs, {attack.id: attack for attack in load_attacks()}, load_controls())
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    unfinished.write_text(json.dumps({"pillars": content}, indent=2) + "\n")
    unfinished.replace(file)  # a frontend may read it meanwhile
    return content


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
    missing = [a["id"] for p in content for c in p["controls"] for a in c["attacks"] if a["proof"] is None]
    print(f"{DOCUMENT} and {PAGE}")
    if missing:
        print(f"not run: {', '.join(dict.fromkeys(missing))}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
