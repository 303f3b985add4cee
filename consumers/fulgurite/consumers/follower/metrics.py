"""What the follower tells Prometheus, and whether all servers have what they ought to.

    /metrics   wanted and served version of each server, how far behind it is, phases of updates, refusals, troubles
    /ready     200 while every server serves the wanted version; else 503 with the reasons
    /health    200 while the process answers

One registry of its own for each Metrics. Knows nothing of Kafka or of servers' routes: others say what happened.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp

from fulgurite.consumers.follower.versions import Versions
from fulgurite.producers.service import metrics_app
from fulgurite.schemas.resources import ResourceVersion

_PHASE_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0)


class Metrics:
    """Described in docs/operations.md; every counter begins at 0 with the process."""

    def __init__(self, versions: Versions) -> None:
        self.registry = CollectorRegistry()
        self._versions = versions
        newest = self._gauge("newest_version", "newest version on the log", ())
        newest.set_function(lambda: versions.newest.version if versions.newest else -1)
        self._served = self._gauge("served_version", "version a server has; -1: none that is known", ("server",))
        self._behind = self._gauge(
            "behind_seconds",
            "time since the newest version was published, while a server does not have it",
            ("server",),
        )
        self._held = self._gauge(
            "held", "1 while a server is kept paused because its weights are not known to be whole", ("server",)
        )
        self._acts = self._gauge("acts", "1 while this follower acts, and no other of its group", ())
        self._applied = self._counter("applied", "versions loaded")
        self._refused = self._counter("refused", "versions refused: a server keeps what it has")
        self._troubles = self._counter("troubles", "failed tries at something that may pass")
        self._phases = Histogram(
            "fulgurite_follower_phase_seconds", "phases of updates", ("phase",), buckets=_PHASE_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._current: dict[str, ResourceVersion | None] = {}
        self._without: set[str] = set()

    def _gauge(self, name: str, what: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"fulgurite_follower_{name}", what, labels, registry=self.registry)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"fulgurite_follower_{name}", what, ("server",), registry=self.registry)

    def follows(self, server: str) -> None:
        """All of a server's series are there from the start, and say that nothing is known."""
        self._current[server] = None
        self._served.labels(server).set(-1)
        self._behind.labels(server).set_function(lambda: self.behind_seconds(server))
        self._held.labels(server)
        for counter in (self._applied, self._refused, self._troubles):
            counter.labels(server)

    def leaves(self, server: str) -> None:
        """It is another follower's: what it has is not known here any more."""
        self._current.pop(server, None)
        self._without.discard(server)
        for gauge in (self._served, self._behind, self._held):
            gauge.remove(server)

    def acts(self, now: bool) -> None:
        self._acts.set(now)

    def observed(self, server: str, version: int | None, current: ResourceVersion | None) -> None:
        """The server has `version`; `current` is the record it was loaded from, where that is known."""
        self._served.labels(server).set(-1 if version is None else version)
        self._current[server] = current

    def holds(self, server: str, *, nothing: bool) -> None:
        """Whether the server is kept paused, with nothing that could be served."""
        self._held.labels(server).set(nothing)
        (self._without.add if nothing else self._without.discard)(server)

    def applied(self, server: str, seconds: dict[str, float]) -> None:
        self._applied.labels(server).inc()
        for phase, duration in seconds.items():
            self._phases.labels(phase).observe(duration)

    def refused(self, server: str) -> None:
        self._refused.labels(server).inc()

    def trouble(self, server: str) -> None:
        """It may be away: what it has is not known until it is asked again."""
        self._troubles.labels(server).inc()
        self._current[server] = None

    def behind_seconds(self, server: str) -> float:
        newest = self._versions.newest
        current = self._current.get(server)
        if newest is None or (current is not None and current.version >= newest.version):
            return 0.0
        return max(0.0, time.time() - newest.time_ns / 1e9)

    def not_ready(self) -> dict[str, str]:
        """Server -> what it lacks. Empty: ready."""
        held = dict.fromkeys(sorted(self._without), "is kept paused: its weights are not known to be whole")
        newest = self._versions.newest
        if newest is None:
            return held
        return {
            server: f"does not serve version {newest.version}"
            for server, current in self._current.items()
            if current is None or current.version < newest.version
        } | held

    def app(self) -> ASGIApp:
        return metrics_app(self.registry, self.not_ready)
