"""What the trainer tells Prometheus: the figures of its last step, what it has done, how long it has waited.

    /metrics   every metric of the last step's record, progress, counters
    /health    200 while the process answers

A figure of a step is called as in its record, behind `fulgurite_trainer_` and with `_` for whatever Prometheus has not
in its names: `actor/pg_loss` is `fulgurite_trainer_actor_pg_loss`. What the last step has no figure for is not there.

Everything is put together when somebody asks: a step costs the setting of a few attributes. One registry of its own for
each Metrics. Knows nothing of windows, learners or Kafka: others say what happened.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp

from fulgurite.producers.service import metrics_app, serve_asgi
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.training import DroppedRollout, TrainingStep, scalars

PREFIX: Final = "fulgurite_trainer_"
_LABELS: Final = ("run_id", "resource")
_OTHERS: Final = re.compile(r"[^a-zA-Z0-9_]")


def legal_name(name: str) -> str:
    """The name of a step's figure, as Prometheus takes it.

    >>> legal_name("actor/pg_loss")
    'fulgurite_trainer_actor_pg_loss'
    """
    return PREFIX + _OTHERS.sub("_", name)


class Metrics(Collector):
    """Described in docs/operations.md; every counter begins at 0 with the process."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.registry = CollectorRegistry()
        self._of_run = (settings.run_id, settings.resource)
        self._planned_steps = settings.steps
        self._version: int | None = None
        self._step = 0
        self._last: TrainingStep | None = None
        self._steps_made = 0
        self._trained = 0
        self._dropped: Counter[str] = Counter()
        self._waited_seconds = 0.0
        self._waits_since: float | None = None
        self.registry.register(self)

    def stands(self, step: int, version: int, planned_steps: int) -> None:
        """The run is known: how far it is, when this process begins with it."""
        self._step, self._version, self._planned_steps = step, version, planned_steps

    def waits(self) -> None:
        """For a window."""
        self._waits_since = time.monotonic()

    def filled(self) -> None:
        """It has one, or there will be none. Said again: nothing."""
        self._waited_seconds = self._waited()
        self._waits_since = None

    def stepped(self, event: TrainingStep) -> None:
        """A step is committed."""
        self._step, self._version, self._last = event.step, event.version_out, event
        self._steps_made += 1
        self._trained += len(event.rollout_ids)
        self.dropped(event.dropped)

    def dropped(self, rollouts: Iterable[DroppedRollout]) -> None:
        """Figures in a reason are left out, else there would be a series for each."""
        self._dropped.update(rollout.reason.partition(":")[0] for rollout in rollouts)

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is differs from step to step."""
        return ()

    def collect(self) -> Iterator[Metric]:
        found = dict(self._figures())
        # Ours win over a figure of a step that would be called the same: two of one name break the whole answer.
        found |= {metric.name: metric for metric in (*self._progress(), *self._counters())}
        yield from found.values()

    def app(self) -> ASGIApp:
        return metrics_app(self.registry)

    async def serve(self, settings: TrainerSettings, over: asyncio.Event) -> None:
        """Until `over`, where there is a port. A taken one raises StartError."""
        if settings.metrics_port:
            await serve_asgi(self.app(), settings.metrics_host, settings.metrics_port, over, "trainer metrics")
        else:
            await over.wait()

    def _figures(self) -> Iterator[tuple[str, Metric]]:
        if self._last is None:
            return
        for name, value in scalars(self._last).items():
            yield legal_name(name), self._gauge(legal_name(name), f"{name} of the last step", value)

    def _progress(self) -> Iterator[Metric]:
        yield self._gauge(f"{PREFIX}step", "steps done in the life of the run", self._step)
        yield self._gauge(f"{PREFIX}planned_steps", "trainer.steps", self._planned_steps)
        if self._version is not None:
            yield self._gauge(f"{PREFIX}version", "newest version of the run", self._version)
        if self._last is not None:
            at = self._last.time_ns / 1e9
            yield self._gauge(f"{PREFIX}last_step_timestamp_seconds", "when a step was last made", at)

    def _counters(self) -> Iterator[Metric]:
        yield self._counter("steps", "steps made by this process", self._steps_made)
        yield self._counter(
            "trained_rollouts", "rollouts that steps of this process named as trained on", self._trained
        )
        yield self._counter("waited_seconds", "time waited for data, by now", self._waited())
        dropped = CounterMetricFamily(
            f"{PREFIX}dropped_rollouts", "rollouts named as dropped, by reason", labels=(*_LABELS, "reason")
        )
        for reason, count in sorted(self._dropped.items()):
            dropped.add_metric((*self._of_run, reason), count)
        yield dropped

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, what, labels=_LABELS)
        family.add_metric(self._of_run, value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, what, labels=_LABELS)
        family.add_metric(self._of_run, value)
        return family

    def _waited(self) -> float:
        since = self._waits_since
        return self._waited_seconds + (time.monotonic() - since if since is not None else 0.0)
