"""The part of Secrets Manager that rotates, which the stand-in for AWS does not play.

On AWS, RotateSecret answers at once, and Secrets Manager then calls the function that the secret names, with
one step after the other; it does so by itself when the secret's schedule says so. Here `Rotations` does both,
with the functions that infra/workload.yaml has deployed, through Lambda's own interface.

When a step fails, the whole rotation is tried again from its first step. After `ATTEMPTS` it is given up:
AWSPENDING is taken off the version, since every later RotateSecret would be refused because of it. A rotation
that was cut off in between leaves AWSPENDING where it is; the next one goes on with that version.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol
from uuid import uuid4

from botocore.exceptions import BotoCoreError, ClientError

from .aws.cloud import LocalCloud
from .errors import StackError
from .logview import parse_line
from .options import NAME_PREFIX

logger = logging.getLogger(__name__)

STEPS = ("createSecret", "setSecret", "testSecret", "finishSecret")

#: How often a rotation is tried, and the pauses in between in seconds: doubled each time.
ATTEMPTS, FIRST_PAUSE = 5, 0.5

#: The schedule is read again after this long at the latest: the local AWS may have come back without it.
_LOOK_AGAIN = 5.0

#: Before the next look when the local AWS gave no answer.
_AFTER_FAILURE = 1.0

_CURRENT, _PENDING = "AWSCURRENT", "AWSPENDING"


class RotationFailed(StackError):
    """The secret is as it was before, and the login that it names works."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a secret: its ID, and the database user that it is for."""

    id: str
    user: str


@dataclass(frozen=True, slots=True)
class Rotation:
    """What became of a rotation.

    `after` is what the secret says now: as `before` when it was cut off, at the step `cut_off_at`.
    `continued` says that it went on with a version that an earlier rotation had left.
    """

    service: str
    before: Version
    after: Version
    attempts: int
    seconds: float
    continued: bool
    cut_off_at: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Rotation:
        """What `as_dict` returned, also after a way through JSON."""
        versions = {name: Version(**members[name]) for name in ("before", "after")}
        return cls(**{**members, **versions})

    def __str__(self) -> str:
        """For people: one line, without the service."""
        before, after = self.before, self.after
        if self.cut_off_at:
            return (
                f"cut off at {self.cut_off_at} after {self.seconds:.1f} s: the secret still names "
                f"{before.user} (version {before.id[:8]}). The next rotation goes on with what was begun."
            )
        text = f"{before.user} → {after.user}  version {before.id[:8]} → {after.id[:8]}  {self.seconds:.1f} s"
        if self.continued:
            text += ", going on with one that was cut off"
        return text + (f", tried {self.attempts} times" if self.attempts > 1 else "")


class Record(Protocol):
    """Takes a line of the rotation log: what happened, and the facts of it."""

    def __call__(self, event: str, **facts: Any) -> None: ...


