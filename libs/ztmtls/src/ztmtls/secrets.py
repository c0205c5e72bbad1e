"""Database credentials from AWS Secrets Manager, with a role assumed by web identity and by nothing else.

`WebIdentity` names the role and the file with the service account's token (IRSA: on EKS, the pod identity
webhook sets both). `RotatingSecret` keeps the current version of one secret, follows its rotation, and lives
through outages of AWS on the last good value.

No other credentials are ever used: no static keys, no profile, no shared files, no container or instance
metadata. A default credential chain would fall through to the node's role and act as somebody broader without
a word.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import CredentialResolver
from botocore.exceptions import BotoCoreError, ClientError

from .audit import AuditLog
from .reasons import Reason, Refusal, printable

#: Seconds to reach AWS, and to wait for its answer. Calls are tried twice (botocore's standard retry mode).
CONNECT_TIMEOUT, READ_TIMEOUT, ATTEMPTS = 3.0, 5.0, 2

#: A forced refresh asks AWS again, but starts not sooner than this after the last one (seconds).
MIN_INTERVAL = 1.0

#: After a failure the next try waits this long, doubled up to the last, with jitter (seconds).
FIRST_RETRY, LAST_RETRY = 1.0, 8.0

#: Credentials are renewed when this part of their life is over, give or take 5 %.
_RENEW_AT = 0.8

_ROLE_ARN = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
_NOT_IN_SESSION_NAME = re.compile(r"[^\w+=,.@-]", re.ASCII)
_MAX_TOKEN = 20_000

#: Variables that hand out credentials to the AWS SDKs, and what sets them.
_OTHER_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a static key",
    "AWS_SECRET_ACCESS_KEY": "a static key",
    "AWS_SESSION_TOKEN": "a static key",
    "AWS_SECURITY_TOKEN": "a static key",
    "AWS_PROFILE": "a profile",
    "AWS_DEFAULT_PROFILE": "a profile",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "a container role",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI": "a container role",
}

_log = logging.getLogger(__name__)


class SecretError(Refusal):
    """The secret cannot be had. `reason` says why: ``secret_denied``, ``secret_unavailable`` (try again
    later) or
    ``secret_malformed``."""


class CredentialsRefused(SecretError):
    """There is no acceptable web identity (``web_identity_missing``, ``web_identity_conflict``), or STS does
    not
    take it (``web_identity_refused``)."""


@dataclass(frozen=True)
class WebIdentity:
    """A role, and the file with the token that lets a workload assume it (AssumeRoleWithWebIdentity).

    The file is read again each time, since the kubelet replaces the token. `sts_endpoint` is for a stand-in
    or a private endpoint; otherwise the regional endpoint of STS is used.
    """

    role_arn: str
    token_file: Path
    region: str
    session_name: str
    sts_endpoint: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> WebIdentity:
        """Read the variables that IRSA sets: AWS_ROLE_ARN, AWS_WEB_IDENTITY_TOKEN_FILE, AWS_REGION (or
        AWS_DEFAULT_REGION), and optionally AWS_ROLE_SESSION_NAME, AWS_ENDPOINT_URL_STS, AWS_ENDPOINT_URL.

        Raises:
            CredentialsRefused: ``web_identity_conflict`` when the environment offers other credentials too,
                ``web_identity_missing`` when a variable is missing or wrong, or the token cannot be read.
        """
        environ = os.environ if environ is None else environ
        for name, what in _OTHER_CREDENTIALS.items():
            if environ.get(name):
                raise CredentialsRefused(
                    Reason.WEB_IDENTITY_CONFLICT,
                    f"{name} is set: {what} must not stand beside the web identity. Unset it; only "
                    "AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE give this workload credentials",
                )
        missing = [name for name in ("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE") if not environ.get(name)]
        if missing:
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_MISSING,
                f"IRSA was not injected: {' and '.join(missing)} not set. Check that the service account has "
                "the annotation eks.amazonaws.com/role-arn, then delete the pod: the next one gets them",
            )
        role_arn = environ["AWS_ROLE_ARN"]
        if not _ROLE_ARN.fullmatch(role_arn):
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_MISSING,
                f"AWS_ROLE_ARN is not the ARN of an IAM role: {printable(role_arn)}",
            )
        region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
        if not region or not re.fullmatch(r"[a-z0-9-]{1,32}", region):
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_MISSING, "AWS_REGION is not set to a region such as eu-central-1"
            )
        identity = cls(
            role_arn=role_arn,
            token_file=Path(environ["AWS_WEB_IDENTITY_TOKEN_FILE"]),
            region=region,
            session_name=_session_name(environ),
            sts_endpoint=environ.get("AWS_ENDPOINT_URL_STS") or environ.get("AWS_ENDPOINT_URL") or None,
        )
        identity.read_token()
        return identity

    def read_token(self) -> str:
        """The token as it is in the file now.

        Raises:
            CredentialsRefused: ``web_identity_missing``; the text names the file and, for one that this user
            may
                not read, the user.
        """
        try:
            token = self.token_file.read_text(encoding="ascii").strip()
        except PermissionError:
            raise self._unreadable(
                f"user {os.geteuid()} may not read it. Give the pod a securityContext with fsGroup"
            ) from None
        except FileNotFoundError:
            raise self._unreadable("it does not exist. Check the projected volume of the pod") from None
        except (OSError, ValueError) as error:
            raise self._unreadable(f"it cannot be read ({type(error).__name__})") from None
        if not token or len(token) > _MAX_TOKEN:
            raise self._unreadable("it is empty" if not token else "it is too large")
        return token

    def _unreadable(self, why: str) -> CredentialsRefused:
        return CredentialsRefused(
            Reason.WEB_IDENTITY_MISSING, f"no token in {printable(str(self.token_file))}: {why}"
        )


def _session_name(environ: Mapping[str, str]) -> str:
    """What CloudTrail shows: the pod, when there is one."""
    name = environ.get("AWS_ROLE_SESSION_NAME") or environ.get("HOSTNAME") or "ztmtls"
    name = _NOT_IN_SESSION_NAME.sub("-", name)[:64]
    return name if len(name) >= 2 else f"{name}-ztmtls"


@dataclass(frozen=True)
class SecretValue:
    """One version of a secret. `fields` are its JSON members as strings; `repr` names them without values."""

    version_id: str
    fields: Mapping[str, str] = field(repr=False)

    def __getitem__(self, name: str) -> str:
        return self.fields[name]

    def __repr__(self) -> str:
        return f"SecretValue(version_id={self.version_id!r}, fields=<{', '.join(sorted(self.fields))}>)"

    __str__ = __repr__

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a secret is not pickled")


class SecretState(StrEnum):
    """What a `RotatingSecret` has."""

    STARTING = "starting"
    """Nothing yet, and nothing has failed."""
    SERVING = "serving"
    """A value, and the last refresh worked."""
    DEGRADED = "degraded"
    """A value, but the last refresh failed."""
    FAILED = "failed"
    """No value, since the refresh failed."""
    CLOSED = "closed"


class RotatingSecret:
    """The current version (AWSCURRENT) of one secret, kept fresh.

    `get` answers from memory while the value is younger than `max_age`. Calls to AWS run on one thread of its
    own, one at a time, however many tasks and threads ask: the event loop never waits, and nothing stampedes.
    When AWS fails, the last good value goes on being used, with retries that back off.

    Used as it is, the value is refreshed by the first `get` after `max_age`. With ``async with secret:`` (or
    `start`) it is refreshed in the background, so that no request waits for it.

    Args:
        secret_id: name or ARN of the secret.
        endpoint_url: of Secrets Manager, for a stand-in or a private endpoint.
        max_age: seconds after which the value is asked for again (with up to 20 % jitter, earlier).
        required: members that the secret must have, as texts that are not empty.
        audit: gets a line (event ``credentials``) for the first value, each new version, and each refusal.
    """

    def __init__(
        self,
        secret_id: str,
        identity: WebIdentity,
        *,
        endpoint_url: str | None = None,
        max_age: float = 60.0,
        required: tuple[str, ...] = ("username", "password"),
        audit: AuditLog | None = None,
    ) -> None:
        self.secret_id = secret_id
        self.identity = identity
        self._max_age = max_age
        self._audit = audit
        self._reader = _SecretReader(secret_id, identity, endpoint_url, required)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="secret")
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        # Below: guarded by the lock.
        self._lock = threading.Lock()
        self._value: SecretValue | None = None
        self._fetched_at = 0.0
        self._stale_at = 0.0
        self._error: SecretError | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._last_start = float("-inf")
        self._running: Future[SecretValue] | None = None
        self._waiting: Future[SecretValue] | None = None
        self._closing = threading.Event()

    # -- reading

    @property
    def current(self) -> SecretValue | None:
        """The last good value, however old. Never asks AWS."""
        return self._value

    async def get(self) -> SecretValue:
        """The secret's value: from memory while it is fresh, or while AWS cannot be had.

        Raises:
            SecretError: there is no value at all, and AWS does not give one.
        """
        usable = self._usable()
        if usable is not None:
            return usable
        return self._or_last_good(await self._settle(self._join(force=False)))

    async def refresh(self, force: bool = True) -> SecretValue:
        """Ask AWS now. To be called when the database refuses the password (SQLSTATE 28P01).

        Callers at the same time share one call that starts after all of them have asked; calls start at least
        `MIN_INTERVAL` apart. With `force` False, a fresh value is returned as it is.

        Raises:
            SecretError: AWS does not give it. `current` still has the last good value.
        """
        if not force:
            with self._lock:
                if self._value is not None and time.monotonic() < self._stale_at:
                    return self._value
        return (await self._settle(self._join(force=force))).result()

    def sync_get(self, timeout: float = 60.0) -> SecretValue:
        """As `get`, for code that has no event loop (migrations). Blocks up to `timeout` seconds.

        Raises:
            SecretError: as `get`, and when the time is over (``secret_unavailable``).
        """
        usable = self._usable()
        if usable is not None:
            return usable
        future = self._join(force=False)
        try:
            future.exception(timeout)
        except TimeoutError:
            raise SecretError(
                Reason.SECRET_UNAVAILABLE, f"no answer from AWS within {timeout:.0f} s"
            ) from None
        return self._or_last_good(future)

    def status(self) -> dict[str, Any]:
        """State, version and age: for status pages. Holds no secret."""
        with self._lock:
            value, error = self._value, self._error
            age = time.monotonic() - self._fetched_at if value else None
        return {
            "state": str(self._state(value, error)),
            "secret_id": self.secret_id,
            "version": value.version_id if value else None,
            "age_seconds": round(age, 3) if age is not None else None,
            "last_error": str(error.reason) if error else None,
            "detail": error.detail if error else None,
            "role_arn": self.identity.role_arn,
            "source": "web identity",
        }

    async def check(self) -> str | None:
        """A readiness check: None while there is a value to work with, else why there is none."""
        if self._value is not None:
            return None
        return str(self._error) if self._error else "no secret has been fetched yet"

    def _state(self, value: SecretValue | None, error: SecretError | None) -> SecretState:
        if self._closing.is_set():
            return SecretState.CLOSED
        if value is None:
            return SecretState.FAILED if error else SecretState.STARTING
        return SecretState.DEGRADED if error else SecretState.SERVING

    # -- running in the background

    async def start(self) -> None:
        """Keep the value fresh from now on, in a task of the running event loop. Returns at once."""
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.create_task(self._keep_fresh(), name=f"secret-{self.secret_id}")

    async def aclose(self) -> None:
        """Stop, and forget the value. Waits for no call to AWS."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        self.close()

    def close(self) -> None:
        """As `aclose`, when it was never started."""
        self._closing.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._value = None
            for future in (self._waiting, self._running):
                if future is not None and not future.done():
                    future.set_exception(_closed())
            self._waiting = self._running = None

    async def __aenter__(self) -> RotatingSecret:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _keep_fresh(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            with self._lock:
                due = self._retry_at if self._error else self._stale_at
            delay = due - time.monotonic()
            if delay > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
                continue  # a forced refresh may have moved it
            with contextlib.suppress(SecretError):
                await self._settle(self._join(force=False))

    # -- one call at a time

    def _usable(self) -> SecretValue | None:
        """The value to answer with at once, or None when AWS has to be asked first.

        Raises:
            SecretError: there is none, and the last try failed a moment ago: callers in a loop must not
            hammer AWS.
        """
        now = time.monotonic()
        with self._lock:
            if self._closing.is_set():
                raise _closed()
            backing_off = self._error is not None and now < self._retry_at
            if self._value is not None:
                in_background = self._task is not None and not self._task.done()
                if now < self._stale_at or backing_off or in_background:
                    return self._value
            elif backing_off and self._error is not None:
                raise type(self._error)(self._error.reason, self._error.detail)
        return None

    def _join(self, *, force: bool) -> Future[SecretValue]:
        """The call to wait for: the one that runs, or the next, as `force` needs one that starts from now."""
        with self._lock:
            if self._closing.is_set():
                raise _closed()
            if self._waiting is not None:
                return self._waiting
            if self._running is not None and not force:
                return self._running
            future: Future[SecretValue] = Future()
            self._waiting = future
            self._executor.submit(self._work, future)
            return future

    async def _settle(self, future: Future[SecretValue]) -> Future[SecretValue]:
        """Wait until it is done. A waiter that is cancelled does not cancel it for the others."""
        await asyncio.wait({asyncio.wrap_future(_shield(future))})
        return future

    def _or_last_good(self, future: Future[SecretValue]) -> SecretValue:
        error = future.exception(0)
        if error is None:
            return future.result()
        last = self._value
        if last is not None and isinstance(error, SecretError):
            return last
        raise error

    def _work(self, future: Future[SecretValue]) -> None:
        """On the thread of its own."""
        pause = self._last_start + MIN_INTERVAL - time.monotonic()
        if self._closing.wait(max(0.0, pause)):
            return  # `close` has answered those who wait
        with self._lock:
            if self._waiting is future:
                self._waiting, self._running = None, future
            self._last_start = time.monotonic()
        error: BaseException | None = None
        value: SecretValue | None = None
        try:
            value = self._reader.read()
        except SecretError as refused:
            error = self._failed(refused)
        except Exception as unexpected:  # the text of a stranger's exception could hold anything
            _log.error("unexpected %s while reading secret %s", type(unexpected).__name__, self.secret_id)
            error = self._failed(
                SecretError(Reason.SECRET_UNAVAILABLE, f"unexpected {type(unexpected).__name__}")
            )
        else:
            self._succeeded(value)
        with self._lock:
            self._running = None
            if not future.done():
                if value is not None:
                    future.set_result(value)
                else:
                    future.set_exception(error or _closed())

    def _succeeded(self, value: SecretValue) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            before, had_error = self._value, self._error
            self._value, self._error, self._failures = value, None, 0
            self._fetched_at = time.monotonic()
            self._stale_at = self._fetched_at + self._max_age * _jitter(0.8, 1.0)
        if had_error is not None:
            _log.info("secret %s can be read again", self.secret_id)
        if before is None or before.version_id != value.version_id:
            self._record(
                "allow",
                previous_version=before.version_id if before else None,
                version=value.version_id,
            )

    def _failed(self, error: SecretError) -> SecretError:
        with self._lock:
            before = self._error
            self._error = error
            delay = min(LAST_RETRY, FIRST_RETRY * 2.0**self._failures)
            self._failures = min(self._failures + 1, 16)
            self._retry_at = time.monotonic() + delay * _jitter(0.75, 1.25)
            closing = self._closing.is_set()
        if self._loop is not None:  # the background task may sleep for longer than that
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake.set)
        if not closing and (before is None or before.reason != error.reason):
            _log.warning("secret %s: %s", self.secret_id, error)
            self._record("deny", reason=error.reason, detail=error.detail)
        return error

    def _record(self, decision: Any, **more: Any) -> None:
        if self._audit is not None:
            self._audit.record(
                "credentials",
                decision,
                secret_id=self.secret_id,
                role_arn=self.identity.role_arn,
                source="web identity",
                **more,
            )


