"""The verified identity behind one ASGI request: where `server` puts it and applications find it.

It lives in the ASGI scope under a key of its own, put there per connection by the server from the TLS
layer. Nothing a client sends can set it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from .reasons import Reason, Refusal
from .tls import Connection

SCOPE_KEY = "ztmtls"


class NoPeer(Refusal):
    """The request did not come over verified mutual TLS. Reason: `no_peer`."""

    def __init__(self) -> None:
        super().__init__(Reason.NO_PEER, "the request did not come over verified mutual TLS")


@dataclass(frozen=True, slots=True)
class RequestIdentity:
    """The connection a request came on, and the policy rule that allowed the request."""

    connection: Connection
    rule: str | None = None


def request_identity(scope: Mapping[str, Any]) -> RequestIdentity:
    """The verified identity of this ASGI request. Raises `NoPeer` when there is none."""
    identity = scope.get(SCOPE_KEY)
    if not isinstance(identity, RequestIdentity):
        raise NoPeer
    return identity


def set_request_identity(scope: MutableMapping[str, Any], identity: RequestIdentity | None) -> None:
    """Used by `server` alone."""
    scope[SCOPE_KEY] = identity