class Rotations:
    """Rotates the database secrets of `services`, every `every` seconds while `run` runs, and when asked.

    With `every` 0 the secrets have no schedule.
    """

    def __init__(self, cloud: LocalCloud, services: Iterable[str], every: float, record: Record) -> None:
        self._cloud = cloud
        self._every = every
        self._record = record
        self._locks = {service: asyncio.Lock() for service in services}

    async def run(self) -> NoReturn:
        """Keep every secret to its schedule until cancelled."""
        async with asyncio.TaskGroup() as group:
            for service in self._locks:
                group.create_task(self._keep_to_schedule(service))
        raise AssertionError("it ends by being cancelled")

    async def schedule(self) -> None:
        """Put the secrets on their schedule, without a rotation now. Raises `RotationFailed`."""
        if self._every:
            await asyncio.gather(*(self._schedule(service) for service in self._locks))

    async def rotate(self, service: str, *, cut_off_at: str | None = None) -> Rotation:
        """Rotate one secret now, after the rotation of it that may be under way.

        With `cut_off_at` it ends where that step would begin, as if Secrets Manager's power had failed.

        Raises:
            RotationFailed: a step failed too often, or Secrets Manager does not answer.
        """
        async with self._locks[service]:
            return await self._rotate(service, cut_off_at)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nothing is rotated inside of the ``with`` block: somebody else sets passwords there."""
        async with AsyncExitStack() as locks:
            for lock in self._locks.values():
                await locks.enter_async_context(lock)
            yield

    # -- the schedule

    async def _keep_to_schedule(self, service: str) -> NoReturn:
        while True:
            try:
                due = await self._due(service)
                if due is None:
                    await self._schedule(service)
                elif due > 0:
                    await asyncio.sleep(min(due, _LOOK_AGAIN))
                else:
                    await self._rotate_if_due(service)
            except RotationFailed:
                await asyncio.sleep(_AFTER_FAILURE)
            except Exception:
                logger.exception("the schedule of %s", service)
                await asyncio.sleep(_AFTER_FAILURE)

    async def _rotate_if_due(self, service: str) -> None:
        async with self._locks[service]:
            due = await self._due(service)
            if due is not None and due <= 0:  # nobody has asked for one meanwhile
                await self._rotate(service, None)

    async def _due(self, service: str) -> float | None:
        """Seconds until the next rotation; None when the secret is on no schedule."""
        described = await self._secrets_manager("describe_secret", service)
        date = described.get("NextRotationDate")
        return date.timestamp() - time.time() if date else None

    async def _schedule(self, service: str) -> None:
        await self._secrets_manager(
            "rotate_secret", service, RotateImmediately=False, **self._rotation(service)
        )

    def _rotation(self, service: str) -> dict[str, Any]:
        """What RotateSecret is told besides the secret: the function, and the schedule if there is one."""
        function = {"RotationLambdaARN": self._function(service)}
        rate = f"rate({self._every:.0f} seconds)"
        return function | ({"RotationRules": {"ScheduleExpression": rate}} if self._every else {})

    # -- one rotation, with the lock

    async def _rotate(self, service: str, cut_off_at: str | None) -> Rotation:
        try:
            return await self._carry_out(service, cut_off_at)
        except RotationFailed as failure:
            self._record("failed", service=service, detail=str(failure))
            raise

    async def _carry_out(self, service: str, cut_off_at: str | None) -> Rotation:
        began = time.monotonic()
        before = await self._current(service)
        token, continued = await self._begin(service)
        self._record("begin", service=service, version=token, user=before.user, continued=continued)
        if cut_off_at is None:
            attempts = await self._carry_through(service, token)
        else:
            attempts = 1
            for step in STEPS[: STEPS.index(cut_off_at)]:
                await self._step(service, token, step)
        after = await self._current(service)
        if cut_off_at is None:
            self._record("rotated", service=service, version=token, user=after.user)
        else:
            self._record("cut off", service=service, version=token, step=cut_off_at)
        seconds = round(time.monotonic() - began, 3)
        return Rotation(service, before, after, attempts, seconds, continued, cut_off_at)

    async def _begin(self, service: str) -> tuple[str, bool]:
        """The version to make, which is AWSPENDING from now on, and whether it was so before."""
        left = self._labelled(await self._labels(service), _PENDING)
        token = left or str(uuid4())
        await self._secrets_manager(
            "rotate_secret", service, ClientRequestToken=token, **self._rotation(service)
        )
        return token, left is not None

    async def _carry_through(self, service: str, token: str) -> int:
        """All four steps, as often as it takes. The answer is how often they were begun."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                for step in STEPS:
                    await self._step(service, token, step)
            except RotationFailed as failure:
                last = failure
            else:
                return attempt
            if attempt < ATTEMPTS:
                await asyncio.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        await self._give_up(service, token)
        raise RotationFailed(f"{last} It was tried {ATTEMPTS} times and given up; the next one begins anew.")

    async def _give_up(self, service: str, token: str) -> None:
        self._record("given up", service=service, version=token)
        if _PENDING in (await self._labels(service)).get(token, []):
            await self._secrets_manager(
                "update_secret_version_stage", service, VersionStage=_PENDING, RemoveFromVersionId=token
            )

    async def _step(self, service: str, token: str, step: str) -> None:
        facts = {"service": service, "version": token, "step": step}
        event = {"Step": step, "SecretId": self._secret(service), "ClientRequestToken": token}
        try:
            answer = await self._invoke(self._function(service), event)
        except RotationFailed as failure:
            self._record("step", **facts, outcome="failed", detail=str(failure))
            raise
        if answer.error is not None:
            self._record("step", **facts, outcome="failed", detail=answer.error)
            raise RotationFailed(f"{step} of the rotation of {service} failed: {answer.error}.")
        self._record("step", **facts, outcome="done", detail=answer.detail)

    # -- AWS

    async def _current(self, service: str) -> Version:
        value = await self._secrets_manager("get_secret_value", service)
        return Version(value["VersionId"], json.loads(value["SecretString"])["username"])

    async def _labels(self, service: str) -> Mapping[str, list[str]]:
        described = await self._secrets_manager("describe_secret", service)
        labels: Mapping[str, list[str]] = described["VersionIdsToStages"]
        return labels

    def _labelled(self, labels: Mapping[str, list[str]], label: str) -> str | None:
        """The version that has this label and is not the current one."""
        return next((v for v, has in labels.items() if label in has and _CURRENT not in has), None)

    def _secret(self, service: str) -> str:
        return self._output(service, "DatabaseSecretArn")

    def _function(self, service: str) -> str:
        return self._output(service, "RotationFunctionArn")

    def _output(self, service: str, name: str) -> str:
        try:
            return self._cloud.outputs[service.capitalize() + name]
        except KeyError:
            raise RotationFailed("The local AWS is not up: see `ztdev status`.") from None

    async def _secrets_manager(self, operation: str, service: str, **parameters: Any) -> dict[str, Any]:
        secret = self._secret(service)

        def call() -> dict[str, Any]:
            with _explained(f"{operation} of {NAME_PREFIX}/{service}/db"):
                client = self._cloud.admin_client("secretsmanager")
                answer: dict[str, Any] = getattr(client, operation)(SecretId=secret, **parameters)
                return answer

        return await asyncio.to_thread(call)

    async def _invoke(self, function: str, event: Mapping[str, str]) -> _Answer:
        def call() -> _Answer:
            with _explained(f"the call of {function.rpartition(':')[2]}"):
                answer = self._cloud.admin_client("lambda").invoke(
                    FunctionName=function.rpartition(":")[2],
                    Payload=json.dumps(event).encode(),
                    LogType="Tail",
                )
                body = answer["Payload"].read()
            if answer.get("FunctionError"):
                return _Answer(str(json.loads(body).get("errorMessage", "it gave no reason")), "")
            return _Answer(None, _detail(answer.get("LogResult", "")))

        return await asyncio.to_thread(call)


@dataclass(frozen=True, slots=True)
class _Answer:
    """How a step ended: `error` is the text of the function's exception, `detail` its word of what it did."""

    error: str | None
    detail: str


def _detail(log: str) -> str:
    """What the function says in its own line of its log."""
    lines = (parse_line(line) for line in base64.b64decode(log).decode(errors="replace").splitlines())
    own = (line for line in lines if line is not None and line.get("event") == "rotation")
    return str(next(own, {}).get("detail", ""))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {})
        raise RotationFailed(f"{what} was refused: {code.get('Code')}: {code.get('Message')}.") from None
    except BotoCoreError as error:
        raise RotationFailed(
            f"{what} failed: the local AWS gave no answer ({type(error).__name__})."
        ) from None
