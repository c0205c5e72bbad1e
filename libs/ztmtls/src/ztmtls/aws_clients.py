"""boto3 clients as a service needs them: no credentials but those that are given, the regional endpoint, an
answer or a failure within seconds, and neither requests nor answers in the logs."""

from __future__ import annotations

import logging
import os
from typing import Any

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import CredentialResolver
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from .aws_identity import SecretError
from .reasons import Reason, printable

#: Seconds to reach AWS, and to wait for its answer. Calls are tried twice (botocore's standard retry mode,
#: which also waits out throttling).
CONNECT_TIMEOUT, READ_TIMEOUT, ATTEMPTS = 3.0, 5.0, 2

#: What a client raises when AWS did not answer, or answered what cannot be read: botocore's parsers raise
#: KeyError for what they miss.
NO_ANSWER = (BotoCoreError, ResponseParserError, KeyError)


class Clients:
    """Makes clients for one region, from a session of its own. For one thread: making them is not safe in
    several (https://boto3.amazonaws.com/v1/documentation/api/latest/guide/session.html)."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._session: boto3.session.Session | None = None

    def make(self, service: str, endpoint_url: str | None, **keys: str) -> Any:
        """A client that signs with `keys`, and with nothing when there are none."""
        if self._session is None:
            self._session = _session()
        options: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
            "max_pool_connections": 1,
            "ignore_configured_endpoint_urls": True,  # endpoints are arguments here
        }
        if not keys:
            options["signature_version"] = UNSIGNED
        if endpoint_url is not None and endpoint_url.startswith("http:"):
            options["proxies"] = {}  # never a token in the clear to somebody in between
        make: Any = self._session.client
        client = make(
            service,
            region_name=self._region,
            endpoint_url=endpoint_url,
            config=Config(**options),
            **keys,
        )
        _keep_bodies_out_of_logs()
        return client


def _session() -> boto3.session.Session:
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
    return boto3.session.Session(botocore_session=session)


class _NoDebug(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.INFO


_no_debug = _NoDebug()


def _keep_bodies_out_of_logs() -> None:
    """botocore's debug lines hold whole requests and answers: the token, the keys and the secret."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("boto3", "botocore", "urllib3")):
            logging.getLogger(name).addFilter(_no_debug)


def error_code(error: ClientError) -> str:
    """What AWS calls its refusal."""
    return printable(str(error.response.get("Error", {}).get("Code", "unknown")), 64)


def no_answer(service: str, what: str) -> SecretError:
    """``secret_unavailable``: try again later."""
    return SecretError(Reason.SECRET_UNAVAILABLE, f"{service} gave no answer to work with ({what})")
