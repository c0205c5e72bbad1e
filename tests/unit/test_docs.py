"""The documentation of ztmtls: its programs run, its links lead somewhere, its tables are complete.

A block is told what it is by the comment before it:

    <!-- file: NAME -->   written to the directory in which the page's programs run; test_*.py by pytest
    <!-- run -->          a program; `<!-- run: NAME -->` when the text calls it so
    <!-- prints -->       lines that the program before it prints, in this order, among others
    <!-- fragment -->     Python that is read here for its syntax only
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI

from ztmtls.audit import AuditLog
from ztmtls.authz import Policy
from ztmtls.metrics import Collector
from ztmtls.reasons import Reason
from ztmtls.secrets import SecretState
from ztmtls.settings import CalleeSettings
from ztmtls.source import SourceState
from ztmtls.testing import calling_as

LIBRARY = Path(__file__).parents[2] / "libs" / "ztmtls"
PAGES = [
    LIBRARY / "README.md",
    LIBRARY / "CHANGELOG.md",
    LIBRARY / "examples" / "README.md",
    *sorted((LIBRARY / "docs").glob("*.md")),
]
OPERATIONS = (LIBRARY / "docs" / "operations.md").read_text()

CALLER = "spiffe://zt.example/caller"
_BLOCK = re.compile(r"(?:<!-- ([a-z]+)(?:: ([^>]*?))? -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PORTS = ("8443", "8444")


@dataclass
class Program:
    name: str
    text: str
    prints: list[str] = field(default_factory=list)


@dataclass
class Page:
    """A page's files, its programs in order, and the Python blocks that nobody said anything about."""

    files: dict[str, str] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)
    unmarked: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        for kind, name, language, text in _BLOCK.findall(path.read_text()):
            if kind == "file":
                page.files[name] = text
            elif kind == "run":
                page.programs.append(Program(name or f"program{len(page.programs) + 1}.py", text))
            elif kind == "prints":
                page.programs[-1].prints = text.splitlines()
            elif language == "yaml":
                yaml.safe_load(text)
            elif kind == "fragment":
                compile(text, str(path), "exec", dont_inherit=True)
            elif language == "python":
                page.unmarked.append(text)
        return page

    def tests(self) -> list[str]:
        return [name for name in self.files if name.startswith("test_")]


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [str(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SPIFFE_", "PYTEST_"))
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a page's programs run: its files are there, and its ports are free ones."""
    page: Page = request.getfixturevalue("page")
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    for name, text in [*page.files.items(), *((p.name, p.text) for p in page.programs)]:
        for port, free in ports.items():
            text = text.replace(port, free)
        (tmp_path / name).write_text(text)
    return tmp_path


READ = {path.relative_to(LIBRARY).as_posix(): Page.read(path) for path in PAGES}


@pytest.mark.parametrize(
    ("page", "program"),
    [
        pytest.param(p, program, id=f"{name}:{program.name}")
        for name, p in READ.items()
        for program in p.programs
    ],
)
def test_program_runs_and_prints_what_is_shown(page: Page, program: Program, directory: Path) -> None:
    done = run(directory, program.name)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = iter(done.stdout.splitlines())
    missing = [line for line in program.prints if line not in printed]  # each after the one before it
    assert not missing, done.stdout + done.stderr


@pytest.mark.parametrize("page", [pytest.param(p, id=name) for name, p in READ.items() if p.tests()])
def test_tests_that_are_shown_pass(page: Page, directory: Path) -> None:
    done = run(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", *page.tests())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", READ)
def test_every_python_block_is_marked(name: str) -> None:
    assert not READ[name].unmarked


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=list(READ))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert not broken


def test_every_page_is_reachable_from_the_readme() -> None:
    readme = (LIBRARY / "README.md").read_text()
    assert not [page.name for page in (LIBRARY / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]


def first_column(heading: str) -> list[str]:
    """What stands in code in the first column of the tables below a heading of operations.md."""
    section = re.split(r"^## ", OPERATIONS.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`{]+)[^`]*`", cell)]


def test_every_reason_is_explained_once() -> None:
    named = first_column("Reason codes")
    assert sorted(named) == sorted(Reason), set(Reason).symmetric_difference(named)


def test_every_state_is_explained() -> None:
    assert first_column("States of a source") == list(SourceState)
    assert first_column("States of a secret") == list(SecretState)


def test_every_metric_is_explained() -> None:
    documented = set(re.findall(r"ztmtls_\w+", Collector.__doc__ or ""))
    assert len(documented) > 5
    assert set(first_column("Metrics")) == documented


async def test_every_field_of_an_audit_line_is_explained() -> None:
    lines = io.StringIO()
    policy = Policy.parse(
        {"version": 1, "rules": [{"name": "r", "callers": [CALLER], "methods": ["GET"], "paths": ["/"]}]}
    )
    async with calling_as(FastAPI(), CALLER, policy, audit=AuditLog("callee", lines)) as client:
        await client.get("/")
        await client.get("/other")
    allowed, missing, denied = (set(json.loads(line)) for line in lines.getvalue().splitlines())
    assert "rule" in allowed
    assert "status" in missing  # the application has no such page
    assert "detail" in denied
    assert allowed | missing | denied <= set(first_column("Audit lines"))


def test_every_setting_is_explained_with_its_default() -> None:
    page = (LIBRARY / "docs" / "getting-started.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (`.*?`)? ?\|", page, re.MULTILINE))
    fields = CalleeSettings.model_fields
    assert {name.lower() for name in rows} == set(fields)
    for name, default in rows.items():
        field_info = fields[name.lower()]
        unset = field_info.is_required() or field_info.default is None
        assert default == ("" if unset else f"`{field_info.default}`"), name


def test_every_command_of_the_makefile_that_is_named_exists() -> None:
    makefile = (LIBRARY.parents[1] / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([a-z]+)`", page.read_text()):
            assert f"\n{target}: " in makefile, (page.name, target)
