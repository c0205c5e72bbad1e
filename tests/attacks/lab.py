"""The attack lab: one attack, proved against a running stack.

    async with Stack(options) as stack:
        proof = await prove(attack, Lab(stack))

`prove` makes the rightful call, lets the attacker try, and reads the refusal back from the log of whoever
refused. Then it does all of this again with only this control left out; where another layer stops the attack
now, with that left out, too; until the attack succeeds. What it returns is what was seen; a proof that fails
says in `fault` what was otherwise than the attack declares.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.attacks.controls import ROOT
from tests.attacks.following import Followed, Line
from ztdev.aws.cloud import DatabaseAddress, LocalCloud
from ztdev.logfile import LogFile
from ztdev.logview import is_audit, parse_line
from ztdev.managed import ManagedProcess, ProcessSpec
from ztdev.options import DATABASE_SERVICES, spiffe_id
from ztdev.ports import choose_free_ports
from ztdev.stack import Stack
from ztmtls.svid import X509Svid

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Answer:
    """What an attacker got. `error` is set when there was no answer at all."""

    status: int | None = None
    reason: str | None = None
    error: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""

    @property
    def refused(self) -> bool:
        return self.status is None or self.status >= 400

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.status, self.reason, self.error) if part)


@dataclass(frozen=True, slots=True)
class Target:
    """Whom an attack is made on: its port on 127.0.0.1, and the decisions that it has written down.

    `tells_reason` says whether its lines hold the reason code; the Workload API's hold a sentence. `file` is
    one that the attacker writes, where the attack is about that. `place` is where an attacker of containers
    is: options of `docker run`.
    """

    name: str
    port: int
    lines: Callable[[], list[Line]]
    tells_reason: bool = True
    file: Path | None = None
    place: tuple[str, ...] = ()

    async def find(self, after: int, timeout: float = 10.0, **fields: Any) -> Line:
        """The first line from number `after` on that has `fields`. `TimeoutError` tells what came instead."""
        deadline = time.monotonic() + timeout
        seen = after
        while True:
            lines = self.lines()
            for line in lines[seen:]:
                if all(line.get(name) == value for name, value in fields.items()):
                    return line
            seen = len(lines)
            if time.monotonic() > deadline:
                shown = "\n".join(json.dumps(line) for line in lines[after:][-5:]) or "(none)"
                raise TimeoutError(f"no line of {self.name} has {fields}; the last ones:\n{shown}")
            await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Layer:
    """What stops an attack: the control, the reason code, more fields of its line in the log (None: it writes
    no line, and must tell the attacker its reason), and what is `told` where two give the same code.

    The line is a denial with this reason unless its fields say otherwise.
    """

    control: str
    reason: str
    line: Mapping[str, Any] | None = field(default_factory=dict)
    told: str = ""


# The first argument is the lab that the attack is made in: `Lab`, or that of the containers.
Call = Callable[[Any, Target], Awaitable[Answer]]
Step = Literal["rightful", "attempt", "refused", "without", "done"]

#: Whom a service takes a caller for that shows nothing, where it does not ask.
NOBODY = "spiffe://nobody.invalid"

LeftOut = tuple[str, ...]
"""The controls that are left out; nothing is, where there is none."""

Door = Callable[[Any, LeftOut], AbstractAsyncContextManager[Target]]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack, as its module declares it.

    rightful: the same deed by who may do it: it must succeed before anything is said about a refusal.
    attempt: the deed by the attacker.
    layers: what stops it, each with all before it left out. Without the last one it succeeds.
    door: where it is made; by default at the running service `target`, and at a second process of it where
        something is left out.
    """

    id: str
    title: str
    story: str
    target: str
    rightful: Call
    attempt: Call
    layers: tuple[Layer, ...]
    door: Door | None = None

    @property
    def first(self) -> Layer:
        """What refuses it."""
        return self.layers[0]

    @property
    def controls(self) -> LeftOut:
        """The controls of its layers, in their order."""
        return tuple(layer.control for layer in self.layers)

    @property
    def file(self) -> str:
        """Its module, from the root of the tree on."""
        return self.attempt.__module__.replace(".", "/") + ".py"

    def open(self, lab: Any, left_out: LeftOut) -> AbstractAsyncContextManager[Target]:
        """Where it is made, with `left_out` left out."""
        return (self.door or partial(_of_service, self.target))(lab, left_out)


