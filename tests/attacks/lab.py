"""The attack lab: one attack, proved against a running stack.

    async with Stack(options) as stack:
        proof = await prove(attack, Lab(stack))

`prove` makes the rightful call, lets the attacker try, reads the refusal back from the log of whoever
refused, and tries the same again with only this control left out. What it returns is what was seen; a proof
that fails says in `fault` what was otherwise than the attack declares.
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
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.attacks.controls import ROOT
from ztdev.aws.cloud import DatabaseAddress, LocalCloud
from ztdev.logfile import LogFile
from ztdev.logview import is_audit, parse_line
from ztdev.managed import ManagedProcess, ProcessSpec
from ztdev.options import DATABASE_SERVICES, spiffe_id
from ztdev.ports import choose_free_ports
from ztdev.stack import Stack
from ztmtls.svid import X509Svid

HERE = Path(__file__).parent

Line = dict[str, Any]


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
    one that the attacker can write, where the attack is about that.
    """

    name: str
    port: int
    lines: Callable[[], list[Line]]
    tells_reason: bool = True
    file: Path | None = None

    async def find(self, after: int, timeout: float = 10.0, **fields: Any) -> Line:
        """The first line from number `after` on that has `fields`. `TimeoutError` tells what came instead."""
        deadline = time.monotonic() + timeout
        while True:
            lines = self.lines()[after:]
            for line in lines:
                if all(line.get(name) == value for name, value in fields.items()):
                    return line
            if time.monotonic() > deadline:
                shown = "\n".join(json.dumps(line) for line in lines[-5:]) or "(none)"
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


