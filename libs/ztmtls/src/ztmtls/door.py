"""TLS towards a load balancer, which has no SVID to show: the one listener that asks for no certificate.

An application load balancer speaks TLS to its targets and presents no client certificate, so it can't be a
peer of mutual TLS. Between it and the first service the wire is encrypted, and the service says who it is.
Who may connect is for the network to say (a network policy, a security group), and nothing behind it may take
such a connection for anybody's identity.
"""

from __future__ import annotations

import ssl
import threading
from typing import Any

from .material import load_svid
from .reasons import Refusal
from .source import Source


class DoorContext(ssl.SSLContext):
    """Hands every new connection to a context that presents the newest SVID of a source.

    While there is none it has no certificate, and every handshake fails.
    """

    _source: Source
    _newest: tuple[int, ssl.SSLContext] | None
    _lock: threading.Lock

    @classmethod
    def of(cls, source: Source) -> DoorContext:
        """A server's context, TLS 1.2 (RFC 5246) and 1.3 (RFC 8446): what a load balancer of today speaks."""
        context = cls(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context._source = source
        context._newest = None
        context._lock = threading.Lock()
        return context

    def newest(self) -> ssl.SSLContext:
        """The context of the newest generation. Raises `source.NoIdentity` when there is none."""
        snapshot = self._source.context
        with self._lock:
            if self._newest is None or self._newest[0] != snapshot.generation:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
                context.set_alpn_protocols(["http/1.1"])
                load_svid(context, snapshot.svid)
                self._newest = snapshot.generation, context
            return self._newest[1]

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """As `ssl.SSLContext.wrap_bio`, on the newest generation."""
        try:
            return self.newest().wrap_bio(*args, **kwargs)
        except Refusal:
            return super().wrap_bio(*args, **kwargs)  # without a certificate: the handshake fails

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """As `ssl.SSLContext.wrap_socket`, on the newest generation."""
        try:
            return self.newest().wrap_socket(*args, **kwargs)
        except Refusal:
            return super().wrap_socket(*args, **kwargs)