def _of_service(name: str, lab: Lab, left_out: LeftOut) -> AbstractAsyncContextManager[Target]:
    if left_out:
        return lab.variant(left_out, name)
    return contextlib.nullcontext(lab.target(name))


@dataclass(frozen=True, kw_only=True)
class Stop:
    """How a layer stopped an attack: what the attacker saw, and the line of the log."""

    control: str
    reason: str
    seen: str
    line: Line


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was seen. `seen` is what the attacker saw, `line` the log of the refusal by `control`.

    `ablation` is what came of the same without `control`, ``succeeds`` or ``stopped-by:CONTROL``; `further`
    are those that stopped it then, one after the other, and `seen_without` is what the attacker saw without
    any.
    """

    attack: str
    control: str
    reason: str
    refused: bool = False
    audited: bool = False
    ablation: str = ""
    seen: str = ""
    line: Line = field(default_factory=dict)
    further: tuple[Stop, ...] = ()
    seen_without: str = ""
    seconds: float = 0.0
    fault: str = ""

    @property
    def ok(self) -> bool:
        return not self.fault

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def stopped(self, stop: Stop) -> Proof:
        """The same, with one more layer that stopped it."""
        if not self.refused:
            return replace(self, refused=True, audited=bool(stop.line), seen=stop.seen, line=stop.line)
        ablation = self.ablation or f"stopped-by:{stop.control}"
        return replace(self, ablation=ablation, further=(*self.further, stop))

    def succeeded(self, answer: Answer) -> Proof:
        """The same, with all layers left out."""
        return replace(self, ablation=self.ablation or "succeeds", seen_without=str(answer))


class Lab:
    """A running stack, and what attackers need: its doors, processes of their own, controls left out."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def target(self, name: str) -> Target:
        """A service of the stack, `identity` (the Workload API), `postgres`, or `cloud`."""
        stack = self.stack
        if name == "identity":
            lines = Followed(stack.state.logs / "identity.log", _json_line)
            return Target(name, 0, lines, tells_reason=False)
        if name == "postgres":
            lines = Followed(stack.state.logs / "postgres.log", _refusal_of_postgres)
            return Target(name, stack.ports.postgres, lines, tells_reason=False)
        if name == "cloud":
            return Target(name, stack.ports.cloud, Followed(stack.state.logs / "cloud.log", _json_line))
        port = stack.ports.page if name == "frontend" else getattr(stack.ports, name)
        return Target(name, port, Followed(stack.process(name).log.path, _audit_line))

    def svid(self, name: str, **changes: Any) -> X509Svid:
        """An SVID of the service account `name`, as `CertificateAuthority.issue` makes it."""
        return self.stack.ca.issue(spiffe_id(name), **changes)

    async def attack(
        self,
        target: Target,
        *requests: Mapping[str, Any],
        svid: X509Svid | None = None,
        tls: bool = True,
        maximum: str | None = None,
    ) -> Answer:
        """Requests by an attacker's process on one connection, presenting `svid`, or no certificate."""
        errand = {
            "port": target.port,
            "tls": (_pem(svid) | {"maximum": maximum}) if tls else None,
            "requests": requests,
        }
        return await self.attacker("attacker.py", errand)

    async def attacker(
        self, program: str, errand: Mapping[str, Any], admit: Callable[[int], None] = lambda _: None
    ) -> Answer:
        """Run one of the attacker's programs to its end, in an empty environment; `admit` gets its process
        id before it does anything."""
        async with _attacker(program) as process:
            admit(process.pid)
            output, _ = await process.communicate(json.dumps(errand).encode())
        if process.returncode != 0:
            raise RuntimeError(f"the attacker's {program} failed with {process.returncode}")
        return answer_of(json.loads(output))

    @contextlib.asynccontextmanager
    async def impostor(
        self, svid: X509Svid, program: str = "impostor.py", **errand: str
    ) -> AsyncIterator[int]:
        """An attacker's server that presents `svid`; gives its port."""
        async with _attacker(program, stderr=asyncio.subprocess.DEVNULL) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(_pem(svid) | errand).encode() + b"\n")
            yield int(await process.stdout.readline())

    @contextlib.asynccontextmanager
    async def variant(
        self,
        left_out: LeftOut,
        service: str,
        environment: Mapping[str, str] | None = None,
        *,
        ready: bool = True,
    ) -> AsyncIterator[Target]:
        """A second process of `service`, in which only `left_out` is left out (see `tests.attacks.without`),
        and in whose environment more may be set. With `ready` it is waited for."""
        port, probe = choose_free_ports(2)
        original = self.stack.process(service).spec
        name = f"{service}-without-{'-and-'.join(left_out) or 'nothing'}"
        launcher = ("-m", "tests.attacks.without", *left_out, "--") if left_out else ("-m",)
        # A frontend with something left out is no door to the lab, and knows no proofs.
        inherited = {k: v for k, v in original.environment.items() if k not in ("LAB_SOCKET", "PROOF_FILE")}
        spec = replace(
            original,
            name=name,
            argv=(sys.executable, *launcher, service),
            environment={
                **inherited,
                **(environment or {}),
                "PYTHONPATH": str(ROOT),
                "PORT": str(port),
                "PROBE_PORT": str(probe),
            },
            address=f"127.0.0.1:{port}",
            probe=f"http://127.0.0.1:{probe}",
            grace=3.0,
        )
        async with self._running(spec, service, ready) as process:
            yield Target(name, port, Followed(process.log.path, _audit_line, from_the_beginning=True))

    @contextlib.asynccontextmanager
    async def weak_cloud(self, control: str) -> AsyncIterator[tuple[LocalCloud, Target]]:
        """A second stand-in for AWS, with the same roles and issuer, in which only `control` is left out (see
        `tests.attacks.weak_cloud`)."""
        (port,) = choose_free_ports(1)
        log = self.stack.state.logs / f"cloud-without-{control}.log"
        with tempfile.TemporaryDirectory(prefix="zt-cloud-") as folder:
            cloud = _WeakCloud(
                Path(folder),
                control=control,
                port=port,
                issuer=self.stack.issuer,
                log_file=log,
                databases={
                    service: DatabaseAddress("127.0.0.1", self.stack.ports.postgres)
                    for service in DATABASE_SERVICES
                },
                environment_dir=self.stack.options.tools_dir / "aws-env",
            )
            async with cloud:
                yield cloud, Target("cloud", port, Followed(log, _json_line))

    @contextlib.asynccontextmanager
    async def _running(self, spec: ProcessSpec, workload: str, ready: bool) -> AsyncIterator[ManagedProcess]:
        registrations = self.stack.workload_api.workloads[workload]
        process = ManagedProcess(
            spec,
            LogFile(self.stack.state.logs / f"{spec.name}.log"),
            admit=lambda each: registrations.allow(pid=each.pid),
        )
        pid = 0
        try:
            await process.start()
            pid = process.pid or 0
            if ready:
                await process.wait_ready(30.0)
            yield process
        finally:
            await process.stop()
            if pid:
                await registrations.disallow(pid=pid)


