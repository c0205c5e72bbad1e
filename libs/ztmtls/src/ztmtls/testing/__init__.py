"""Everything needed to test SPIFFE mutual TLS without a cluster: real certificates, real sockets.

- `CertificateAuthority`: signs SVIDs, good ones and ones that must be refused, and rotates.
- `WorkloadApi`: serves them on Unix sockets as a SPIFFE agent does, and can be scripted.
  `BackgroundWorkloadApi` is the same for tests without an event loop.
- `Rotation`: keeps SVIDs and authorities fresh.
- `calling_as`: a client of an ASGI application as a verified caller, behind the guard, without sockets.
- `StaticSource`: a source that always holds the same context.
- pytest fixtures, in `ztmtls.testing.fixtures`: loaded by pytest itself.

Names are imported when they are first used: pytest loads this package in every run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ztmtls.source import StaticSource as StaticSource

    from .attestation import Attestation as Attestation
    from .background import BackgroundWorkloadApi as BackgroundWorkloadApi
    from .ca import Authority as Authority
    from .ca import AuthorityError as AuthorityError
    from .ca import AuthorityState as AuthorityState
    from .ca import CertificateAuthority as CertificateAuthority
    from .ca import new_key as new_key
    from .ca import with_broken_signature as with_broken_signature
    from .ca import with_other_key as with_other_key
    from .calling import calling_as as calling_as
    from .rotation import Rotation as Rotation
    from .rotation import RotationEvent as RotationEvent
    from .rotation import RotationStep as RotationStep
    from .workload_api import Workload as Workload
    from .workload_api import WorkloadApi as WorkloadApi
    from .workload_api import WorkloadIdentity as WorkloadIdentity

_HOME = {
    "Attestation": ".attestation",
    "Authority": ".ca",
    "AuthorityError": ".ca",
    "AuthorityState": ".ca",
    "BackgroundWorkloadApi": ".background",
    "CertificateAuthority": ".ca",
    "Rotation": ".rotation",
    "RotationEvent": ".rotation",
    "RotationStep": ".rotation",
    "StaticSource": "ztmtls.source",
    "Workload": ".workload_api",
    "WorkloadApi": ".workload_api",
    "WorkloadIdentity": ".workload_api",
    "calling_as": ".calling",
    "new_key": ".ca",
    "with_broken_signature": ".ca",
    "with_other_key": ".ca",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
