"""Prometheus metrics, read from the state that is there anyway at the moment of the scrape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as PrometheusCollector

from .audit import AuditLog
from .live import LiveConnections
from .source import NoIdentity, Source, SourceState

if TYPE_CHECKING:  # it needs an extra of its own
    from .secrets import RotatingSecret


class Collector(PrometheusCollector):
    """Metrics of one source, one audit log and one secret.

    ``ztmtls_source_state{state}`` (1 for the present one), ``ztmtls_svid_expiry_timestamp_seconds``,
    ``ztmtls_svid_not_before_timestamp_seconds`` (while it may be used),
    ``ztmtls_last_update_timestamp_seconds``, ``ztmtls_source_generation``,
    ``ztmtls_source_failures_total``, ``ztmtls_bundle_authorities{trust_domain}``,
    ``ztmtls_decisions_total{event,decision,reason}`` and ``ztmtls_live_connections{generation}``.

    With a secret: ``ztmtls_secret_state{secret_id,state}`` (1 for the present one),
    ``ztmtls_secret_version{secret_id,version}`` (1 for the one in use),
    ``ztmtls_secret_last_error{secret_id,reason}`` (1 while the last read failed),
    ``ztmtls_secret_reads_total{secret_id,outcome}``, and when they are known
    ``ztmtls_secret_fetched_timestamp_seconds{secret_id}``,
    ``ztmtls_secret_created_timestamp_seconds{secret_id}`` and
    ``ztmtls_secret_next_rotation_timestamp_seconds{secret_id}``.
    """

    def __init__(
        self, source: Source | None, audit: AuditLog | None, secret: RotatingSecret | None = None
    ) -> None:
        self._source = source
        self._audit = audit
        self._secret = secret
        self.live: LiveConnections | None = None

    def collect(self) -> Iterator[Metric]:
        """What Prometheus asks for."""
        if self._source is not None:
            yield from self._identity(self._source)
        if self._audit is not None:
            decisions = CounterMetricFamily(
                "ztmtls_decisions",
                "Decisions by what was decided on, outcome and reason.",
                labels=["event", "decision", "reason"],
            )
            for labels, count in list(self._audit.counts.items()):
                decisions.add_metric(list(labels), count)
            yield decisions
        if self._secret is not None:
            yield from self._credentials(self._secret)
        if self.live is not None:
            connections = GaugeMetricFamily(
                "ztmtls_live_connections",
                "Open connections, by the generation of our identity that they were made under.",
                labels=["generation"],
            )
            for generation, number in sorted(self.live.by_generation().items()):
                connections.add_metric([str(generation)], number)
            yield connections

    def _identity(self, source: Source) -> Iterator[Metric]:
        status = source.status()
        state = GaugeMetricFamily(
            "ztmtls_source_state", "State of the identity source: 1 for the present one.", labels=["state"]
        )
        for each in SourceState:
            state.add_metric([each.value], float(each is status.state))
        yield state
        for name, text, moment in (
            ("ztmtls_svid_expiry_timestamp_seconds", "When our SVID runs out.", status.not_after),
            (
                "ztmtls_last_update_timestamp_seconds",
                "When the Workload API last answered.",
                status.last_update,
            ),
        ):
            if moment is not None:
                yield GaugeMetricFamily(name, text, value=datetime.fromisoformat(moment).timestamp())
        with suppress(NoIdentity):
            yield GaugeMetricFamily(
                "ztmtls_svid_not_before_timestamp_seconds",
                "When the life of our SVID began.",
                value=source.context.svid.leaf.not_valid_before_utc.timestamp(),
            )
        yield GaugeMetricFamily(
            "ztmtls_source_generation", "Changes of identity or trust so far.", value=status.generation
        )
        yield CounterMetricFamily(
            "ztmtls_source_failures", "Failures of the Workload API stream.", value=status.failures
        )
        authorities = GaugeMetricFamily(
            "ztmtls_bundle_authorities",
            "X.509 authorities trusted per trust domain.",
            labels=["trust_domain"],
        )
        for domain, count in status.authorities.items():
            authorities.add_metric([domain], count)
        yield authorities

    def _credentials(self, secret: RotatingSecret) -> Iterator[Metric]:
        from .secrets import SecretState

        status = secret.status()
        state = GaugeMetricFamily(
            "ztmtls_secret_state",
            "State of the secret: 1 for the present one.",
            labels=["secret_id", "state"],
        )
        for each in SecretState:
            state.add_metric([secret.secret_id, each.value], float(each == status["state"]))
        yield state
        for name, text, label, present in (
            ("ztmtls_secret_version", "1 for the version in use.", "version", status["version"]),
            ("ztmtls_secret_last_error", "1 while the last read failed.", "reason", status["last_error"]),
        ):
            told = GaugeMetricFamily(name, text, labels=["secret_id", label])
            if present is not None:
                told.add_metric([secret.secret_id, present], 1)
            yield told
        for name, text, moment in (
            ("ztmtls_secret_fetched", "When the secret was read last.", status["fetched_at"]),
            ("ztmtls_secret_created", "When the version in use was made.", status["created_at"]),
            (
                "ztmtls_secret_next_rotation",
                "When the secret is rotated at the latest.",
                status["next_rotation_at"],
            ),
        ):
            if moment is not None:
                time = GaugeMetricFamily(f"{name}_timestamp_seconds", text, labels=["secret_id"])
                time.add_metric([secret.secret_id], datetime.fromisoformat(moment).timestamp())
                yield time
        reads = CounterMetricFamily(
            "ztmtls_secret_reads", "Reads of the secret by outcome.", labels=["secret_id", "outcome"]
        )
        for outcome, count in list(secret.reads.items()):
            reads.add_metric([secret.secret_id, outcome], count)
        yield reads
