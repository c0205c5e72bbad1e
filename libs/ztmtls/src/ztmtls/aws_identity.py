"""Who a workload is to AWS: a role assumed by web identity (IRSA), or the one that EKS Pod Identity gives.

`identity_from_env` looks at what the environment offers and takes exactly one:

1. **Web identity**, when AWS_ROLE_ARN or AWS_WEB_IDENTITY_TOKEN_FILE is set. A half of it is a fault, also
   beside a Pod Identity.
2. **EKS Pod Identity**, when AWS_CONTAINER_CREDENTIALS_FULL_URI or AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE is
   set. Its agent is on this node, at a link-local address of EKS (or on the loopback interface).
3. Otherwise there is none, and the start is refused.

The AWS SDKs look in the same order, so both may be there while a cluster moves from one to the other. What
never may be there is anything else that gives credentials: static keys, a profile, another container role.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from .reasons import Reason, Refusal, printable

_ROLE_ARN = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
_REGION = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_NOT_IN_SESSION_NAME = re.compile(r"[^\w+=,.@-]", re.ASCII)
_TOKEN = re.compile(r"[!-~]+")
_MAX_TOKEN = 20_000

#: Variables that hand out credentials to the AWS SDKs, and what sets them.
_OTHER_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a static key",
    "AWS_SECRET_ACCESS_KEY": "a static key",
    "AWS_SESSION_TOKEN": "a static key",
    "AWS_SECURITY_TOKEN": "a static key",
    "AWS_PROFILE": "a profile",
    "AWS_DEFAULT_PROFILE": "a profile",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "the role of an ECS task",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN": "a token that is never renewed",
}

#: Where the EKS Pod Identity Agent answers (EKS User Guide, "Understand how EKS Pod Identity works").
_AGENT_ADDRESSES = frozenset(map(ipaddress.ip_address, ("169.254.170.23", "fd00:ec2::23")))

_log = logging.getLogger(__name__)


class SecretError(Refusal):
    """The secret cannot be had. `reason` says why: ``secret_denied``, ``secret_unavailable`` (try again
    later) or ``secret_malformed``."""


class CredentialsRefused(SecretError):
    """There is no acceptable identity (``web_identity_missing``, ``web_identity_conflict``), or AWS does not
    take it (``web_identity_refused``). The codes are the same for Pod Identity, which rests on a token of the
    service account, too."""


@dataclass(frozen=True)
class WebIdentity:
    """A role, and the file with the token that lets a workload assume it (AssumeRoleWithWebIdentity).

    The file is read again each time, since the kubelet replaces the token. `sts_endpoint` is for a stand-in
    or a private endpoint; otherwise the regional endpoint of STS is used.
    """

    kind: ClassVar[str] = "web identity"

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
        _refuse_other_credentials(environ)
        missing = [name for name in ("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE") if not environ.get(name)]
        if missing:
            raise _missing(
                f"IRSA was not injected: {' and '.join(missing)} not set. Check that the service account has "
                "the annotation eks.amazonaws.com/role-arn, then delete the pod: the next one gets them"
            )
        role_arn = environ["AWS_ROLE_ARN"]
        if not _ROLE_ARN.fullmatch(role_arn):
            raise _missing(f"AWS_ROLE_ARN is not the ARN of an IAM role: {printable(role_arn)}")
        identity = cls(
            role_arn=role_arn,
            token_file=Path(environ["AWS_WEB_IDENTITY_TOKEN_FILE"]),
            region=_region(environ),
            session_name=_session_name(environ),
            sts_endpoint=environ.get("AWS_ENDPOINT_URL_STS") or environ.get("AWS_ENDPOINT_URL") or None,
        )
        identity.read_token()
        return identity

    def read_token(self) -> str:
        """The token as it is in the file now.

        Raises:
            CredentialsRefused: ``web_identity_missing``; the text names the file and, for one that this user
                may not read, the user.
        """
        return _read_token(self.token_file)

    def __str__(self) -> str:
        return self.role_arn


@dataclass(frozen=True)
class PodIdentity:
    """The EKS Pod Identity Agent of this node, and the file with the token that it wants to see.

    It answers with credentials of the role that the service account is associated with, and does not say
    which role that is: `role_arn` is None. The file is read again each time. `host` is an address, never a
    name; `path` is what is asked for.
    """

    kind: ClassVar[str] = "pod identity"
    role_arn: ClassVar[None] = None

    host: str
    port: int
    path: str
    token_file: Path
    region: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> PodIdentity:
        """Read the variables that EKS sets in the pods of an associated service account:
        AWS_CONTAINER_CREDENTIALS_FULL_URI, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE, AWS_REGION (or
        AWS_DEFAULT_REGION).

        Raises:
            CredentialsRefused: as `WebIdentity.from_env`; ``web_identity_conflict`` also for the address of
                anything but EKS's own agent.
        """
        environ = os.environ if environ is None else environ
        _refuse_other_credentials(environ)
        names = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
        missing = [name for name in names if not environ.get(name)]
        if missing:
            raise _missing(
                f"EKS Pod Identity was not injected: {' and '.join(missing)} not set. Check that the service "
                "account has an association, then delete the pod: the next one gets them"
            )
        host, port, path = _agent(environ["AWS_CONTAINER_CREDENTIALS_FULL_URI"])
        token_file = Path(environ["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"])
        identity = cls(host, port, path, token_file, _region(environ))
        identity.read_token()
        return identity

    def read_token(self) -> str:
        """As `WebIdentity.read_token`."""
        return _read_token(self.token_file)

    def __str__(self) -> str:
        return "the role of this service account's EKS Pod Identity association"


def identity_from_env(environ: Mapping[str, str] | None = None) -> WebIdentity | PodIdentity:
    """The one identity that this process uses for AWS, chosen as the module says, and named in the log.

    Raises:
        CredentialsRefused: there is none, only half of one, or other credentials stand beside it.
    """
    environ = os.environ if environ is None else environ
    by_web_identity = _any_of(environ, "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")
    by_pod_identity = _any_of(
        environ, "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
    )
    identity: WebIdentity | PodIdentity
    if by_pod_identity and not by_web_identity:
        identity = PodIdentity.from_env(environ)
    else:
        identity = WebIdentity.from_env(environ)
    beside = "; EKS Pod Identity is offered too, and not used" if by_pod_identity and by_web_identity else ""
    _log.info("AWS credentials by %s: %s%s", identity.kind, identity, beside)
    return identity


def _any_of(environ: Mapping[str, str], *names: str) -> bool:
    return any(environ.get(name) for name in names)


def _refuse_other_credentials(environ: Mapping[str, str]) -> None:
    for name, what in _OTHER_CREDENTIALS.items():
        if environ.get(name):
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_CONFLICT,
                f"{name} is set: {what} must not stand beside the identity of this workload. Unset it; only "
                "IRSA or EKS Pod Identity give this workload credentials",
            )
    if uri := environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        _agent(uri)


def _agent(uri: str) -> tuple[str, int, str]:
    """Address, port and path of the agent. The token goes there in the clear, so it must be on this node."""
    try:
        parts = urlsplit(uri)
        address = ipaddress.ip_address(parts.hostname or "")
        port = parts.port or 80
    except ValueError:
        parts = None
    if (
        parts is None
        or parts.scheme != "http"
        or not (address in _AGENT_ADDRESSES or address.is_loopback)
        or "@" in parts.netloc
        or not _TOKEN.fullmatch(uri)
    ):
        raise CredentialsRefused(
            Reason.WEB_IDENTITY_CONFLICT,
            "AWS_CONTAINER_CREDENTIALS_FULL_URI is set, and is not the EKS Pod Identity Agent "
            "(http://169.254.170.23 or http://[fd00:ec2::23], or a loopback address): another container "
            "role must not be used. Unset it",
        )
    return str(address), port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _region(environ: Mapping[str, str]) -> str:
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if not region or not _REGION.fullmatch(region):
        raise _missing("AWS_REGION is not set to a region such as eu-central-1")
    return region


def _session_name(environ: Mapping[str, str]) -> str:
    """What CloudTrail shows: the pod, when there is one."""
    name = environ.get("AWS_ROLE_SESSION_NAME") or environ.get("HOSTNAME") or "ztmtls"
    name = _NOT_IN_SESSION_NAME.sub("-", name)[:64]
    return name if len(name) >= 2 else f"{name}-ztmtls"


def _read_token(file: Path) -> str:
    def unreadable(why: str) -> CredentialsRefused:
        return _missing(f"no token in {printable(str(file))}: {why}")

    try:
        with file.open(encoding="ascii") as opened:
            token = opened.read(_MAX_TOKEN + 2).strip()
    except PermissionError:
        raise unreadable(
            f"user {os.geteuid()} may not read it. Give the pod a securityContext with fsGroup"
        ) from None
    except FileNotFoundError:
        raise unreadable("it does not exist. Check the projected volume of the pod") from None
    except (OSError, ValueError) as error:
        raise unreadable(f"it cannot be read ({type(error).__name__})") from None
    if not token or len(token) > _MAX_TOKEN:
        raise unreadable("it is too large" if token else "it is empty")
    if not _TOKEN.fullmatch(token):
        raise unreadable("it holds more than a token")
    return token


def _missing(detail: str) -> CredentialsRefused:
    return CredentialsRefused(Reason.WEB_IDENTITY_MISSING, detail)