def _shield(future: Future[SecretValue]) -> Future[None]:
    """A future that is done when the other one is, and whose cancellation the other one does not feel."""
    done: Future[None] = Future()

    def tell(_: object) -> None:
        if done.set_running_or_notify_cancel():
            done.set_result(None)

    future.add_done_callback(tell)
    return done


def _closed() -> SecretError:
    return SecretError(Reason.SECRET_UNAVAILABLE, "the secret was closed")


def _jitter(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 - spreads load, keeps no secret


# -- AWS


@dataclass(frozen=True)
class _Credentials:
    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(repr=False)
    renew_at: float
    """When to ask for new ones (monotonic clock)."""
    expires_at: float


class _Stale(Exception):
    """AWS does not know our temporary credentials (any more): assume the role again."""


#: Codes of AWS for credentials that were good once.
_STALE_CODES = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "InvalidToken",
        "RequestExpired",
        "UnrecognizedClientException",
    }
)


class _SecretReader:
    """Assumes the role and reads the secret. For one thread: botocore makes clients in no other safe way."""

    def __init__(
        self, secret_id: str, identity: WebIdentity, endpoint_url: str | None, required: tuple[str, ...]
    ) -> None:
        self._secret_id = secret_id
        self._identity = identity
        self._endpoint_url = endpoint_url
        self._required = required
        self._session: botocore.session.Session | None = None
        self._sts: Any = None
        self._client: Any = None
        self._credentials: _Credentials | None = None

    def read(self) -> SecretValue:
        """Raises SecretError."""
        try:
            return self._read_as_assumed()
        except _Stale:
            self._credentials = self._client = None
        try:
            return self._read_as_assumed()
        except _Stale as error:
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_REFUSED,
                f"AWS refuses the credentials that STS has just issued for {self._identity.role_arn} "
                f"({error})",
            ) from None

    def _read_as_assumed(self) -> SecretValue:
        client = self._signed_client()
        try:
            answer = client.get_secret_value(SecretId=self._secret_id, VersionStage="AWSCURRENT")
        except ClientError as error:
            raise self._explain_secret(error) from None
        except BotoCoreError as error:
            raise self._unavailable("Secrets Manager", type(error).__name__) from None
        return _parse(answer, self._required, self._secret_id)

    # -- Secrets Manager

    def _signed_client(self) -> Any:
        credentials = self._credentials
        now = time.monotonic()
        if credentials is None or now >= credentials.renew_at:
            try:
                credentials = self._assume()
            except SecretError:
                # While STS has an outage, what it gave before is good until it expires.
                if credentials is None or now >= credentials.expires_at:
                    raise
                _log.warning("the credentials of %s are not renewed yet", self._identity.role_arn)
            else:
                self._credentials, self._client = credentials, None
        if self._client is None:
            self._client = self._make_client(
                "secretsmanager",
                self._endpoint_url,
                aws_access_key_id=credentials.access_key,
                aws_secret_access_key=credentials.secret_key,
                aws_session_token=credentials.token,
            )
        return self._client

    def _explain_secret(self, error: ClientError) -> Exception:
        code = _code(error)
        if code in _STALE_CODES:
            return _Stale(code)
        if code.startswith("AccessDenied"):
            return SecretError(
                Reason.SECRET_DENIED,
                f"{self._identity.role_arn} may not read {self._secret_id}: check that its policy allows "
                "secretsmanager:GetSecretValue on this secret and kms:Decrypt on its key",
            )
        if code == "ResourceNotFoundException":
            return SecretError(
                Reason.SECRET_UNAVAILABLE,
                f"there is no secret {self._secret_id} with a current version in {self._identity.region}",
            )
        return self._unavailable("Secrets Manager", code)

    # -- STS

    def _assume(self) -> _Credentials:
        token = self._identity.read_token()
        if self._sts is None:
            # The token is the credential of this call: it is not signed.
            self._sts = self._make_client("sts", self._identity.sts_endpoint, unsigned=True)
        asked_at = time.monotonic()
        try:
            answer = self._sts.assume_role_with_web_identity(
                RoleArn=self._identity.role_arn,
                RoleSessionName=self._identity.session_name,
                WebIdentityToken=token,
            )
        except ClientError as error:
            raise self._explain_assume(error, token) from None
        except BotoCoreError as error:
            raise self._unavailable("STS", type(error).__name__) from None
        issued = answer["Credentials"]
        lifetime = max(0.0, (issued["Expiration"] - datetime.now(UTC)).total_seconds())
        return _Credentials(
            access_key=issued["AccessKeyId"],
            secret_key=issued["SecretAccessKey"],
            token=issued["SessionToken"],
            renew_at=asked_at + lifetime * _jitter(_RENEW_AT - 0.05, _RENEW_AT + 0.05),
            expires_at=asked_at + lifetime,
        )

    def _explain_assume(self, error: ClientError, token: str) -> SecretError:
        code = _code(error)
        role = self._identity.role_arn
        if code.startswith("AccessDenied"):
            return CredentialsRefused(
                Reason.WEB_IDENTITY_REFUSED,
                f"STS does not let this workload assume {role}. The trust policy must name the issuer, and "
                "under StringEquals exactly the sub and aud of the token. "
                f"The token says: {_claims_hint(token)}",
            )
        if code in ("InvalidIdentityToken", "ExpiredTokenException", "ExpiredToken"):
            return CredentialsRefused(
                Reason.WEB_IDENTITY_REFUSED,
                f"STS does not accept the token in {self._identity.token_file} for {role} ({code}). "
                f"It says: {_claims_hint(token)}",
            )
        return self._unavailable("STS", code)

    def _unavailable(self, service: str, what: str) -> SecretError:
        return SecretError(Reason.SECRET_UNAVAILABLE, f"{service} gave no answer to work with ({what})")

    # -- clients

    def _make_client(
        self, service: str, endpoint_url: str | None, *, unsigned: bool = False, **keys: str
    ) -> Any:
        if self._session is None:
            self._session = _session()
        options: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
            "max_pool_connections": 1,
            "ignore_configured_endpoint_urls": True,  # endpoints are arguments here
        }
        if unsigned:
            options["signature_version"] = UNSIGNED
        if endpoint_url is not None and endpoint_url.startswith("http:"):
            options["proxies"] = {}  # never a token in the clear to somebody in between
        make: Any = self._session.create_client
        client = make(
            service,
            region_name=self._identity.region,
            endpoint_url=endpoint_url,
            config=Config(**options),
            **keys,
        )
        _keep_bodies_out_of_logs()
        return client


