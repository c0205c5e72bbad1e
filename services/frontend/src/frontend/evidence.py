"""The evidence of a call chain: what each side of each hop verified, laid side by side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from .models import Certificate, DatabaseUse, Link, PlacedOrder


class Verdict(StrEnum):
    """What comparing the two views of a hop says."""

    AGREE = "agree"
    DIFFER = "differ"
    ONE_SIDED = "one-sided"
    ABSENT = "absent"


def compare(caller: object | None, callee: object | None) -> Verdict:
    """Compare one thing as the caller and the callee saw it; None means that side said nothing."""
    if caller is None and callee is None:
        return Verdict.ABSENT
    if caller is None or callee is None:
        return Verdict.ONE_SIDED
    return Verdict.AGREE if caller == callee else Verdict.DIFFER


@dataclass(frozen=True, slots=True)
class Compared:
    """One certificate (or the session) of a hop as both sides saw it."""

    title: str
    by_caller: Certificate | tuple[str, str] | None
    by_callee: Certificate | tuple[str, str] | None

    @property
    def verdict(self) -> Verdict:
        """Whether both sides saw the same."""
        return compare(self.by_caller, self.by_callee)


@dataclass(frozen=True, slots=True)
class Hop:
    """One mutually authenticated call, ready to be shown."""

    link: Link

    @property
    def certificates(self) -> tuple[Compared, Compared]:
        """The caller's certificate and the callee's: each presented by one side, verified by the other."""
        near, far = self.link.seen_by_caller, self.link.seen_by_callee
        return (
            Compared(self.link.caller, near.own if near else None, far.peer.plain if far else None),
            Compared(self.link.callee, near.peer.plain if near else None, far.own if far else None),
        )

    @property
    def session(self) -> Compared:
        """TLS version and cipher, as both sides negotiated them."""
        near, far = self.link.seen_by_caller, self.link.seen_by_callee
        return Compared("TLS session", near.session if near else None, far.session if far else None)

    @property
    def verdict(self) -> Verdict:
        """`DIFFER` when anything differs, else what is known: both sides, one side, none."""
        verdicts = {compared.verdict for compared in (*self.certificates, self.session)}
        for verdict in (Verdict.DIFFER, Verdict.ONE_SIDED, Verdict.AGREE):
            if verdict in verdicts:
                return verdict
        return Verdict.ABSENT

    @property
    def rule(self) -> str | None:
        """The policy rule by which the callee allowed this call."""
        return self.link.seen_by_callee.rule if self.link.seen_by_callee else None

    @property
    def tls_version(self) -> str | None:
        """The TLS version, from whichever side told it."""
        view = self.link.seen_by_callee or self.link.seen_by_caller
        return view.tls_version if view else None


@dataclass(frozen=True, slots=True)
class Chain:
    """The hops of one order in the order they were made, and the databases they reached."""

    links: tuple[Link, ...]
    databases: tuple[DatabaseUse, ...]

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The links, ready to be shown."""
        return tuple(map(Hop, self.links))

    @property
    def verdict(self) -> Verdict:
        """`AGREE` only when both sides of every hop agree."""
        verdicts = [hop.verdict for hop in self.hops]
        if Verdict.DIFFER in verdicts:
            return Verdict.DIFFER
        if verdicts and all(verdict is Verdict.AGREE for verdict in verdicts):
            return Verdict.AGREE
        return Verdict.ONE_SIDED if verdicts else Verdict.ABSENT

    def database_of(self, service: str) -> DatabaseUse | None:
        """The database that `service` used."""
        return next((use for use in self.databases if use.service == service), None)


def chain_of(placed: PlacedOrder, own: Link | None) -> Chain:
    """The chain that placed an order: what orders stored, completed by our `own` view of the first hop."""
    return Chain(tuple(_merged(placed.links, own)), placed.databases)


def _merged(links: Sequence[Link], own: Link | None) -> Iterable[Link]:
    for link in links:
        if own is not None and (link.caller, link.callee) == (own.caller, own.callee):
            yield link.model_copy(
                update={"seen_by_caller": own.seen_by_caller, "duration_ms": own.duration_ms}
            )
        else:
            yield link


class Placings:
    """Our own view of the calls that placed the latest orders. In memory, bounded, lost on restart."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._links: OrderedDict[UUID, Link] = OrderedDict()

    def keep(self, order_id: UUID, link: Link) -> None:
        """Remember `link` as the call that placed `order_id`; the first one stays."""
        self._links.setdefault(order_id, link)
        while len(self._links) > self._limit:
            self._links.popitem(last=False)

    def of(self, order_id: UUID) -> Link | None:
        """What we saw when `order_id` was placed, if we did that and still know."""
        return self._links.get(order_id)

    def __len__(self) -> int:
        return len(self._links)