Call = Callable[["Lab", Target], Awaitable[Answer]]
Step = Literal["rightful", "attempt", "refused", "without", "done"]
Ablation = Callable[["Lab"], AbstractAsyncContextManager[Target]]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack, as its module declares it.

    rightful: the same deed by who may do it: it must succeed before anything is said about a refusal.
    attempt: the deed by the attacker.
    first: what refuses it.
    second: what stops it with `first.control` left out; None when nothing does.
    against: another door than that of the running service `target`.
    without: another way to leave the control out than a service started by `tests.attacks.without`.
    """

    id: str
    title: str
    story: str
    target: str
    rightful: Call
    attempt: Call
    first: Layer
    second: Layer | None = None
    against: Ablation | None = None
    without: Ablation | None = None

    @property
    def file(self) -> str:
        """Its module, from the root of the tree on."""
        return self.attempt.__module__.replace(".", "/") + ".py"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was seen. `seen` is what the attacker saw, `line` the log of the refusal."""

    attack: str
    control: str
    reason: str
    refused: bool = False
    audited: bool = False
    ablation: str = ""
    seen: str = ""
    line: Line = field(default_factory=dict)
    seen_without: str = ""
    line_without: Line = field(default_factory=dict)
    seconds: float = 0.0
    fault: str = ""

    @property
    def ok(self) -> bool:
        return not self.fault

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Lab:
    """A running stack, and what attackers need: its doors, processes of their own, controls left out."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def target(self, name: str) -> Target:
        """A service of the stack, `identity` (the Workload API), `postgres`, or `cloud`."""
        stack = self.stack
        if name == "identity":
            log = stack.state.logs / "identity.log"
            return Target(name, 0, lambda: _json_lines(log.read_text().splitlines()), tells_reason=False)
        if name == "postgres":
            return Target(name, stack.ports.postgres, self._fatal_lines, tells_reason=False)
        if name == "cloud":
            log = stack.state.logs / "cloud.log"
            return Target(name, stack.ports.cloud, lambda: _json_lines(log.read_text().splitlines()))
        port = stack.ports.page if name == "frontend" else getattr(stack.ports, name)
        return _service(name, port, stack.process(name).log)

    def _fatal_lines(self) -> list[Line]:
        """What PostgreSQL wrote about those whom it refused: `message` in its own words."""
        text = (self.stack.state.logs / "postgres.log").read_text(errors="replace")
        return [
            {"decision": "deny", "severity": severity, "message": line.partition(f"{severity}:  ")[2]}
            for line in text.splitlines()
            for severity in ("FATAL", "ERROR")
            if f"{severity}:  " in line
        ]

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
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(HERE / program),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={},
        )
        admit(process.pid)
        output, _ = await process.communicate(json.dumps(errand).encode())
        if process.returncode != 0:
            raise RuntimeError(f"the attacker's {program} failed with {process.returncode}")
        return answer_of(json.loads(output))

    @contextlib.asynccontextmanager
    async def impostor(self, svid: X509Svid, program: str = "impostor.py") -> AsyncIterator[int]:
        """An attacker's server that presents `svid`; gives its port."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(HERE / program),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(_pem(svid)).encode() + b"\n")
            yield int(await process.stdout.readline())
        finally:
            process.stdin.close()
            await process.wait()

    @contextlib.asynccontextmanager
    async def variant(
        self,
        control: str | None,
        service: str,
        environment: Mapping[str, str] | None = None,
        *,
        ready: bool = True,
    ) -> AsyncIterator[Target]:
        """A second process of `service`, in which only `control` is left out (see `tests.attacks.without`) or
        nothing, and in whose environment more may be set. With `ready` it is waited for."""
        port, probe = choose_free_ports(2)
        original = self.stack.process(service).spec
        name = f"{service}-without-{control or 'nothing'}"
        launcher = ("-m", "tests.attacks.without", control, "--") if control else ("-m",)
        spec = replace(
            original,
            name=name,
            argv=(sys.executable, *launcher, service),
            environment={
                **original.environment,
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
            yield _service(name, port, process.log)

    @contextlib.asynccontextmanager
    async def weak_cloud(self, control: str) -> AsyncIterator[Target]:
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
                yield Target("cloud", port, lambda: _json_lines(log.read_text().splitlines()))

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


class _WeakCloud(LocalCloud):
    def __init__(self, state_dir: Path, *, control: str, **more: Any) -> None:
        super().__init__(state_dir, **more)
        self._control = control

    def _program(self) -> tuple[str, ...]:
        *_, gate = super()._program()
        return "-I", "-B", str(HERE / "weak_cloud.py"), self._control, gate


Report = Callable[[Step, Proof], None]


async def prove(attack: Attack, lab: Lab, report: Report = lambda step, proof: None) -> Proof:
    """Run one attack. Never raises for what went otherwise than declared: `Proof.fault` tells.

    `report` hears of each step as it begins, with what has been seen by then: the `rightful` call, the
    `attempt`, that it was `refused`, the attempt `without` the control, and `done`.
    """
    began = time.monotonic()
    proof = Proof(attack=attack.id, control=attack.first.control, reason=attack.first.reason)

    def tell(step: Step, so_far: Proof) -> None:
        nonlocal proof
        proof = so_far
        report(step, so_far)

    try:
        async with asyncio.timeout(60.0):
            await _refusal(attack, lab, proof, tell)
            proof = await _ablation(attack, lab, proof, tell)
    except Exception as error:
        proof = replace(proof, fault=f"{type(error).__name__}: {error}")
    proof = replace(proof, seconds=round(time.monotonic() - began, 2))
    report("done", proof)
    return proof


class NotProved(AssertionError):
    """The stack did something else than the attack declares."""


async def _refusal(attack: Attack, lab: Lab, proof: Proof, tell: Report) -> None:
    door = attack.against or (lambda lab: contextlib.nullcontext(lab.target(attack.target)))
    tell("rightful", proof)
    async with door(lab) as target:
        await _rightful(attack, lab, target)
        tell("attempt", proof)
        mark = len(target.lines())
        answer = await attack.attempt(lab, target)
        if not answer.refused:
            raise NotProved(f"the attack succeeded: {answer}")
        line = await _stopped_by(attack.first, target, mark, answer)
    tell("refused", replace(proof, refused=True, audited=bool(line), seen=str(answer), line=line))


async def _ablation(attack: Attack, lab: Lab, proof: Proof, tell: Report) -> Proof:
    leave_out = attack.without or (lambda lab: lab.variant(attack.first.control, attack.target))
    tell("without", proof)
    async with leave_out(lab) as target:
        await _rightful(attack, lab, target)
        mark = len(target.lines())
        answer = await attack.attempt(lab, target)
        proof = replace(proof, seen_without=str(answer))
        if not answer.refused:
            if attack.second is not None:
                raise NotProved(f"{attack.second.control} did not stop the attack: {answer}")
            return replace(proof, ablation="succeeds")
        if attack.second is None:
            raise NotProved(f"stopped without {attack.first.control}, by what nobody named: {answer}")
        line = await _stopped_by(attack.second, target, mark, answer)
        return replace(proof, ablation=f"stopped-by:{attack.second.control}", line_without=line)


async def _rightful(attack: Attack, lab: Lab, target: Target) -> None:
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


def _service(name: str, port: int, log: LogFile) -> Target:
    return Target(name, port, lambda: [line for line in _json_lines(log.lines()) if is_audit(line)])


def _json_lines(lines: Any) -> list[Line]:
    return [data for data in map(parse_line, lines) if data is not None]
