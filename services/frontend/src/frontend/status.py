"""What the services report about themselves, and the picture of the whole chain made from it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from pydantic import AwareDatetime

from .evidence import Hop, Verdict
from .models import Certificate, DatabaseUse, Link, Model, View


class Health(StrEnum):
    """How a part of the chain is, as far as we know."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"
    UNKNOWN = "unknown"


class IdentityReport(Model):
    """A `ztmtls.source.SourceStatus` as JSON."""

    state: str
    reason: str = ""
    id: str | None = None
    serial: str | None = None
    not_after: AwareDatetime | None = None
    generation: int = 0
    last_update: AwareDatetime | None = None
    failures: int = 0

    @property
    def certificate(self) -> Certificate | None:
        """The certificate in use, if there is one."""
        if self.id and self.serial and self.not_after:
            return Certificate(id=self.id, serial=self.serial, not_after=self.not_after)
        return None

    @property
    def health(self) -> Health:
        """Serving is well; degraded still works, on what was received last."""
        return {"serving": Health.OK, "degraded": Health.WARN}.get(self.state, Health.BAD)


class CredentialsReport(Model):
    """How a service stands with its database secret (`RotatingSecret.status`)."""

    state: str
    secret_id: str | None = None
    version: str | None = None
    age_seconds: float | None = None
    last_error: str | None = None
    role_arn: str | None = None
    created_at: AwareDatetime | None = None
    rotation_enabled: bool | None = None
    next_rotation_at: AwareDatetime | None = None

    @property
    def health(self) -> Health:
        """Degraded still works, with the version that was fetched last."""
        return {"serving": Health.OK, "degraded": Health.WARN}.get(self.state, Health.BAD)


class Denial(Model):
    """Something that a service refused, as its audit log has it."""

    time: AwareDatetime
    event: str
    reason: str
    peer_id: str | None = None
    method: str | None = None
    path: str | None = None


class Decisions(Model):
    """What a service has decided since it was started (`AuditLog.report`), the latest denial last."""

    allowed: int
    denied: int
    latest: tuple[Denial, ...]


class ServiceReport(Model):
    """What one service says of itself, and passes on from those behind it."""

    service: str
    identity: IdentityReport | None = None
    credentials: CredentialsReport | None = None
    database: DatabaseUse | None = None
    decisions: Decisions | None = None
    seen_by_callee: View | None = None
    reason: str | None = None
    downstream: tuple[ServiceReport, ...] = ()
    links: tuple[Link, ...] = ()

    @property
    def health(self) -> Health:
        """The health of its identity; unknown when it told us nothing."""
        return self.identity.health if self.identity else Health.UNKNOWN

    @property
    def database_health(self) -> Health:
        """Its credentials, and whether the database answers to them."""
        if self.credentials is None:
            return Health.UNKNOWN
        return self.credentials.health if self.database else Health.BAD


ServiceReport.model_rebuild()


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a hop does not work now."""

    reason: str
    title: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LiveHop:
    """A hop of the chain at this moment: the two views of the call just made, or why there is none."""

    caller: str
    callee: str
    hop: Hop | None = None
    fault: Fault | None = None

    @property
    def health(self) -> Health:
        """Well when the call went through and the views don't differ."""
        if self.fault:
            return Health.BAD
        if self.hop is None or self.hop.verdict is Verdict.ABSENT:
            return Health.UNKNOWN
        return Health.BAD if self.hop.verdict is Verdict.DIFFER else Health.OK


@dataclass(frozen=True, slots=True)
class Overview:
    """The chain at one moment."""

    at: datetime
    frontend: ServiceReport
    orders: ServiceReport
    payments: ServiceReport
    to_orders: LiveHop
    to_payments: LiveHop

    @property
    def services(self) -> tuple[ServiceReport, ...]:
        """All three, in the order of the chain."""
        return self.frontend, self.orders, self.payments

    @property
    def databases(self) -> Health:
        """Both databases: the worse of the two."""
        healths = {self.orders.database_health, self.payments.database_health}
        order = (Health.BAD, Health.UNKNOWN, Health.WARN, Health.OK)
        return next(health for health in order if health in healths)

    @property
    def fault(self) -> tuple[LiveHop, Fault] | None:
        """The first hop that does not work, and why."""
        hops = (self.to_orders, self.to_payments)
        return next(((hop, hop.fault) for hop in hops if hop.fault), None)


def overview(
    at: datetime,
    own: IdentityReport,
    answer: tuple[ServiceReport, Link] | Fault,
    decisions: Decisions | None = None,
) -> Overview:
    """Make the picture from our own state and what orders answered, or why it did not."""
    frontend = ServiceReport(service="frontend", identity=own, decisions=decisions)
    payments = ServiceReport(service="payments")
    if isinstance(answer, Fault):
        return Overview(
            at,
            frontend,
            ServiceReport(service="orders"),
            payments,
            LiveHop("frontend", "orders", fault=answer),
            LiveHop("orders", "payments"),
        )
    orders, link = answer
    payments = next((r for r in orders.downstream if r.service == "payments"), payments)
    second = next((hop for hop in orders.links if hop.callee == "payments"), None)
    fault = Fault(payments.reason) if payments.reason and payments.identity is None else None
    return Overview(
        at,
        frontend,
        orders,
        payments,
        LiveHop("frontend", "orders", Hop(link)),
        LiveHop("orders", "payments", Hop(second) if second and not fault else None, fault),
    )
