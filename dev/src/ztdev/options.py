"""What can be chosen for a stack, and the names that everything in it shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from .events import Report
from .state import default_state_directory, default_tools_directory

TRUST_DOMAIN = "zt.example"
NAMESPACE = "zt-demo"
NAME_PREFIX = "zt-demo"

#: In the order in which they are stopped: callers first, so that each drains while what it calls still runs.
SERVICES = ("frontend", "orders", "payments")

#: Those with a database, a secret and a role of their own.
DATABASE_SERVICES = ("orders", "payments")


def spiffe_id(service: str) -> str:
    """The SPIFFE ID of a service account, in SPIRE's usual form for Kubernetes."""
    return f"spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{service}"


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """Everything has a default that is right for `make run`; tests shorten lives and choose free ports.

    Times are in seconds. `rotate_every` is for the database passwords, in whole seconds; 0 rotates only when
    asked. `lab` is a module whose `serve(stack, socket)`, an async context manager, lets the page attack this
    stack; the socket is its to make. `proofs` is a file with what was proved, for the page.
    `environment` adds variables to (or replaces those of) one service by its name.
    """

    state_dir: Path = field(default_factory=default_state_directory)
    tools_dir: Path = field(default_factory=default_tools_directory)
    ports: Mapping[str, int] = field(default_factory=dict)
    free_ports: bool = False
    svid_ttl: float = 60.0
    ca_ttl: float = 600.0
    rotate_every: float = 60.0
    http: Literal["auto", "h11", "httptools"] = "auto"
    loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain: float = 0.0
    grace: float = 10.0
    lab: str | None = None
    proofs: Path | None = None
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ready_within: float = 60.0
    report: Report | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.svid_ttl <= 0 or self.ca_ttl < 6 * self.svid_ttl:
            raise ValueError("ca_ttl must be at least six times svid_ttl, and both more than nothing")
        if self.rotate_every < 0 or self.rotate_every % 1:
            raise ValueError("rotate_every must be whole seconds, or 0 for no schedule")
        unknown = set(self.environment) - set(SERVICES)
        if unknown:
            raise ValueError(f"no service is called {sorted(unknown)[0]!r}")
        if self.lab is not None and not _is_module(self.lab):
            raise ValueError(f"there is no module {self.lab!r} to run as the attack lab")


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its package
        return False
