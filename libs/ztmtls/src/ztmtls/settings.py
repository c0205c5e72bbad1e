"""Settings of a service, read once from the environment; faults stop the start, one line each."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from .ids import InvalidSpiffeId, SpiffeId
from .reasons import printable
from .workload_endpoint import parse_endpoint

if TYPE_CHECKING:
    from .audit import AuditLog
    from .database import DatabaseTarget
    from .live import LiveLimits
    from .secrets import RotatingSecret

EX_CONFIG = 78
"""Exit status for a configuration fault (sysexits.h)."""


def _spiffe_id(text: str) -> str:
    try:
        identity = SpiffeId.parse(text)
    except InvalidSpiffeId as error:
        raise ValueError(error.detail) from None
    if identity.is_root:
        raise ValueError("names a trust domain, not a workload: it needs a path")
    return text


def _endpoint(text: str) -> str:
    parse_endpoint(text)
    return text


def _collector(text: str | None) -> str | None:
    if not text:
        return None
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be http://host:port or https://host:port")
    return text


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    return path


SpiffeIdSetting = Annotated[str, AfterValidator(_spiffe_id)]
EndpointSetting = Annotated[str, AfterValidator(_endpoint)]
CollectorSetting = Annotated[str | None, AfterValidator(_collector)]
ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=86400)]
LogLevel = Literal["debug", "info", "warning", "error"]


class ServiceSettings(BaseSettings):
    """What every service reads. Each field is the environment variable of the same name, upper-case."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    spiffe_endpoint_socket: EndpointSetting = Field(
        description="Workload API address, `unix:/path` or `tcp://ip:port`"
    )
    spiffe_id: SpiffeIdSetting = Field(description="the SPIFFE ID this service expects to be")
    host: str = Field("127.0.0.1", description="address the service listens on")
    port: Port = Field(description="port the service listens on")
    probe_host: str = Field("127.0.0.1", description="address of the probes")
    probe_port: Port = Field(description="port of the probes: /livez, /readyz, /metrics")
    log_level: LogLevel = Field("info", description="ordinary logs from this level up")
    http: Literal["auto", "h11", "httptools"] = Field("auto", description="HTTP parser")
    loop: Literal["auto", "asyncio", "uvloop"] = Field("auto", description="event loop")
    startup_timeout_seconds: Seconds = Field(
        0, description="give up when there is no identity after this long; 0 waits for ever"
    )
    drain_seconds: Seconds = Field(
        0, description="after SIGTERM, go on accepting for this long while readiness is red"
    )
    grace_seconds: Seconds = Field(10, description="then let requests in flight finish for this long")
    otel_exporter_otlp_endpoint: CollectorSetting = Field(
        None, description="where spans are sent (OTLP over HTTP), `http://collector:4318`; without it nowhere"
    )


class CalleeSettings(ServiceSettings):
    """What a service reads that others call over mutual TLS."""

    close_splay_seconds: Seconds = Field(
        3, description="connections of peers that are no longer acceptable are closed within this long"
    )
    close_per_second: Annotated[float, Field(gt=0, le=1e6)] = Field(
        500, description="not more of them than this in a second"
    )

    request_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        30, description="refuse a request that has not come whole within this long"
    )

    def live_limits(self) -> LiveLimits:
        """How long requests may take to come, and how open connections are closed."""
        from .live import LiveLimits

        return LiveLimits(
            splay=self.close_splay_seconds,
            per_second=self.close_per_second,
            request=self.request_timeout_seconds,
        )


class DatabaseSettings(BaseSettings):
    """The database, and how its credentials are fetched: from Secrets Manager, with this workload's role.

    That role comes by IRSA or by EKS Pod Identity: `ztmtls.secrets.identity_from_env` reads the variables.
    """

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    db_host: str = Field(min_length=1, description="host of PostgreSQL, as its certificate names it")
    db_port: Port = Field(5432, description="port of PostgreSQL")
    db_name: str = Field(min_length=1, description="name of the database")
    db_ca_file: ExistingFile = Field(description="PEM file with the CA of the database's certificate")
    db_secret_id: str = Field(min_length=1, description="name or ARN of the secret with user and password")
    db_secret_max_age_seconds: Annotated[float, Field(ge=1, le=86400)] = Field(
        60, description="ask for the secret's newest version after this long, at the latest"
    )
    aws_region: str = Field(min_length=1, description="AWS region; EKS sets it")
    aws_endpoint_url: str | None = Field(None, description="another address for the AWS APIs")

    # The extras `database` and `aws` are for services that have a database.

    def database_target(self) -> DatabaseTarget:
        """Where the database is."""
        from .database import DatabaseTarget

        return DatabaseTarget(self.db_host, self.db_port, self.db_name, self.db_ca_file)

    def database_secret(self, audit: AuditLog) -> RotatingSecret:
        """The login, not fetched yet. Raises `ztmtls.secrets.CredentialsRefused` when the environment offers
        no AWS identity, or other credentials beside it."""
        from .secrets import RotatingSecret, identity_from_env

        return RotatingSecret(
            self.db_secret_id,
            identity_from_env(),
            endpoint_url=self.aws_endpoint_url,
            max_age=self.db_secret_max_age_seconds,
            audit=audit,
        )


class MigrationSettings(DatabaseSettings):
    """Settings of a service's ``migrate`` command, which logs in as the owner of the schema."""

    log_level: LogLevel = Field("info", description="ordinary logs from this level up")
    startup_timeout_seconds: Seconds = Field(
        0, description="give up when the database can't be used after this long; 0 waits for ever"
    )


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """Read `settings` from the environment, or print one line per fault to stderr and exit with 78."""
    try:
        return settings()
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            name = ".".join(str(part) for part in fault["loc"]).upper() or settings.__name__
            what = (
                "is not set"
                if fault["type"] == "missing"
                else printable(fault["msg"].removeprefix("Value error, "))
            )
            field = settings.model_fields.get(name.lower())
            hint = f" (expected: {field.description})" if field and field.description else ""
            print(f"{name}: {what}{hint}", file=sys.stderr)
        _exit()
    except SettingsError as error:
        # A list or mapping that is no JSON; the text names the field and not the value.
        found = re.search(r'field "([^"]+)"', str(error))
        name = found[1].upper() if found else settings.__name__
        print(f"{name}: is not valid JSON", file=sys.stderr)
        _exit()


def _exit() -> NoReturn:
    raise SystemExit(EX_CONFIG)
