"""SPIFFE mutual TLS for Python: verified peers, per-request authorization, rotating credentials.

The core is here: identities (`ids`, `svid`), the check of a peer (`verify`), who may do what (`authz`), the
Workload API (`source`) and TLS contexts that rotate (`tls`). What needs an extra is imported by its
module: `ztmtls.server`, `ztmtls.fastapi`, `ztmtls.client`, `ztmtls.secrets`, `ztmtls.database`,
`ztmtls.testing`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .authz import (
        Policy,
        PolicyFile,
        all_of,
        any_of,
        exact,
        load_policy,
        one_of,
        path_prefix,
        trust_domain,
    )
    from .ids import SpiffeId, TrustDomain
    from .reasons import Reason, Refusal
    from .source import NoIdentity, SourceState, StaticSource, X509Source
    from .svid import X509Bundle, X509Context, X509Svid
    from .tls import Connection, client_context, connection_of, server_context
    from .verify import PeerRefused, VerifiedPeer, verify_peer

__all__ = [
    "Connection",
    "NoIdentity",
    "PeerRefused",
    "Policy",
    "PolicyFile",
    "Reason",
    "Refusal",
    "SourceState",
    "SpiffeId",
    "StaticSource",
    "TrustDomain",
    "VerifiedPeer",
    "X509Bundle",
    "X509Context",
    "X509Source",
    "X509Svid",
    "all_of",
    "any_of",
    "client_context",
    "connection_of",
    "exact",
    "load_policy",
    "one_of",
    "path_prefix",
    "server_context",
    "trust_domain",
    "verify_peer",
]

_MODULES = ("reasons", "ids", "svid", "authz", "verify", "source", "tls")


def __getattr__(name: str) -> Any:
    # On first use (PEP 562): the pytest plugin imports this package in every test run, and gRPC and
    # OpenSSL are a lot to load for those who don't use them.
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f".{module}", __name__), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
