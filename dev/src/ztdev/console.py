"""What `ztdev` prints: steps as they pass, what runs, and errors. Colours only on a terminal, never with
NO_COLOR."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .events import Event, Notice, Step


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not wrap when its output goes into a file or a pipe. rich itself obeys NO_COLOR."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=200)
    return console


class Progress:
    """Prints a line for each step that has ended; on a terminal also those that are under way."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._under_way: list[str] = []
        self._live: Live | None = None
        fancy = (console.encoding or "").lower().startswith("utf")
        self._ok, self._bad, self._note = ("✓", "✗", "•") if fancy else ("+", "x", "*")

    def __call__(self, event: Event) -> None:
        match event:
            case Step(name, "begin"):
                self._under_way.append(name)
            case Step(name, phase, seconds, detail):
                if name in self._under_way:
                    self._under_way.remove(name)
                good = phase == "done"
                mark = f"[green]{self._ok}[/]" if good else f"[red]{self._bad}[/]"
                extra = f"  [dim]{escape(detail)}[/]" if detail else ""
                self._print(f"  {mark} {escape(name):32} {seconds:6.1f} s{extra}")
            case Notice(text, level):
                colour = {"info": "dim", "warning": "yellow", "error": "bold red"}[level]
                self._print(f"  [{colour}]{self._note} {escape(text)}[/]")
        self._show_under_way()

    def close(self) -> None:
        self._under_way.clear()
        self._show_under_way()

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _show_under_way(self) -> None:
        if not self._console.is_terminal:
            return
        if not self._under_way:
            if self._live is not None:
                self._live.stop()
                self._live = None
            return
        if self._live is None:
            # Drawn when something happens, not by a thread of its own: that one would draw between our lines.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(f"  … {', '.join(self._under_way)}", style="dim"), refresh=True)


def process_table(processes: list[dict[str, Any]], *, ready: dict[str, str] | None = None) -> Table:
    """What each process is: name, process id, address, identity; with `ready`, also whether it is."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_edge=False)
    for title in ("process", "pid", "address", "identity"):
        table.add_column(title, justify="right" if title == "pid" else "left", no_wrap=True, overflow="fold")
    if ready is not None:
        table.add_column("state")
    for process in processes:
        cells = [
            str(process.get("name", "")),
            str(process.get("pid") or "-"),
            str(process.get("address", "")),
            str(process.get("identity", "")) or "-",
        ]
        if ready is not None:
            state = ready.get(cells[0], str(process.get("state", "")))
            colour = "green" if state.startswith(("ready", "running")) else "yellow"
            cells = [escape(cell) for cell in cells] + [f"[{colour}]{escape(state)}[/]"]
        else:
            cells = [escape(cell) for cell in cells]
        table.add_row(*cells)
    return table


def print_error(text: str) -> None:
    """An error for the person at the keyboard, on standard error."""
    advice = text.replace("`ztdev ", f"`{program_name()} ")
    make_console(stderr=True).print(f"[bold red]error:[/] {escape(advice)}", soft_wrap=True)


def program_name() -> str:
    """How this person calls this program: `ztdev` when that is on the PATH, else the way to it."""
    if shutil.which("ztdev"):
        return "ztdev"
    program = Path(sys.prefix) / "bin" / "ztdev"
    if not program.exists():
        return f"{sys.executable} -m ztdev"
    try:
        return str(program.relative_to(Path.cwd()))
    except ValueError:
        return str(program)
