"""What the frontend reads from its environment."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from ztmtls.settings import Seconds, ServiceSettings, SpiffeIdSetting

from .pillars import read_record

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MINIMUM_KEY_BYTES = 32


def _https_origin(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError("must be an https:// address: orders speaks mutual TLS only")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ValueError("must be an origin, `https://host:port`, with nothing after it")
    return text.rstrip("/")


def _web_address(text: str) -> str:
    if urlsplit(text).scheme not in ("https", "http") or not urlsplit(text).hostname:
        raise ValueError("must be an https:// address")
    return text.rstrip("/")


def _key_file(path: Path) -> Path:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from None
    if size < MINIMUM_KEY_BYTES:
        raise ValueError(f"holds {size} bytes, at least {MINIMUM_KEY_BYTES} random ones are needed")
    return path


def _proof_file(path: Path) -> Path:
    read_record(path)
    return path


class Settings(ServiceSettings):
    """The settings of every service, and the frontend's own."""

    mode: Literal["local", "eks"] = Field(
        description="`local`: plain HTTP on this machine; `eks`: TLS with our SVID, to a load balancer"
    )
    orders_url: Annotated[str, AfterValidator(_https_origin)] = Field(
        description="where orders listens, `https://host:port`"
    )
    orders_spiffe_id: SpiffeIdSetting = Field(description="the only identity accepted as orders")
    orders_timeout_seconds: Seconds = Field(10, description="wait at most this long for an answer of orders")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="host names people reach the pages by, separated by commas",
        validate_default=True,
    )
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = Field(
        16 * 1024, description="refuse request bodies above this size"
    )
    csrf_key_file: Annotated[Path, AfterValidator(_key_file)] | None = Field(
        None,
        description="file with at least 32 random bytes that sign form tokens; the same for every replica",
    )

    proof_file: Annotated[Path, AfterValidator(_proof_file)] | None = Field(
        None, description="what `make proof` wrote, for the page of the pillars"
    )
    source_url: Annotated[str, AfterValidator(_web_address)] | None = Field(
        None, description="where the files of this project can be read, for links: `https://…/blob/main`"
    )
    lab_socket: Path | None = Field(
        None, description="Unix socket of the attack lab; `local` only, and without it the lab has no address"
    )

    @field_validator("lab_socket", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return value or None

    @field_validator("lab_socket")
    @classmethod
    def _lab_is_local(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("mode") != "local":
            raise ValueError("is for MODE=local: nobody attacks a cluster from its own page")
        return value

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _hosts(cls, value: object, info: ValidationInfo) -> tuple[str, ...]:
        texts = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)):
            raise ValueError("must be host names separated by commas")
        hosts = tuple(str(text).strip().lower() for text in texts if str(text).strip())
        if "*" in "".join(hosts):
            raise ValueError("takes host names, not patterns")
        if not hosts and info.data.get("mode") == "eks":
            raise ValueError("is not set: name the host of the load balancer")
        return hosts or LOCAL_HOSTS

    @property
    def https(self) -> bool:
        """True when people reach the pages over TLS."""
        return self.mode == "eks"

    def csrf_key(self) -> bytes:
        """The key that signs form tokens; one of this process alone when no file is named."""
        return self.csrf_key_file.read_bytes() if self.csrf_key_file else secrets.token_bytes(32)
