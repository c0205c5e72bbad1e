"""Call other services over mutual TLS with `requests`, for programs that are written for its API.

New programs that block are served better by `ztmtls.client.Client`, which needs no adapter. What an
adapter has to get right, and this one does: the TLS context is ours whatever ``verify`` and ``cert`` say,
there is no way around it by plain HTTP, a redirect or a proxy, and a pooled connection is used again only
while its peer is acceptable and our own identity is the one that it was made with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPSConnection

from .audit import AuditLog
from .authz import Authorizer, exact
from .hop import HopView
from .ids import SpiffeId
from .reasons import Reason, Refusal
from .source import NoIdentity, Source
from .tls import Connection, client_context, connection_of, refusal_behind

DEFAULT_TIMEOUT = (5.0, 10.0)
"""Seconds to connect, and to wait for the server at each read, where a call names no `timeout`."""


class ServerRefused(requests.exceptions.SSLError, Refusal):
    """We refused the server's identity. Nothing of the request was sent."""

    def __init__(self, refusal: Refusal) -> None:
        requests.exceptions.SSLError.__init__(self)
        Refusal.__init__(self, refusal.reason, refusal.detail)


class RefusedByServer(requests.exceptions.ConnectionError, Refusal):
    """The server ended TLS with an alert about our certificate. Reason: `refused_by_server`."""

    def __init__(self, detail: str) -> None:
        requests.exceptions.ConnectionError.__init__(self)
        Refusal.__init__(self, Reason.REFUSED_BY_SERVER, detail)


class NoIdentityError(requests.exceptions.ConnectionError, Refusal):
    """We have no identity to present at the moment. Nothing was sent."""

    def __init__(self, refusal: Refusal) -> None:
        requests.exceptions.ConnectionError.__init__(self)
        Refusal.__init__(self, refusal.reason, refusal.detail)


class Session(requests.Session):
    """A `requests.Session` that speaks mutual TLS to one expected peer, and nothing else.

    Args:
        source: our identity.
        peer: the SPIFFE ID the server must prove, or an authorizer.

    Redirects are not followed, the answer that asks for one is returned. Settings of the environment
    (proxies, CA files, ``.netrc``) are not read. Failures are requests' exceptions; those with an identity
    behind them are `ServerRefused`, `RefusedByServer` and `NoIdentityError`, which carry a `reason`.
    """

    def __init__(
        self, source: Source, *, peer: SpiffeId | str | Authorizer, audit: AuditLog | None = None
    ) -> None:
        super().__init__()
        self.trust_env = False
        self.adapters.clear()
        self.mount("https://", _Adapter(source, peer=peer, audit=audit))

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: the next target may be another identity."""
        return None


class _Adapter(HTTPAdapter):
    """The part of `Session` that makes connections."""

    def __init__(
        self, source: Source, *, peer: SpiffeId | str | Authorizer, audit: AuditLog | None = None
    ) -> None:
        authorizer = exact(peer) if isinstance(peer, (SpiffeId, str)) else peer
        self._source = source
        self._context = client_context(source, authorizer, audit=audit)
        super().__init__()

    def init_poolmanager(
        self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any
    ) -> None:
        """As in `HTTPAdapter`, with connections of our own."""
        # The SPIFFE ID stands in place of the host name.
        super().init_poolmanager(
            connections,
            maxsize,
            block,
            ssl_context=self._context,
            assert_hostname=False,
            **pool_kwargs,
        )
        our_source = self._source

        class ConnectionOfSource(_Connection):
            source = our_source

        class Pool(HTTPSConnectionPool):
            ConnectionCls = ConnectionOfSource

        self.poolmanager.pool_classes_by_scheme = {"https": Pool}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing: trust and certificate come from the Workload API alone."""

    def proxy_manager_for(self, proxy: Any, **proxy_kwargs: Any) -> Any:
        """Refused: TLS to a proxy would not be ours."""
        raise requests.exceptions.ProxyError("ztmtls uses no proxies: the peer must be reached directly")

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """As `HTTPAdapter.send`, over verified connections only."""
        outer = sys.exception()
        try:
            _ = self._source.context
        except NoIdentity as refusal:
            raise NoIdentityError(refusal) from refusal
        try:
            # verify and cert are for contexts that take trust and certificates from files.
            return super().send(request, stream, timeout or DEFAULT_TIMEOUT, True, None, proxies)
        except requests.exceptions.SSLError as error:
            behind = refusal_behind(error, outer)
            if behind is None:
                raise
            if behind.reason is Reason.REFUSED_BY_SERVER:
                raise RefusedByServer(behind.detail) from error
            raise ServerRefused(behind) from error


class _Connection(HTTPSConnection):
    """One connection, which is taken up again only while both identities on it are good."""

    source: Source

    @property
    def is_connected(self) -> bool:
        """False makes the pool close this connection and make a new one, whose handshake decides."""
        return super().is_connected and self._current()

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        # Raises for a connection that is not ours: there is no answer of unknown origin.
        connection = connection_of(self.sock)
        response = super().getresponse()
        response.ztmtls_connection = connection  # type: ignore[attr-defined]
        return response

    def _current(self) -> bool:
        try:
            connection = connection_of(self.sock)
            snapshot = self.source.context
            connection.recheck(snapshot, datetime.now(UTC))
        except Refusal:
            return False
        return connection.generation == snapshot.generation


def hop(response: requests.Response) -> HopView:
    """What this client verified about the server that sent `response`.

    Raises `AttributeError` for a response that no ztmtls session received.
    """
    raw: Any = response.raw
    connection: Connection = raw.ztmtls_connection
    return connection.view()


__all__ = ["DEFAULT_TIMEOUT", "NoIdentityError", "RefusedByServer", "ServerRefused", "Session", "hop"]
