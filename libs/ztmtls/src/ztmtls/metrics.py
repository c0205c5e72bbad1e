"""Prometheus metrics, read from the state that is there anyway at the moment of the scrape."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as PrometheusCollector

from .audit import AuditLog
from .live import LiveConnections
from .source import Source, SourceState


class Collector(PrometheusCollector):
    """Metrics of one source and one audit log.

    ``ztmtls_source_state{state}`` (1 for the present one), ``ztmtls_svid_expiry_timestamp_seconds``,
    ``ztmtls_last_update_timestamp_seconds``, ``ztmtls_source_generation``,
    ``ztmtls_source_failures_total``, ``ztmtls_bundle_authorities{trust_domain}``,
    ``ztmtls_decisions_total{event,decision,reason}`` and ``ztmtls_live_connections{generation}``.
    """

    def __init__(self, source: Source | None, audit: AuditLog | None) -> None:
        self._source = source
        self._audit = audit
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
