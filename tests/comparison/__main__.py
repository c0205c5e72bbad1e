"""``python -m tests.comparison``: ask both libraries, print the answers, compare them with the page."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import ssl
import sys
from importlib.metadata import version
from pathlib import Path

from .questions import QUESTIONS
from .sides import Ours, Side, Theirs

PAGE = Path(__file__).parents[2] / "libs" / "ztmtls" / "docs" / "comparison.md"
BEGIN, END = "<!-- answers -->\n", "<!-- end of answers -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.comparison",
        description="Ask `spiffe` and `spiffe-tls`, in an environment of their own, and `ztmtls` the same "
        "questions. Exit status 1 when the answers are not those of docs/comparison.md.",
    )
    parser.add_argument("--write", action="store_true", help="write the answers into the page")
    parser.add_argument("--only", metavar="TEXT", default="", help="questions that hold TEXT; prints only")
    parser.add_argument("--json", metavar="FILE", type=Path, default=Path("build/comparison.json"))
    arguments = parser.parse_args()
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        parser.error("uv is needed: use `make comparison`, or set UV")
    theirs = Theirs.install(uv)
    versions = theirs.versions() | {"ztmtls": version("ztmtls"), "OpenSSL of ztmtls": ssl.OPENSSL_VERSION}
    answers = asyncio.run(ask(theirs, Ours(), arguments.only))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"versions": versions, "answers": answers}, indent=2) + "\n")
    print(", ".join(f"{name} {text}" for name, text in versions.items()))
    if arguments.only:
        return 0
    old = [name for name in theirs.PINNED if f"{name}` {versions[name]}" not in PAGE.read_text()]
    if old:
        print(f"{PAGE.name} names another version of {', '.join(old)}", file=sys.stderr)
    return check_page(table(answers), arguments.write) or bool(old)


async def ask(theirs: Side, ours: Side, only: str) -> dict[str, dict[str, list[str]]]:
    """By section and question: their answer, and ours."""
    found: dict[str, dict[str, list[str]]] = {}
    for section, questions in QUESTIONS.items():
        for text, question in questions.items():
            if only in text:
                answers = [await question(theirs), await question(ours)]
                found.setdefault(section, {})[text] = answers
                print(f"{text}: {answers[0]} | {answers[1]}", flush=True)
    return found


def table(answers: dict[str, dict[str, list[str]]]) -> str:
    """The answers in Markdown."""
    lines = []
    for section, questions in answers.items():
        lines += [f"| {section} | `spiffe`, `spiffe-tls` | `ztmtls` |", "|---|---|---|"]
        lines += [f"| {text} | {' | '.join(found)} |" for text, found in questions.items()]
        lines.append("")
    return "\n".join(lines)


def check_page(found: str, write: bool) -> int:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    shown, _, after = rest.partition(END)
    if write:
        PAGE.write_text(f"{before}{BEGIN}\n{found}{END}{after}")
    elif shown.strip() != found.strip():
        print(f"{PAGE.name} says something else:\n\n{found}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
