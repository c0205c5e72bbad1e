"""The commands of `ztdev`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from .chain import chain_tree
from .console import Progress, make_console, print_error, process_table, program_name
from .control import ask
from .errors import ExitStatus, NotReady, NotRunning, StackError
from .events import Steps
from .interrupts import stop_signals
from .logfile import LogFile
from .logview import Tail, readable
from .options import DATABASE_SERVICES, SERVICES, StackOptions
from .probing import probe_all
from .processes import ProcessRef, end_processes, wait_gone
from .shop import Visitor, parse_items
from .state import StateDirectory, default_state_directory

app = typer.Typer(
    name="ztdev",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "The Zero Trust demo on one machine: three services over SPIFFE mutual TLS, a Workload API, "
        "PostgreSQL and a stand-in for AWS, run by one supervisor and stopped without a trace."
    ),
    epilog=(
        "Exit status: 0 well; 1 failed; 2 wrong use; 3 not running; 4 already running; 5 port in use; "
        "6 state directory unusable; 7 disk full; 8 something is not installed; 130 interrupted."
    ),
)

#: Seconds that a rotation may take with all its tries, and the one that is under way before it.
_ROTATE_WITHIN = 300.0

StateOption = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="State directory. (default: $ZTDEV_STATE, else .zt)"),
]


# -- up


@app.command()
def up(
    state: StateOption = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", help="Port of the page. (default: 8080)")
    ] = None,
    use_port: Annotated[
        list[str] | None,
        typer.Option(
            "--use-port", metavar="NAME=N", help="Another port, such as postgres=15433. Repeatable."
        ),
    ] = None,
    free_ports: Annotated[
        bool, typer.Option("--free-ports", help="Any free ports for those that are not named.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is up; `down` ends it.")
    ] = False,
    svid_ttl: Annotated[
        float, typer.Option("--svid-ttl", metavar="SECONDS", min=5, help="Life of an SVID.")
    ] = 60.0,
    ca_ttl: Annotated[
        float, typer.Option("--ca-ttl", metavar="SECONDS", min=30, help="Life of a signing authority.")
    ] = 600.0,
    rotate_every: Annotated[
        int,
        typer.Option(
            "--rotate-every",
            metavar="SECONDS",
            min=0,
            help="Time between rotations of the database passwords; 0: only when `ztdev rotate` asks.",
        ),
    ] = 60,
    http: Annotated[
        Literal["auto", "h11", "httptools"], typer.Option("--http", help="HTTP parser of the services.")
    ] = "auto",
    loop: Annotated[
        Literal["auto", "asyncio", "uvloop"], typer.Option("--loop", help="Event loop of the services.")
    ] = "auto",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option("--log-level", help="Logs of the services."),
    ] = "info",
    lab: Annotated[
        str | None,
        typer.Option("--lab", metavar="MODULE", help="Let the page attack this stack, with this module."),
    ] = None,
    proofs: Annotated[
        Path | None,
        typer.Option("--proofs", metavar="FILE", help="What the page says is proved (of `make proof`)."),
    ] = None,
) -> None:
    """Run the stack here until Ctrl-C (a second one hurries), or with --detach in the background."""
    _forget_aws_settings()
    console = make_console()
    ports = _ports(use_port or [])
    if port is not None:
        ports["page"] = port
    progress = Progress(console)
    try:
        options = StackOptions(
            state_dir=state or default_state_directory(),
            ports=ports,
            free_ports=free_ports,
            svid_ttl=svid_ttl,
            ca_ttl=ca_ttl,
            rotate_every=rotate_every,
            http=http,
            loop=loop,
            log_level=log_level,
            lab=lab,
            proofs=proofs,
            report=progress,
        )
    except ValueError as error:
        raise StackError(f"{error}.") from error
    if detach:
        _detach(console, StateDirectory(options.state_dir))
        return
    status = asyncio.run(_up(options, console, progress))
    if status is not ExitStatus.OK:
        raise typer.Exit(status)


async def _up(options: StackOptions, console: Console, progress: Progress) -> ExitStatus:
    from .stack import Stack

    began = time.monotonic()
    stack = Stack(options)
    console.print("Starting the stack (Ctrl-C stops it)")
    async with stop_signals(stack.hurry, console) as stop:
        starting = asyncio.create_task(stack.start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                console.print("Stopped before it was up.")
                return ExitStatus.INTERRUPTED
            await starting
            with _supervisor_log(stack.state):
                _print_ready(console, stack.urls.page, stack.described_processes(), stack.state, began)
                await stop.wait()
                console.print("Stopping")
                await stack.close()
        finally:
            stopping.cancel()
            progress.close()
    console.print("Stopped.")
    return ExitStatus.OK


def _print_ready(
    console: Console, page: str, processes: list[dict[str, Any]], state: StateDirectory, began: float
) -> None:
    console.print(f"\nReady in {time.monotonic() - began:.1f} s: the page is at [bold]{page}[/]\n")
    own = {
        "name": "ztdev",
        "pid": os.getpid(),
        "address": str(state.read().get("sockets", "")),
        "identity": "Workload API, certificate authority, token issuer",
    }
    console.print(process_table([*processes, own]), soft_wrap=True)
    where = "" if state.path == default_state_directory().absolute() else f" --state {state.path}"
    console.print(
        f"\nLogs are in {escape(str(state.logs))}. In another terminal:\n"
        + "".join(
            f"  {program_name()} {command}{where}\n" for command in ("status", "order", "rotate", "logs -f")
        )
        + "Ctrl-C stops.\n",
        soft_wrap=True,
    )


@contextlib.contextmanager
def _supervisor_log(state: StateDirectory) -> Iterator[None]:
    """What libraries in this process have to say goes into a file, not over the terminal."""
    log = LogFile(state.logs / "supervisor.log")

    class ToFile(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.feed((self.format(record) + "\n").encode(errors="replace"))

    handler = ToFile()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        log.close()


def _ports(words: list[str]) -> dict[str, int]:
    ports: dict[str, int] = {}
    for word in words:
        name, found, number = word.partition("=")
        if not found or not number.isdecimal():
            raise typer.BadParameter(f"{word!r} is not NAME=NUMBER", param_hint="--use-port")
        ports[name] = int(number)
    return ports


def _detach(console: Console, state: StateDirectory) -> None:
    """Run `up` again without --detach, in a session of its own, and follow what it prints until it is up."""
    state.prepare()
    if state.in_use():
        state.lock()  # raises, with the words for this
    arguments = [word for word in sys.argv[1:] if word not in ("--detach", "-d")]
    output = LogFile(state.logs / "up.log")
    path = output.path
    output.close()
    with path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ztdev", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with path.open(errors="replace") as shown:
        try:
            while True:
                ended = process.poll()
                for line in shown:
                    console.print(escape(line.rstrip("\n")), soft_wrap=True)
                if ended is not None:
                    raise typer.Exit(ended or ExitStatus.FAILED)
                data = state.read()
                reference = ProcessRef.parse(data.get("supervisor"))
                if data.get("phase") == "ready" and reference and reference.pid == process.pid:
                    break
                time.sleep(0.05)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    console.print(f"It runs in the background: `ztdev down --state {state.path}` ends it.", soft_wrap=True)


# -- status, down, logs


@app.command()
def status(
    state: StateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Say what runs, whether it is ready, and what is wrong where it is not.

    Exit status 0 when all is ready, 1 when something is not, 3 when nothing runs.
    """
    directory, data = _running(state)
    processes = probe_all(data.get("processes", []))
    ready = data.get("phase") == "ready" and all(process["ready"] for process in processes)
    if as_json:
        report = {
            "state": str(directory.path),
            "phase": data.get("phase"),
            "ready": ready,
            "supervisor": data.get("supervisor"),
            "urls": data.get("urls"),
            "ports": data.get("ports"),
            "processes": processes,
        }
        print(json.dumps(report, indent=2))
    else:
        _print_status(make_console(), data, processes)
    if not ready:
        raise typer.Exit(ExitStatus.FAILED)