@contextlib.asynccontextmanager
async def _attacker(program: str, **more: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of an attacker, which does not outlive its attack."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(HERE / program),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={},
        **more,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class _WeakCloud(LocalCloud):
    def __init__(self, state_dir: Path, *, control: str, **more: Any) -> None:
        super().__init__(state_dir, **more)
        self._control = control

    def _program(self) -> tuple[str, ...]:
        *_, gate = super()._program()
        return "-I", "-B", str(HERE / "weak_cloud.py"), self._control, gate


Report = Callable[[Step, Proof], None]


async def prove(attack: Attack, lab: Any, report: Report = lambda step, proof: None) -> Proof:
    """Run one attack. Never raises for what went otherwise than declared: `Proof.fault` tells.

    `report` hears of each step as it begins, with what has been seen by then: the `rightful` call, the
    `attempt`, that it was `refused`, the attempt `without` one control more, and `done`.
    """
    began = time.monotonic()
    proof = Proof(attack=attack.id, control=attack.first.control, reason=attack.first.reason)

    def tell(step: Step, so_far: Proof) -> None:
        nonlocal proof
        proof = so_far
        report(step, so_far)

    fault = ""
    try:
        async with asyncio.timeout(90.0):
            await _prove(attack, lab, proof, tell)
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        fault = "CancelledError: something that the attack waited for was cancelled"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    proof = replace(proof, fault=fault)
    proof = replace(proof, seconds=round(time.monotonic() - began, 2))
    report("done", proof)
    return proof


class NotProved(AssertionError):
    """The stack did something else than the attack declares."""


async def _prove(attack: Attack, lab: Any, proof: Proof, tell: Report) -> None:
    tell("rightful", proof)
    for number, layer in enumerate(attack.layers):
        async with attack.open(lab, attack.controls[:number]) as target:
            await _rightful(attack, lab, target)
            tell("without" if number else "attempt", proof)
            mark = len(target.lines())
            answer = await attack.attempt(lab, target)
            if not answer.refused:
                raise NotProved(f"{layer.control} did not stop the attack: {answer}")
            line = await _stopped_by(layer, target, mark, answer)
        stop = Stop(control=layer.control, reason=layer.reason, seen=str(answer), line=line)
        proof = proof.stopped(stop)
        tell("without" if number else "refused", proof)
    async with attack.open(lab, attack.controls) as target:
        await _rightful(attack, lab, target)
        answer = await attack.attempt(lab, target)
    if answer.refused:
        raise NotProved(f"stopped without {', '.join(attack.controls)} by what nobody named: {answer}")
    tell("without", proof.succeeded(answer))


async def _rightful(attack: Attack, lab: Any, target: Target) -> None:
    answer = await attack.rightful(lab, target)
    if answer.refused:
        raise NotProved(f"the rightful call to {target.name} was refused: {answer}")


async def _stopped_by(layer: Layer, target: Target, mark: int, answer: Answer) -> Line:
    """The line of the log by which `layer` refused; what the attacker was told must not contradict it."""
    if answer.reason not in (None, layer.reason):
        raise NotProved(f"refused for {answer.reason}, not for {layer.reason}: {answer}")
    if layer.told not in (answer.error or answer.body):
        raise NotProved(f"refused by another layer: {answer}")
    if layer.line is None:
        if answer.reason is None:
            raise NotProved(f"no reason was told, and none is written down: {answer}")
        return {}
    wanted: dict[str, Any] = {"reason": layer.reason} if target.tells_reason else {}
    wanted = {"decision": "deny"} | wanted | dict(layer.line)
    return await target.find(mark, **wanted)


def answer_of(data: Mapping[str, Any]) -> Answer:
    """The answer that an attacker's process wrote down, with the reason of its problem document."""
    reason = data.get("reason")
    if "json" in str(
        {name.lower(): value for name, value in data.get("headers", {}).items()}.get("content-type")
    ):
        document = json.loads(data["body"])
        reason = document.get("reason") if isinstance(document, dict) else None
    return Answer(**{**data, "reason": reason})


def _pem(svid: X509Svid | None) -> dict[str, Any]:
    if svid is None:
        return {}
    key = svid.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in svid.chain)
    return {"chain": chain.decode(), "key": key.decode()}


def _json_line(text: str) -> list[Line]:
    data = parse_line(text)
    return [] if data is None else [data]


def _audit_line(text: str) -> list[Line]:
    return [data for data in _json_line(text) if is_audit(data)]


def _refusal_of_postgres(text: str) -> list[Line]:
    """What PostgreSQL wrote about whom it refused: `message` in its own words."""
    return [
        {"decision": "deny", "severity": severity, "message": text.partition(f"{severity}:  ")[2]}
        for severity in ("FATAL", "ERROR")
        if f"{severity}:  " in text
    ]
