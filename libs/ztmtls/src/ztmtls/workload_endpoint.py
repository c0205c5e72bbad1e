"""The address of the Workload API (SPIFFE Workload Endpoint, section 4)."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from .reasons import Reason, Refusal, printable

ENVIRONMENT_VARIABLE = "SPIFFE_ENDPOINT_SOCKET"
# sun_path in struct sockaddr_un holds 108 bytes with the closing NUL (unix(7)).
MAX_SOCKET_PATH = 107
# `urlsplit` overlooks what stands between "]" and ":".
_HOST_AND_PORT = re.compile(r"(?:\[[^\[\]]+\]|[^\[\]:]+):[0-9]+")


class InvalidEndpoint(Refusal, ValueError):
    """The address of the Workload API can't be used. Reason: `invalid_endpoint`."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.INVALID_ENDPOINT, detail)


def parse_endpoint(address: str | None = None) -> str:
    """Return the gRPC target for `address`, or for ``SPIFFE_ENDPOINT_SOCKET`` when it is None.

    Accepts ``unix:/absolute/path`` (``unix:///absolute/path``) and ``tcp://IP:port`` with an IP literal,
    and nothing more. Raises `InvalidEndpoint`.
    """
    address = os.environ.get(ENVIRONMENT_VARIABLE, "") if address is None else address
    if not address:
        raise InvalidEndpoint(
            f"no Workload API address: set {ENVIRONMENT_VARIABLE}, e.g. to unix:/run/agent.sock"
        )
    shown = printable(address)
    if not address.isascii() or any(c.isspace() or not c.isprintable() for c in address):
        raise InvalidEndpoint(f"'{shown}' holds spaces or characters that are not printable ASCII")
    try:
        uri = urlsplit(address)
        port = uri.port
    except ValueError as error:
        raise InvalidEndpoint(f"'{shown}' is not a URI: {error}") from None
    if uri.scheme not in ("unix", "tcp"):
        raise InvalidEndpoint(f"'{shown}' must begin with 'unix:/' or 'tcp://'")
    if "?" in address or "#" in address or "@" in uri.netloc:
        raise InvalidEndpoint(f"'{shown}' must hold no user info, query or fragment")
    if uri.scheme == "unix":
        return _unix(uri.netloc, uri.path, shown)
    if uri.path:
        raise InvalidEndpoint(f"'{shown}' must hold no path")
    try:
        # A zone is no part of an IP address (RFC 3986 section 3.2.2).
        host = ipaddress.ip_address("" if "%" in uri.netloc else uri.hostname or "")
    except ValueError:
        raise InvalidEndpoint(f"'{shown}' must name its host by an IP address") from None
    if not port or not _HOST_AND_PORT.fullmatch(uri.netloc):
        raise InvalidEndpoint(f"'{shown}' must end in ':' and a port")
    return f"ipv6:[{host}]:{port}" if host.version == 6 else f"ipv4:{host}:{port}"


def _unix(authority: str, path: str, shown: str) -> str:
    if authority:
        raise InvalidEndpoint(f"'{shown}' has an authority: write unix:/path or unix:///path")
    if not path.startswith("/") or path.startswith("//"):  # gRPC takes what follows "//" for an authority
        raise InvalidEndpoint(f"'{shown}' must hold an absolute path")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise InvalidEndpoint(
            f"'{shown}' is longer than the {MAX_SOCKET_PATH} bytes a Unix socket path may have"
        )
    if os.path.isdir(path):
        raise InvalidEndpoint(f"'{shown}' is a directory, not a socket")
    return f"unix:{path}"
