"""What the assembler tells Prometheus: what is open, what waits and for what, what it has done.

    /metrics   read from the state when somebody asks
    /health    200 while the process answers

One registry of its own for each Metrics. Knows nothing of Kafka.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp

from fulgurite.producers.service import metrics_app, serve_asgi
from fulgurite.schemas.settings import AssemblerSettings
from fulgurite.streams.assembler.assembly import Assembly
from fulgurite.streams.assembler.letters import LATE, NOT_ASSEMBLED, UNKNOWN_ROLLOUT

PREFIX: Final = "fulgurite_assembler_"

_COUNTS: Final = {
    "trajectories": "trajectories made",
    "otlp_waited": "rollouts that ended without a reward, and waited for one in OTLP",
    "otlp_overdue": "those of them that waited for as long as they may, and were emitted as they were",
    "misrouted": "records in another partition than their rollout's",
    "invalid": "records and lines that are no events",
    "spilled": "records whose value was let go of, to be read again",
    "superseded": "records of attempts that were not the last",
}
"""Of the state's counts: name of the metric, and what it says."""


class Metrics(Collector):
    """Described in docs/operations.md; every counter begins at 0 with the process."""

    def __init__(self, state: Assembly) -> None:
        self.registry = CollectorRegistry()
        self._state = state
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        state = self._state
        yield _gauge("open_rollouts", "rollouts that are known and have no trajectory", len(state.open))
        yield _gauge("pending_rollouts", "ended rollouts that have no trajectory", state.pending)
        yield _gauge("otlp_in_use", "1 where there is a translator, whose rewards are waited for", state.waits.in_use)
        yield _gauge("otlp_waiting_rollouts", "ended rollouts that wait for the translator", len(state.waits))
        yield from self._counters()

    def app(self) -> ASGIApp:
        return metrics_app(self.registry)

    async def serve(self, settings: AssemblerSettings) -> None:
        """Until it is cancelled, where there is a port. A taken one raises StartError."""
        for_ever = asyncio.Event()
        if settings.metrics_port:
            await serve_asgi(self.app(), settings.metrics_host, settings.metrics_port, for_ever, "assembler metrics")
        else:
            await for_ever.wait()

    def _counters(self) -> Iterator[Metric]:
        counts = self._state.counts
        for name, what in _COUNTS.items():
            yield CounterMetricFamily(PREFIX + name, what, value=counts[name])
        letters = CounterMetricFamily(f"{PREFIX}dead_letters", "dead letters, by reason", labels=("reason",))
        for reason in (LATE, UNKNOWN_ROLLOUT, NOT_ASSEMBLED):
            letters.add_metric((reason,), counts[reason])
        yield letters


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, what, value=value)
