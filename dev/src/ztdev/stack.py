"""The whole demo on one machine, as a library: `async with Stack(StackOptions()) as stack`.

What starts, in this order, at the same time where nothing forbids it:

    state directory, lock, leftovers, ports
    identity     a certificate authority and the Workload API, in this process; one socket per workload
    AWS          the OIDC issuer, the token files of the service accounts, the rotation function's package,
                 and the stand-in with workload.yaml in it
    database     PostgreSQL with TLS
    logins       the deployed secrets' passwords are set in the database; the secrets get their schedule
    migrations   each with its own identity, to their end
    services     payments, orders, frontend: processes of their own, watched and started again when they die
    attack lab   when the options name one: what the page's attacks run in
    rotation     the secrets are rotated when they are due, and when `ztdev rotate` asks

A service is admitted to its identity by its process id, right after the process was made and before its
program runs. It gets an explicit environment, nothing of the caller's. Stopping goes the other way round and
leaves no process and no socket behind, also when this process is killed: every child asks the kernel to die
with it.

A `Stack` belongs to the event loop that started it; `BackgroundStack` runs one in a thread, for tests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from ztmtls.testing import Attestation, CertificateAuthority, RotationEvent, WorkloadApi

from .aws.cloud import DatabaseAddress, LocalCloud, RotationFunction
from .aws.issuer import OidcIssuer, TokenFile
from .control import Control, Request
from .errors import ProgramMissing, StackError, explain_os_error
from .events import Steps
from .functions import Package, kept
from .logfile import LogFile, log_line
from .logins import owner_secret, secret, set_passwords
from .logview import is_audit, parse_line
from .managed import ManagedProcess, ProcessSpec, ProcessState, base_environment, describe_exit
from .options import (
    DATABASE_SERVICES,
    NAMESPACE,
    SERVICES,
    TRUST_DOMAIN,
    StackOptions,
    spiffe_id,
)
from .ports import HOST, Ports, refuse_taken_ports, resolve_ports
from .postgres import PostgresServer
from .processes import ProcessRef
from .rotation import Rotations
from .state import StateDirectory, now

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MIGRATION_TIMEOUT = 60.0

#: What a service gets beyond its own drain and grace before it is killed.
_STOP_MARGIN = 5.0

#: Seconds before a part that ended by itself (database, local AWS) is started again, doubled up to the last.
_FIRST_DELAY, _LAST_DELAY = 0.5, 15.0


@dataclass(frozen=True, slots=True)
class Urls:
    """Where things are. `orders` and `payments` speak mutual TLS only; probes are plain HTTP."""

    page: str
    orders: str
    payments: str
    probes: Mapping[str, str]
    cloud: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "page": self.page,
            "orders": self.orders,
            "payments": self.payments,
            "probes": dict(self.probes),
            "cloud": self.cloud,
        }


def _urls(ports: Ports) -> Urls:
    return Urls(
        page=f"http://{HOST}:{ports.page}",
        orders=f"https://{HOST}:{ports.orders}",
        payments=f"https://{HOST}:{ports.payments}",
        probes=MappingProxyType(
            {name: f"http://{HOST}:{getattr(ports, f'{name}_probe')}" for name in SERVICES}
        ),
        cloud=f"http://{HOST}:{ports.cloud}",
    )


class Stack:
    """One stack. Attributes are there once it is started; see the module's text for what that means.

    ca, workload_api: what gives identities; `ca.issue(...)` makes certificates for attacks and tests.
    issuer, cloud, postgres: the parts that the services depend on.
    rotations: rotates the database secrets.
    ports, urls: where everything listens.
    timings: seconds that each step of the start has taken.
    """

    def __init__(self, options: StackOptions | None = None) -> None:
        self.options = options or StackOptions()
        self.state = StateDirectory(self.options.state_dir)
        self.ports: Ports
        self.urls: Urls
        self.ca: CertificateAuthority
        self.workload_api: WorkloadApi
        self.issuer: OidcIssuer
        self.cloud: LocalCloud
        self.postgres: PostgresServer
        self.rotations: Rotations
        self.tokens: dict[str, TokenFile] = {}
        self._steps = Steps(self.options.report)
        self._services: dict[str, ManagedProcess] = {}
        self._jobs: dict[str, ManagedProcess] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._identity_log: LogFile | None = None
        self._rotation_log: LogFile | None = None
        self._control: Control | None = None
        self._lab = AsyncExitStack()
        self._hurry = asyncio.Event()
        self._closing = asyncio.Lock()
        self._phase = "new"
        self._started_at = 0.0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def phase(self) -> str:
        """new, starting, ready, stopping, stopped."""
        return self._phase

    @property
    def timings(self) -> Mapping[str, float]:
        return MappingProxyType(self._steps.timings)

    def process(self, name: str) -> ManagedProcess:
        """A service's process: `pid`, `restarts`, `restart()`, `wait_ready()`. KeyError if there is none."""
        return self._services[name]

    # -- what the services have decided

    def audit(self, service: str) -> list[dict[str, Any]]:
        """Every audit line that a service has written in this run and that is still kept, oldest first."""
        found = (parse_line(line) for line in self._services[service].log.lines())
        return [data for data in found if data is not None and is_audit(data)]

    async def wait_for_audit(
        self, service: str, *, timeout: float = 10.0, after: int = 0, **fields: Any
    ) -> dict[str, Any]:
        """The first audit line of `service`, from number `after` on, whose `fields` have these values. It is
        waited for, as it passes through a pipe. Raises `TimeoutError` with the lines that came instead."""
        deadline = time.monotonic() + timeout
        while True:
            lines = self.audit(service)[after:]
            for line in lines:
                if all(line.get(name) == value for name, value in fields.items()):
                    return line
            if time.monotonic() > deadline:
                shown = "\n".join(json.dumps(line) for line in lines[-10:]) or "(none)"
                raise TimeoutError(f"no audit line of {service} has {fields}; the last ones:\n{shown}")
            await asyncio.sleep(0.02)

    # -- start

    async def start(self) -> None:
        """Start everything. Raises a `StackError` that says what to do; nothing is left running then."""
        if self._phase != "new":
            raise RuntimeError("a stack is started once: make another one")
        self._phase, self._started_at = "starting", now()
        try:
            await self._start()
        except BaseException as error:
            await self.close()
            cause = _first_cause(error)
            if isinstance(cause, OSError) and not isinstance(cause, TimeoutError):
                explained = explain_os_error(cause, self.state.path)
                if explained is not None:
                    raise explained from error
            if cause is error:
                raise
            raise cause from error

    async def _start(self) -> None:
        if sys.platform != "linux":
            raise ProgramMissing("ztdev needs Linux: on another system run it in a virtual machine or WSL 2.")
        with self._steps.step("state directory") as detail:
            self.state.prepare()
            self.state.lock()
            for name in await self.state.end_leftovers():
                self._steps.notice(f"ended what an earlier run had left: {name}", "warning")
            self.ports = resolve_ports(self.options.ports, free=self.options.free_ports)
            self.urls = _urls(self.ports)
            refuse_taken_ports(self.ports)
            detail.text = str(self.state.path)
            self._save()
        self.postgres = self._postgres_server()
        await _together(self._start_identity(), self._start_cloud(), self._start_database())
        with self._steps.step("database logins") as detail:
            await self._set_passwords()
            await self.rotations.schedule()
            every = self.options.rotate_every
            detail.text = "passwords from the deployed secrets" + (
                f", new ones every {every:g} s" if every else ""
            )
        await _together(*(self._migrate(service) for service in DATABASE_SERVICES))
        await _together(*(self._start_service(service) for service in reversed(SERVICES)))
        await self._start_lab()
        self._watchers += [
            asyncio.create_task(self._watch("the database", self.postgres.wait, self._restart_database)),
            asyncio.create_task(self._watch("the local AWS", self.cloud.wait, self._restart_cloud)),
        ]
        if self.options.rotate_every:
            self._watchers.append(asyncio.create_task(self.rotations.run(), name="rotations"))
        self._control = Control(self.state.socket_directory(), {"rotate": self._rotate})
        await self._control.start()
        self._phase = "ready"
        self._save()

    async def _start_identity(self) -> None:
        with self._steps.step("Workload API") as detail:
            options = self.options
            self._identity_log = LogFile(self.state.logs / "identity.log")
            self.ca = CertificateAuthority(TRUST_DOMAIN, ttl=options.ca_ttl, svid_ttl=options.svid_ttl)
            self.workload_api = WorkloadApi(self.state.socket_directory(), on_attest=self._log_attestation)
            await self.workload_api.start()
            for service in SERVICES:
                await self.workload_api.add_workload(
                    service, spiffe_id(service), ca=self.ca, svid_ttl=options.svid_ttl
                )
            self.workload_api.keep_rotating(
                self.ca, svid_ttl=options.svid_ttl, ca_ttl=options.ca_ttl, on_event=self._log_rotation
            )
            detail.text = f"SVIDs live {options.svid_ttl:g} s, authorities {options.ca_ttl:g} s"

    async def _start_cloud(self) -> None:
        packaging = asyncio.create_task(self._package())
        try:
            with self._steps.step("web-identity issuer"):
                self.issuer = OidcIssuer(self.state.path / "oidc", port=self.ports.oidc)
                await self.issuer.start()
                for service in DATABASE_SERVICES:
                    self.tokens[service] = self._token_file(service)
                    await self.tokens[service].start()
            package = await packaging
        finally:
            packaging.cancel()
        with self._steps.step("local AWS") as detail:
            self.cloud = LocalCloud(
                self.state.path / "cloud",
                port=self.ports.cloud,
                issuer=self.issuer,
                log_file=self._fresh_log("cloud"),
                databases={
                    service: DatabaseAddress(HOST, self.ports.postgres) for service in DATABASE_SERVICES
                },
                rotation=RotationFunction(package.file, self.postgres.ca_file),
                environment_dir=self.options.tools_dir / "aws-env",
                on_process=lambda _: self._save(),
            )
            await self.cloud.start(self._steps.notice)
            self._save()
            detail.text = "infra/workload.yaml deployed"
        self._rotation_log = LogFile(self.state.logs / "rotation.log")
        self.rotations = Rotations(
            self.cloud, DATABASE_SERVICES, self.options.rotate_every, self._log_secret_rotation
        )

    async def _package(self) -> Package:
        with self._steps.step("rotation function's package"):
            return await asyncio.to_thread(kept, self.options.tools_dir / "packages")

    def _postgres_server(self) -> PostgresServer:
        return PostgresServer(
            self.state.path / "postgres",
            self.ports.postgres,
            log_file=self.state.logs / "postgres.log",
            # Root's server runs as another user, who may have no way into our directories.
            program_directory=self.options.tools_dir / "postgres" if os.geteuid() else None,
            notice=self._steps.notice,
        )

    async def _start_database(self) -> None:
        with self._steps.step("PostgreSQL"):
            await self.postgres.start()
            self._save()

    async def _set_passwords(self) -> None:
        await set_passwords(self.cloud, self.postgres, DATABASE_SERVICES)

    async def _migrate(self, service: str) -> None:
        account = f"{service}-migrate"
        with self._steps.step(f"migrations of {service}"):
            async with self._token_file(account) as token:
                job = ManagedProcess(
                    ProcessSpec(
                        name=account,
                        argv=(sys.executable, "-m", service, "migrate"),
                        environment=base_environment(self.state.home)
                        | {"LOG_LEVEL": self.options.log_level}
                        | self._database_environment(service, account, owner_secret(service), token),
                    ),
                    LogFile(self.state.logs / f"{account}.log"),
                    on_change=self._save,
                )
                self._jobs[account] = job
                try:
                    await job.run(_MIGRATION_TIMEOUT)
                finally:
                    del self._jobs[account]
                    job.log.close()

    async def _start_service(self, service: str) -> None:
        with self._steps.step(service) as detail:
            workload = self.workload_api.workloads[service]
            process = ManagedProcess(
                ProcessSpec(
                    name=service,
                    argv=(sys.executable, "-m", service),
                    environment=self._service_environment(service),
                    address=_address_of(self.urls, service),
                    identity=spiffe_id(service),
                    probe=self.urls.probes[service],
                    grace=self.options.drain + self.options.grace + _STOP_MARGIN,
                ),
                LogFile(self.state.logs / f"{service}.log"),
                admit=lambda process: workload.allow(pid=process.pid),
                notice=lambda text: self._steps.notice(text, "warning"),
                on_change=self._save,
            )
            self._services[service] = process
            await process.start()
            await process.wait_ready(self.options.ready_within)
            detail.text = process.spec.address

    async def _start_lab(self) -> None:
        if self.options.lab is None:
            return
        with self._steps.step("attack lab"):
            lab = import_module(self.options.lab)
            await self._lab.enter_async_context(lab.serve(self, self._lab_socket))

    @property
    def _lab_socket(self) -> Path:
        return self.state.socket_directory() / "lab.sock"

    # -- environments: whole, explicit, and all that a service gets to know

    def _service_environment(self, service: str) -> dict[str, str]:
        options = self.options
        environment = base_environment(self.state.home) | {
            "SPIFFE_ENDPOINT_SOCKET": self.workload_api.workloads[service].endpoint,
            "SPIFFE_ID": spiffe_id(service),
            "HOST": HOST,
            "PORT": str(self.ports.page if service == "frontend" else getattr(self.ports, service)),
            "PROBE_HOST": HOST,
            "PROBE_PORT": str(getattr(self.ports, f"{service}_probe")),
            "LOG_LEVEL": options.log_level,
            "HTTP": options.http,
            "LOOP": options.loop,
            "DRAIN_SECONDS": f"{options.drain:g}",
            "GRACE_SECONDS": f"{options.grace:g}",
        }
        if service == "frontend":
            environment |= {
                "MODE": "local",
                "ORDERS_URL": self.urls.orders,
                "ORDERS_SPIFFE_ID": spiffe_id("orders"),
            }
            if options.lab:
                environment["LAB_SOCKET"] = str(self._lab_socket)
            if options.proofs:
                environment["PROOF_FILE"] = str(options.proofs.absolute())
        if service == "orders":
            environment |= {
                "PAYMENTS_URL": self.urls.payments,
                "PAYMENTS_SPIFFE_ID": spiffe_id("payments"),
            }
        if service in DATABASE_SERVICES:
            environment |= self._database_environment(service, service, secret(service), self.tokens[service])
            if options.rotate_every:  # so that a new version is in use well before the next one
                environment["DB_SECRET_MAX_AGE_SECONDS"] = (
                    f"{min(60.0, max(1.0, options.rotate_every / 6)):g}"
                )
        return environment | dict(options.environment.get(service, {}))

    def _database_environment(
        self, service: str, account: str, secret: str, token: TokenFile
    ) -> dict[str, str]:
        return {
            "DB_HOST": HOST,
            "DB_PORT": str(self.ports.postgres),
            "DB_NAME": service,
            "DB_CA_FILE": str(self.postgres.ca_file),
            "DB_SECRET_ID": secret,
            "AWS_ROLE_ARN": self.cloud.role_arn(account),
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(token.path),
            "AWS_REGION": self.cloud.region,
            "AWS_ENDPOINT_URL": self.cloud.endpoint_url,
        }

    def _token_file(self, account: str) -> TokenFile:
        return TokenFile(
            self.state.path / "tokens" / account,
            self.issuer,
            service_account=account,
            namespace=NAMESPACE,
            on_error=lambda text: self._steps.notice(text, "error"),
        )

    # -- watching over the parts that are not services

    async def _watch(
        self, name: str, ended: Callable[[], Awaitable[int]], restart: Callable[[], Awaitable[None]]
    ) -> None:
        delay = _FIRST_DELAY
        while True:
            code = await ended()
            self._steps.notice(
                f"{name} ended ({describe_exit(code)}); starting it again in {delay:g} s", "warning"
            )
            self._save()
            while True:
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LAST_DELAY)
                try:
                    await restart()
                except (StackError, OSError) as error:
                    self._steps.notice(f"{name} does not start: {error}", "error")
                else:
                    break
            self._steps.notice(f"{name} is back")
            delay = _FIRST_DELAY
            self._save()

    async def _restart_database(self) -> None:
        await self.postgres.start()

    async def _restart_cloud(self) -> None:
        # It comes back empty, with new passwords: the database has to learn them, and the services read the
        # secrets again when their login is refused.
        async with self.rotations.held():
            await self.cloud.start()
            await self._set_passwords()

    # -- what other commands ask

    async def _rotate(self, request: Request) -> dict[str, Any]:
        """For `ztdev rotate`: `service`, and `cut_off_at` a step or None."""
        rotation = await self.rotations.rotate(request["service"], cut_off_at=request["cut_off_at"])
        return rotation.as_dict()

    # -- stop

    def hurry(self) -> None:
        """Stop without patience: whatever is being stopped, or will be, is killed. From the loop's thread."""
        self._hurry.set()

    async def close(self) -> None:
        """Stop everything, callers first, and leave nothing behind. Safe to call at any time, also twice."""
        async with self._closing:
            if self._phase in ("new", "stopped"):
                return
            self._phase = "stopping"
            if self._control is not None:
                await self._quietly(self._control.close())
            await self._quietly(self._lab.aclose())
            for watcher in self._watchers:
                watcher.cancel()
            await asyncio.gather(*self._watchers, return_exceptions=True)
            self._save()
            for service in SERVICES:
                if service in self._services:
                    await self._stop_service(self._services[service])
            await asyncio.gather(
                self._stop_part("PostgreSQL", "postgres", signal.SIGQUIT),
                self._stop_part("local AWS", "cloud", signal.SIGKILL),
            )
            for token in self.tokens.values():
                await self._quietly(token.stop())
            if hasattr(self, "issuer"):
                await self._quietly(self.issuer.stop())
            if hasattr(self, "workload_api"):
                await self._quietly(self.workload_api.close())
            for log in (self._identity_log, self._rotation_log):
                if log is not None:
                    log.close()
            self.state.remove_sockets()
            self._phase = "stopped"
            self._save()
            self.state.unlock()

    async def _stop_service(self, process: ManagedProcess) -> None:
        if process.state is ProcessState.NEW:
            return
        with self._steps.step(f"stop {process.name}") as detail:
            gentle = await self._unless_hurried(process.stop(), process.kill)
            detail.text = "" if gentle else "killed"

    async def _stop_part(self, title: str, attribute: str, harsh: signal.Signals) -> None:
        part: PostgresServer | LocalCloud | None = getattr(self, attribute, None)
        if part is None:
            return
        reference = ProcessRef.of(part.pid) if part.pid else None

        def kill() -> None:
            if reference is not None:
                reference.signal(harsh)

        with self._steps.step(f"stop {title}"):
            await self._quietly(self._unless_hurried(part.stop(), kill))

    async def _unless_hurried(self, stopping: Coroutine[Any, Any, T], kill: Callable[[], None]) -> T:
        task = asyncio.create_task(stopping)
        hurried = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait({task, hurried}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                kill()
            return await task
        finally:
            hurried.cancel()

    async def _quietly(self, stopping: Awaitable[object]) -> None:
        """One part that does not stop well must not keep the others from stopping."""
        try:
            await stopping
        except Exception as error:
            logger.exception("while stopping")
            self._steps.notice(f"while stopping: {error}", "error")

    # -- what is written down

    def _save(self) -> None:
        """For `status`, `down` and the next `up`. A full disk must not end what runs."""
        if not self.state.locked:
            return  # it belongs to another stack
        own = ProcessRef.of(os.getpid())
        data: dict[str, Any] = {
            "phase": self._phase,
            "supervisor": own.as_dict() if own and self._phase != "stopped" else None,
            "started_at": self._started_at,
            "processes": [] if self._phase == "stopped" else list(self._described_processes()),
        }
        if hasattr(self, "ports"):
            data |= {"ports": self.ports.as_dict(), "urls": self.urls.as_dict()}
        if hasattr(self, "workload_api") and self._phase != "stopped":
            data["sockets"] = str(self.state.socket_directory())
        try:
            self.state.write(data)
        except OSError as error:
            if self._phase == "starting":
                raise
            logger.warning("cannot write %s: %s", self.state.state_file, error)

    def described_processes(self) -> list[dict[str, Any]]:
        """Every process of the stack: name, pid, address, identity, state, restarts."""
        return list(self._described_processes())

    def _described_processes(self) -> Iterable[dict[str, Any]]:
        for process in (*(self._services.get(name) for name in SERVICES), *self._jobs.values()):
            if process is not None:
                yield {
                    "name": process.name,
                    "pid": process.pid,
                    "ref": process.ref.as_dict() if process.ref else None,
                    "address": process.spec.address,
                    "identity": process.spec.identity,
                    "probe": process.spec.probe,
                    "state": str(process.state),
                    "restarts": process.restarts,
                }
        for name, attribute, address, identity in (
            (
                ("postgres", "postgres", f"{HOST}:{self.ports.postgres}", "TLS, one login per service"),
                ("cloud", "cloud", self.urls.cloud, "stand-in for AWS: STS, IAM, Secrets Manager, KMS"),
            )
            if hasattr(self, "ports")
            else ()
        ):
            part = getattr(self, attribute, None)
            if part is not None:
                reference = ProcessRef.of(part.pid) if part.pid else None
                yield {
                    "name": name,
                    "pid": part.pid,
                    "ref": reference.as_dict() if reference else None,
                    "address": address,
                    "identity": identity,
                    "state": "running" if part.pid else "ended",
                    "restarts": 0,
                }

    def _fresh_log(self, name: str) -> Any:
        """A log file that its part appends to by itself: what an earlier run wrote is moved aside."""
        LogFile(self.state.logs / f"{name}.log").close()
        return self.state.logs / f"{name}.log"

    def _log_attestation(self, decision: Attestation) -> None:
        self._log_own(
            self._identity_log,
            "identity",
            "attestation",
            decision="allow" if decision.allowed else "deny",
            workload=decision.workload,
            pid=decision.pid,
            uid=decision.uid,
            detail=decision.reason,
        )

    def _log_rotation(self, event: RotationEvent) -> None:
        self._log_own(
            self._identity_log,
            "identity",
            str(event.step),
            workload=event.workload,
            id=str(event.spiffe_id),
            serial=event.serial,
            not_after=event.not_after.isoformat().replace("+00:00", "Z"),
        )

    def _log_secret_rotation(self, event: str, **facts: Any) -> None:
        self._log_own(self._rotation_log, "rotation", event, **facts)
        if event == "failed":
            self._steps.notice(f"the rotation of {facts['service']} failed: {facts['detail']}", "warning")

    def _log_own(self, log: LogFile | None, name: str, event: str, **fields: Any) -> None:
        if log is not None:
            log.feed(log_line(name, event, **fields).encode() + b"\n")


def _address_of(urls: Urls, service: str) -> str:
    return urls.page if service == "frontend" else str(getattr(urls, service))


async def _together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run them at the same time; when one fails the others are cancelled, and its error is raised."""
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(part)


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        inner = error.exceptions
        error = next((each for each in inner if not isinstance(each, asyncio.CancelledError)), inner[0])
    return error


class BackgroundProcess:
    """A service's process of a `BackgroundStack`, for a test's thread."""

    def __init__(self, stack: BackgroundStack, process: ManagedProcess) -> None:
        self._stack = stack
        self._process = process

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return self._process.restarts

    def restart(self, *, ready_within: float = 30.0) -> None:
        """Stop it gently, start it again, and wait until it is ready."""
        self._stack.run(self._process.restart())
        self.wait_ready(ready_within)

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until its probe says ready."""
        self._stack.run(self._process.wait_ready(timeout))

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory runs out. It is started again."""
        pid = self._process.pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


class BackgroundStack:
    """A `Stack` with an event loop of its own in a thread: for tests, which may have loops of their own.

        with BackgroundStack(StackOptions(state_dir=..., free_ports=True)) as stack:
            httpx.get(stack.urls.page)

    `stack` is the `Stack`: call its coroutines through `run` (or `arun` from a coroutine).
    """

    def __init__(self, options: StackOptions) -> None:
        self.options = options
        self.stack: Stack
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="stack")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it; returns when it is ready, raises what `Stack.start` raises."""
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._thread.join()
            raise

    def close(self) -> None:
        """Stop it; returns when nothing of it runs."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 60.0) -> T:
        """Run a coroutine in the stack's loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    async def arun(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a coroutine of another loop, which goes on meanwhile."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    @property
    def urls(self) -> Urls:
        return self.stack.urls

    @property
    def ports(self) -> Ports:
        return self.stack.ports

    @property
    def ca(self) -> CertificateAuthority:
        """May be used from any thread."""
        return self.stack.ca

    @property
    def workload_api(self) -> WorkloadApi:
        """Belongs to the stack's loop: use it through `run`."""
        return self.stack.workload_api

    @property
    def cloud(self) -> LocalCloud:
        """`admin_client` may be used from any thread, coroutines through `run`."""
        return self.stack.cloud

    @property
    def postgres(self) -> PostgresServer:
        """Belongs to the stack's loop: use it through `run`."""
        return self.stack.postgres

    @property
    def rotations(self) -> Rotations:
        """Belongs to the stack's loop: use it through `run`."""
        return self.stack.rotations

    def process(self, name: str) -> BackgroundProcess:
        """A service's process. KeyError if there is none."""
        return BackgroundProcess(self, self.stack.process(name))

    def audit(self, service: str) -> list[dict[str, Any]]:
        """See `Stack.audit`."""
        return self.stack.audit(service)

    def wait_for_audit(
        self, service: str, *, timeout: float = 10.0, after: int = 0, **fields: Any
    ) -> dict[str, Any]:
        """See `Stack.wait_for_audit`."""
        return self.run(self.stack.wait_for_audit(service, timeout=timeout, after=after, **fields))

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            else:
                logger.exception("the stack ended badly")

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.stack = Stack(self.options)
        async with self.stack:
            self._ready.set_result(None)
            await self._stop.wait()