def _print_status(console: Console, data: dict[str, Any], processes: list[dict[str, Any]]) -> None:
    page = data.get("urls", {}).get("page", "")
    up_for = max(0, time.time() - float(data.get("started_at", 0)))
    console.print(f"{data.get('phase')}, for {_duration(up_for)}; the page is at [bold]{page}[/]\n")
    states = {}
    for process in processes:
        text = process["state"]
        own = process.get("identity_status") or {}
        if process["ready"] and own.get("seconds_left") is not None:
            text += f", SVID valid for {own['seconds_left']:.0f} s more"
        if process["restarts"]:
            text += f", restarted {process['restarts']} times"
        states[process["name"]] = text
    console.print(process_table(processes, ready=states), soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@app.command()
def down(
    state: StateOption = None,
    if_running: Annotated[bool, typer.Option("--if-running", help="Nothing to stop is no error.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="Then the supervisor is killed.")
    ] = 45.0,
) -> None:
    """Stop the stack: callers first, each drains; then the database and the rest. Data stays."""
    console = make_console()
    directory = StateDirectory(state or default_state_directory())
    supervisor = directory.supervisor() if directory.in_use() else None
    if supervisor is None and not _has_leftovers(directory):
        if if_running:
            return
        raise NotRunning(f"No stack runs in {directory.path}.")
    asyncio.run(_down(console, directory, supervisor, timeout))


async def _down(
    console: Console, directory: StateDirectory, supervisor: ProcessRef | None, timeout: float
) -> None:
    began = time.monotonic()
    if supervisor is not None:
        console.print(f"Stopping the stack in {directory.path} (process {supervisor.pid})", soft_wrap=True)
        supervisor.signal(signal.SIGTERM)
        if await wait_gone([supervisor], timeout):
            console.print(f"It does not stop within {timeout:g} s: it is killed.")
            await end_processes([supervisor], grace=0)
    directory.lock()
    try:
        for name in await directory.end_leftovers():
            console.print(f"Ended what was left: {name}")
        directory.write(directory.read() | {"phase": "stopped", "supervisor": None, "processes": []})
    finally:
        directory.unlock()
    console.print(f"Stopped after {time.monotonic() - began:.1f} s. Its data is in {directory.path}.")


def _has_leftovers(directory: StateDirectory) -> bool:
    references = (
        ProcessRef.parse(process.get("ref"))
        for process in directory.read().get("processes", [])
        if isinstance(process, dict)
    )
    return any(reference is not None and reference.alive() for reference in references)


@app.command()
def logs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Whose: orders, identity, rotation, … (default: all)"),
    ] = None,
    state: StateOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many old lines of each.")] = 50,
    raw: Annotated[bool, typer.Option("--raw", help="As they were written, for programs.")] = False,
) -> None:
    """Show the logs for people: decisions, errors, what happened."""
    directory = StateDirectory(state or default_state_directory())
    known = sorted(path.stem for path in directory.logs.glob("*.log"))
    if not known:
        raise NotRunning(f"There are no logs in {directory.logs}: nothing has run with this state directory.")
    wanted = names or [name for name in (*SERVICES, "identity", "rotation") if name in known]
    for name in wanted:
        if name not in known:
            raise StackError(f"There is no log of {name!r}. There is: {', '.join(known)}.")
    show = _LogLines(make_console(), raw=raw, prefix=len(wanted) > 1)
    tails = {name: Tail(directory.logs / f"{name}.log") for name in wanted}
    for name, tail in tails.items():
        old = tail.read()
        show(name, old[-lines:] if lines else [])
    with contextlib.suppress(KeyboardInterrupt):
        while follow:
            time.sleep(0.2)
            for name, tail in tails.items():
                show(name, tail.read())


