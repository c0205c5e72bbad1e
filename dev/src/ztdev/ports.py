"""Which ports the stack uses, and what to say when one is taken."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .errors import PortInUse, StackError
from .processes import port_is_free, port_owner

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Ports:
    """One TCP port on 127.0.0.1 for each purpose."""

    page: int = 8080
    frontend_probe: int = 18080
    orders: int = 18441
    orders_probe: int = 18451
    payments: int = 18442
    payments_probe: int = 18452
    oidc: int = 18443
    cloud: int = 14566
    postgres: int = 15432

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


PURPOSES: Mapping[str, str] = {
    "page": "the page for people",
    "frontend_probe": "frontend's probes and metrics",
    "orders": "orders (mutual TLS)",
    "orders_probe": "orders' probes and metrics",
    "payments": "payments (mutual TLS)",
    "payments_probe": "payments' probes and metrics",
    "oidc": "the web-identity issuer",
    "cloud": "the local AWS",
    "postgres": "PostgreSQL",
}


def resolve_ports(chosen: Mapping[str, int], *, free: bool) -> Ports:
    """The ports of a stack: `chosen` ones as they are, the others by default or, with `free`, any free
    ones."""
    unknown = set(chosen) - set(Ports.names())
    if unknown:
        raise StackError(f"No port is called {sorted(unknown)[0]!r}. Ports: {', '.join(Ports.names())}.")
    for name, port in chosen.items():
        if not 1 <= port <= 65535:
            raise StackError(f"The port {name} must be a number from 1 to 65535, not {port}.")
    ports = replace(Ports(), **chosen)
    if free:
        others = [name for name in Ports.names() if name not in chosen]
        ports = replace(
            ports,
            **dict(zip(others, choose_free_ports(len(others), avoid=set(chosen.values())), strict=True)),
        )
    _refuse_doubles(ports)
    return ports


def _refuse_doubles(ports: Ports) -> None:
    owners: dict[int, str] = {}
    for name, port in ports.as_dict().items():
        if port in owners:
            raise StackError(
                f"The ports {owners[port]} and {name} are both {port}: give one of them another number."
            )
        owners[port] = name


def choose_free_ports(count: int, avoid: set[int] | None = None) -> list[int]:
    """Free ports below the range from which the kernel takes ports for outgoing connections, so that none of
    them is lent away between this choice and its use. All are held at once, so they differ."""
    first, last = 15000, _first_ephemeral_port() - 1
    candidates = random.sample(range(first, last), k=last - first)
    chosen: list[int] = []
    with contextlib.ExitStack() as held:
        for port in candidates:
            if len(chosen) == count:
                break
            if avoid and port in avoid:
                continue
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            chosen.append(port)
    if len(chosen) < count:
        raise PortInUse(f"Fewer than {count} free ports between {first} and {last}.")
    return chosen


def _first_ephemeral_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32768
    return first if first > 16000 else 32768


def setting_of(name: str) -> str:
    """The option that changes this port."""
    return "--port N" if name == "page" else f"--use-port {name}=N"


def refuse_taken_ports(ports: Ports) -> None:
    """Raise `PortInUse` with one line per taken port: which, by whom if that can be seen, and what to do."""
    lines: list[str] = []
    for name, port in ports.as_dict().items():
        if port_is_free(port, HOST):
            continue
        owner = port_owner(port)
        by = f"in use by {owner}" if owner else "in use, or not open to this user"
        lines.append(f"Port {port} for {PURPOSES[name]} is {by}: choose another with {setting_of(name)}.")
    if lines:
        lines.append("Or let ztdev choose free ports for all of them: --free-ports.")
        raise PortInUse("\n".join(lines))