def _session() -> botocore.session.Session:
    """A session that reads no file and no credential variable, and knows no credential provider at all."""
    session = botocore.session.Session(
        session_vars={
            "profile": (None, None, None, None),
            "config_file": (None, None, os.devnull, None),
            "credentials_file": (None, None, os.devnull, None),
        }
    )
    # Regional endpoints: the global one of STS is far away, and one more thing to fail.
    session.set_config_variable("sts_regional_endpoints", "regional")
    session.register_component("credential_provider", CredentialResolver(providers=[]))
    return session


class _NoDebug(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.INFO


_no_debug = _NoDebug()


def _keep_bodies_out_of_logs() -> None:
    """botocore's debug lines hold whole requests and answers: the token, the keys and the secret."""
    for name in [
        name for name in logging.root.manager.loggerDict if name.startswith(("botocore", "urllib3"))
    ]:
        logging.getLogger(name).addFilter(_no_debug)


def _code(error: ClientError) -> str:
    return printable(str(error.response.get("Error", {}).get("Code", "unknown")), 64)


def _claims_hint(token: str) -> str:
    """What the token claims, for a person who compares it with a trust policy."""
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        shown = {name: claims.get(name) for name in ("iss", "sub", "aud")}
        expires = claims.get("exp")
        if isinstance(expires, int | float):
            shown["exp"] = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (AttributeError, IndexError, OSError, OverflowError, TypeError, ValueError):
        return "nothing readable"
    return printable(", ".join(f"{name}={value}" for name, value in shown.items()), 512)


def _parse(answer: Mapping[str, Any], required: tuple[str, ...], secret_id: str) -> SecretValue:
    """The version in an answer of GetSecretValue. Raises SecretError (``secret_malformed``)."""

    def malformed(what: str) -> SecretError:
        return SecretError(Reason.SECRET_MALFORMED, f"secret {secret_id}: {what}")

    text = answer.get("SecretString")
    if not isinstance(text, str):
        raise malformed("it is binary; it must be a JSON object with text members")
    try:
        data = json.loads(text)
    except ValueError:
        raise malformed("it is not JSON") from None
    if not isinstance(data, dict):
        raise malformed("it is JSON, but not an object")
    fields = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in data.items()
        if isinstance(value, str | int | float | bool)
    }
    for name in required:
        if name not in data:
            raise malformed(f"it has no member {name}")
        if not isinstance(data[name], str) or not data[name]:
            raise malformed(f"its member {name} is not a text, or is empty")
    version = answer.get("VersionId")
    if not isinstance(version, str) or not version:
        raise malformed("the answer names no version")
    return SecretValue(version, MappingProxyType(fields))