class _LogLines:
    def __init__(self, console: Console, *, raw: bool, prefix: bool) -> None:
        self._console, self._raw, self._prefix = console, raw, prefix

    def __call__(self, name: str, lines: list[str]) -> None:
        for line in lines:
            if self._raw:
                print(line, flush=True)
                continue
            text = readable(line)
            head = f"[cyan]{name:9}[/] " if self._prefix else ""
            colour = (
                "red" if " deny " in text else "yellow" if " error " in text or " warning " in text else ""
            )
            body = f"[{colour}]{escape(text)}[/]" if colour else escape(text)
            self._console.print(head + body, soft_wrap=True)


# -- order, demo


@app.command()
def order(
    items: Annotated[
        list[str] | None,
        typer.Argument(metavar="SKU=QUANTITY", help="What to order. (default: one of the first thing)"),
    ] = None,
    state: StateOption = None,
    url: Annotated[
        str | None, typer.Option("--url", help="The page's address. (default: that of the running stack)")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The order and its chain as one JSON document.")
    ] = False,
) -> None:
    """Place an order through the page as a person does, and show the chain that carried it.

    Exit status 0 when it is paid, 1 when it is not.
    """
    wanted = parse_items(items or [])
    if url is None:
        _, data = _running(state)
        url = data.get("urls", {}).get("page")
        if not url:
            raise NotReady("The stack is still starting: see `ztdev status`.")
    with Visitor(url) as visitor:
        document = visitor.order(wanted)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        make_console().print(chain_tree(document), soft_wrap=True)
    if document["order"]["status"] != "paid":
        raise typer.Exit(ExitStatus.FAILED)


