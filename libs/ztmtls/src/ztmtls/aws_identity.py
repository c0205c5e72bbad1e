"""Who a workload is to AWS: a role assumed by web identity (IRSA, JWT-SVID), or what EKS Pod Identity gives.

`identity_from_env` looks at what the environment offers and takes exactly one:

1. **Web identity**, when AWS_ROLE_ARN or AWS_WEB_IDENTITY_TOKEN_FILE is set. A half of it is a fault, also
   beside a Pod Identity. Where AWS_WEB_IDENTITY_TOKEN_FROM is ``workload-api``, the token is a **JWT-SVID**
   of this workload and in no file; the role then trusts its SPIFFE ID, and SPIRE's OIDC discovery provider.
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
from .workload_endpoint import parse_endpoint

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

#: What a JWT-SVID for STS is made out to: the client ID of the IAM OIDC provider.
_AUDIENCE = "sts.amazonaws.com"

#: How one asks for it.
_FROM = "AWS_WEB_IDENTITY_TOKEN_FROM=workload-api"

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
        identity = cls(
            role_arn=_role_arn(environ),
            token_file=Path(environ["AWS_WEB_IDENTITY_TOKEN_FILE"]),
            region=_region(environ),
            session_name=_session_name(environ),
            sts_endpoint=_sts_endpoint(environ),
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

    @property
    def token_origin(self) -> str:
        """Where the token is from, in words."""
        return str(self.token_file)

    def __str__(self) -> str:
        return self.role_arn


@dataclass(frozen=True)
class JwtSvidIdentity:
    """A role that this workload may assume with its own JWT-SVID (AssumeRoleWithWebIdentity).

    The role's trust policy names SPIRE's issuer, whose OIDC discovery provider AWS knows, and under ``sub``
    the SPIFFE ID. The token is fetched from the Workload API each time, and never in a file. `spiffe_id` is
    which of our identities; None for the first that the agent names. Needs the extra `jwt`.
    """

    kind: ClassVar[str] = "JWT-SVID"

    role_arn: str
    endpoint: str
    spiffe_id: str | None
    region: str
    session_name: str
    sts_endpoint: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> JwtSvidIdentity:
        """Read AWS_ROLE_ARN, SPIFFE_ENDPOINT_SOCKET, SPIFFE_ID (optional), and the rest as
        `WebIdentity.from_env`. The agent is not asked yet: it may come later than we.

        Raises:
            CredentialsRefused: ``web_identity_conflict`` when the environment offers other credentials too,
                a token file among them; ``web_identity_missing`` when a variable is missing or wrong.
        """
        environ = os.environ if environ is None else environ
        _refuse_other_credentials(environ)
        if environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
            raise CredentialsRefused(
                Reason.WEB_IDENTITY_CONFLICT,
                f"AWS_WEB_IDENTITY_TOKEN_FILE is set beside {_FROM}: only one of them can be meant. Unset "
                "the other",
            )
        missing = [name for name in ("AWS_ROLE_ARN", "SPIFFE_ENDPOINT_SOCKET") if not environ.get(name)]
        if missing:
            raise _missing(f"{_FROM} needs {' and '.join(missing)}, which is not set")
        try:
            parse_endpoint(environ["SPIFFE_ENDPOINT_SOCKET"])
        except ValueError as error:
            raise _missing(str(error)) from None
        return cls(
            role_arn=_role_arn(environ),
            endpoint=environ["SPIFFE_ENDPOINT_SOCKET"],
            spiffe_id=environ.get("SPIFFE_ID") or None,
            region=_region(environ),
            session_name=_session_name(environ),
            sts_endpoint=_sts_endpoint(environ),
        )

    @property
    def token_origin(self) -> str:
        """Where the token is from, in words."""
        return f"the Workload API at {self.endpoint}"

    def read_token(self) -> str:
        """A JWT-SVID for STS, fetched now. Blocks for some seconds while there is no agent.

        Raises:
            CredentialsRefused: ``web_identity_missing``: the agent says that we may have none.
            SecretError: ``secret_unavailable``: it does not answer, or not what can be used.
        """
        from .jwt_source import fetch_once
        from .source import NoIdentity

        try:
            return fetch_once(self.endpoint, _AUDIENCE, spiffe_id=self.spiffe_id).token
        except NoIdentity as error:
            what = f"no JWT-SVID for {_AUDIENCE}: {error.detail}"
            if error.reason is Reason.IDENTITY_DENIED:
                raise _missing(what) from None
            raise SecretError(Reason.SECRET_UNAVAILABLE, what) from None

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


#: Who a workload can be to AWS.
Identity = WebIdentity | JwtSvidIdentity | PodIdentity


def identity_from_env(environ: Mapping[str, str] | None = None) -> Identity:
    """The one identity that this process uses for AWS, chosen as the module says, and named in the log.

    Raises:
        CredentialsRefused: there is none, only half of one, or other credentials stand beside it.
    """
    environ = os.environ if environ is None else environ
    by_jwt_svid = _by_jwt_svid(environ)
    by_web_identity = by_jwt_svid or _any_of(environ, "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")
    by_pod_identity = _any_of(
        environ, "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
    )
    identity: Identity
    if by_jwt_svid:
        identity = JwtSvidIdentity.from_env(environ)
    elif by_pod_identity and not by_web_identity:
        identity = PodIdentity.from_env(environ)
    else:
        identity = WebIdentity.from_env(environ)
    beside = "; EKS Pod Identity is offered too, and not used" if by_pod_identity and by_web_identity else ""
    _log.info("AWS credentials by %s: %s%s", identity.kind, identity, beside)
    return identity


def _by_jwt_svid(environ: Mapping[str, str]) -> bool:
    wanted = environ.get("AWS_WEB_IDENTITY_TOKEN_FROM")
    if wanted and f"AWS_WEB_IDENTITY_TOKEN_FROM={wanted}" != _FROM:
        raise _missing(
            f"AWS_WEB_IDENTITY_TOKEN_FROM is {printable(wanted)}; it can be workload-api, or not set"
        )
    return bool(wanted)


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


def _role_arn(environ: Mapping[str, str]) -> str:
    role_arn = environ["AWS_ROLE_ARN"]
    if not _ROLE_ARN.fullmatch(role_arn):
        raise _missing(f"AWS_ROLE_ARN is not the ARN of an IAM role: {printable(role_arn)}")
    return role_arn


def _sts_endpoint(environ: Mapping[str, str]) -> str | None:
    return environ.get("AWS_ENDPOINT_URL_STS") or environ.get("AWS_ENDPOINT_URL") or None


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
