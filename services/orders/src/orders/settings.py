"""What orders reads from its environment, once, at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from ztmtls.settings import ExistingFile, Port, Seconds, ServiceSettings, SpiffeIdSetting

PACKAGED_POLICY = Path(__file__).with_name("policy.yaml")


class DatabaseSettings(BaseSettings):
    """The database, and how its credentials are fetched: from Secrets Manager, by web identity."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    db_host: str = Field(min_length=1, description="host of PostgreSQL, as its certificate names it")
    db_port: Port = Field(5432, description="port of PostgreSQL")
    db_name: str = Field(min_length=1, description="name of the database")
    db_ca_file: ExistingFile = Field(description="PEM file with the CA of the database's certificate")
    db_secret_id: str = Field(min_length=1, description="name or ARN of the secret with user and password")
    aws_role_arn: str = Field(min_length=1, description="role to assume; IRSA sets it")
    aws_web_identity_token_file: Path = Field(
        description="file with the service account's token; IRSA sets it"
    )
    aws_region: str = Field(min_length=1, description="AWS region; IRSA sets it")
    aws_endpoint_url: str | None = Field(None, description="another address for the AWS APIs")


class MigrationSettings(DatabaseSettings):
    """Settings of ``python -m orders migrate``, which logs in as the owner of the schema."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="ordinary logs from this level up"
    )
    startup_timeout_seconds: Seconds = Field(
        0, description="give up when the database can't be used after this long; 0 waits for ever"
    )


class Settings(ServiceSettings, DatabaseSettings):
    """Settings of ``python -m orders``."""

    policy_file: ExistingFile = Field(PACKAGED_POLICY, description="who may call what")
    payments_url: str = Field(
        pattern=r"^https://[^/?#@]+$", description="where payments is, https://host:port"
    )
    payments_spiffe_id: SpiffeIdSetting = Field(description="the SPIFFE ID that payments must prove")