@app.command()
def rotate(
    services: Annotated[
        list[str] | None, typer.Argument(metavar="SERVICE", help="Whose. (default: orders and payments)")
    ] = None,
    break_at: Annotated[
        Literal["createSecret", "setSecret", "testSecret", "finishSecret"] | None,
        typer.Option(
            "--break",
            metavar="STEP",
            help="Cut it off where this step would begin: createSecret, setSecret, testSecret, finishSecret. "
            "Nothing breaks, and the next rotation goes on with it.",
        ),
    ] = None,
    state: StateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Rotate the database passwords now, as the schedule would, and wait until it is done.

    The services take up a new version by themselves: the page shows when.
    """
    from .rotation import Rotation

    for service in services or []:
        if service not in DATABASE_SERVICES:
            known = " and ".join(DATABASE_SERVICES)
            raise typer.BadParameter(f"{service!r} has no database: {known} have", param_hint="SERVICE")
    _, data = _running(state)
    if data.get("phase") != "ready" or not data.get("sockets"):
        raise NotReady("The stack is still starting: see `ztdev status`.")
    rotations: list[dict[str, Any]] = []
    console = make_console()
    for service in services or DATABASE_SERVICES:
        rotations.append(
            ask(Path(data["sockets"]), "rotate", timeout=_ROTATE_WITHIN, service=service, cut_off_at=break_at)
        )
        if not as_json:
            console.print(f"[bold]{service:9}[/] {Rotation.from_dict(rotations[-1])}", soft_wrap=True)
    if as_json:
        print(json.dumps({"rotations": rotations}, indent=2))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary state directory.")] = False,
) -> None:
    """Start a stack apart, order, show the chain, make two calls that are refused, rotate passwords, stop.

    Uses free ports and a temporary state directory, so it does not touch a stack that runs. Exit status 0
    when everything went as it should, refusals included.
    """
    from .demo import run_demo

    _forget_aws_settings()
    console = make_console()
    folder = Path(tempfile.mkdtemp(prefix="zt-demo-"))
    progress = Progress(console)
    options = StackOptions(
        state_dir=folder,
        free_ports=True,
        report=progress,
        # Nobody waits here for as long as services usually do before they look for a new version.
        environment={service: {"DB_SECRET_MAX_AGE_SECONDS": "1"} for service in DATABASE_SERVICES},
    )
    try:
        status = asyncio.run(run_demo(options, console, progress))
    finally:
        if keep:
            console.print(f"Its state is in {folder}.")
        else:
            _remove(folder)
    if status is not ExitStatus.OK:
        raise typer.Exit(status)


@app.command()
def prepare() -> None:
    """Install and unpack now what a first start would, so that the next one is quick."""
    from .aws.environment import ensure_environment
    from .functions import kept

    console = make_console()
    progress = Progress(console)
    steps = Steps(progress)
    tools = StackOptions().tools_dir
    with steps.step("environment of the local AWS") as detail:
        asyncio.run(ensure_environment(tools / "aws-env", steps.notice))
        detail.text = str(tools / "aws-env")
    with steps.step("rotation function's package") as detail:
        detail.text = str(kept(tools / "packages").file)
    progress.close()


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _forget_aws_settings() -> None:
    """This process speaks to the stand-in for AWS only, by keys of its own. A profile or an endpoint that the
    shell names is meant for the real one: boto3 would look it up, and fail or mix them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]


def _running(state: Path | None) -> tuple[StateDirectory, dict[str, Any]]:
    """The state of the running stack. Raises `NotRunning`."""
    directory = StateDirectory(state or default_state_directory())
    data = directory.read()
    if not directory.in_use() or not data:
        raise NotRunning(
            f"No stack runs in {directory.path}. Start one with `make run` or `ztdev up`"
            + ("." if state else ", or name its directory with --state DIR.")
        )
    return directory, data


# -- the program


def main() -> int:
    """Run the command line; the answer is the exit status."""
    command = typer.main.get_command(app)
    try:
        result = command.main(prog_name="ztdev", standalone_mode=False)
    except StackError as error:
        print_error(str(error))
        return int(error.exit_status)
    except KeyboardInterrupt:
        return int(ExitStatus.INTERRUPTED)
    except BrokenPipeError:
        # `ztdev logs | head`: nobody reads any more, and nobody wants to hear of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitStatus.OK)
    except Exception as error:
        return _usage_error(error)
    return result if isinstance(result, int) else int(ExitStatus.OK)


def _usage_error(error: Exception) -> int:
    """Errors of the command line show themselves; everything else is a fault of ours, shown whole."""
    show = getattr(error, "show", None)
    code = getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    if isinstance(code, int):  # typer.Exit
        return code
    raise error
