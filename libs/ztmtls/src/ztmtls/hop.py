"""What one side of a hop verified about the other, in a form that can be shown and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .svid import IdentitySummary

if TYPE_CHECKING:  # it comes with the extra `client`
    import httpx

#: Where a client leaves the connection of a response, among the response's extensions.
CONNECTION = "ztmtls_connection"


@dataclass(frozen=True, slots=True)
class HopView:
    """One side's view of one mutually authenticated request.

    `side` says who is speaking: the caller (client) or the callee (server). `own` is the certificate
    that side presented, `peer` the one it verified, `authority` the serial number of the authority that
    vouched for the peer. `rule` is the policy rule that allowed the request, known to the callee only.
    """

    side: Literal["caller", "callee"]
    own: IdentitySummary
    peer: IdentitySummary
    authority: str
    tls_version: str
    cipher: str
    generation: int
    connection: str
    rule: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON-able mapping."""
        return {
            "side": self.side,
            "own": self.own.as_dict(),
            "peer": {**self.peer.as_dict(), "authority": self.authority},
            "tls_version": self.tls_version,
            "cipher": self.cipher,
            "generation": self.generation,
            "connection": self.connection,
            "rule": self.rule,
        }


def hop(response: httpx.Response) -> HopView:
    """What a client of ours verified about the server that sent `response`.

    Raises `KeyError` for a response that no ztmtls client received.
    """
    view: HopView = response.extensions[CONNECTION].view()
    return view
