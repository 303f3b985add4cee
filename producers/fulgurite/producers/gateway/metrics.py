"""What the gateway's pool, keys and budgets tell Prometheus. Every counter begins at 0 with the process.

Labels are backends' URLs and keys' names, as the settings have them: bounded, and nothing an agent can make up.

One registry of its own for each Metrics, so that several live in one process. Knows nothing of backends: others say
what happened.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp

from fulgurite.producers.connections import Watch
from fulgurite.producers.gateway.breaker import BreakerState
from fulgurite.producers.service import metrics_app

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BREAKER: dict[BreakerState, int] = {"closed": 0, "half-open": 1, "open": 2}


@dataclass(frozen=True, slots=True)
class BackendMetrics:
    """Of one backend, its labels already filled in: they are looked up once, not a request."""

    in_flight: Gauge
    well: Gauge
    breaker: Gauge
    first_byte_seconds: Histogram
    answers: dict[int, Counter]
    """By the hundreds of the status."""
    failures: Counter
    """Tries that gave no answer."""

    def answered(self, status: int, seconds: float) -> None:
        self.answers[min(max(status // 100, 1), 5)].inc()
        self.first_byte_seconds.observe(seconds)

    def stands(self, *, well: bool, breaker: BreakerState) -> None:
        self.well.set(well)
        self.breaker.set(_BREAKER[breaker])


class ConnectionMetrics(Watch):
    """Of agents. A refusal counts as a request that was refused."""

    def __init__(self, registry: CollectorRegistry, refused: Counter) -> None:
        self._open = Gauge("fulgurite_gateway_connections", "connections of agents, idle ones too", registry=registry)
        self._displaced = Counter(
            "fulgurite_gateway_displaced_connections", "idle ones that went for new ones", registry=registry
        )
        self._refused = refused

    def open(self, count: int) -> None:
        self._open.set(count)

    def displaced(self) -> None:
        self._displaced.inc()

    def refused(self) -> None:
        self._refused.inc()


class Metrics:
    """Described in docs/operations.md."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        backend = ("backend",)
        self._in_flight = self._gauge("in_flight_requests", "requests that a backend is at", backend)
        self._well = self._gauge("backend_well", "1 while a backend's health checks succeed", backend)
        self._breaker = self._gauge("breaker_state", "0 closed, 1 half-open, 2 open", backend)
        self._first_byte = Histogram(
            self._name("first_byte_seconds"),
            "from a try to the first byte of its answer",
            backend,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._answers = self._counter("answers", "answers of backends by status (2xx, …)", ("backend", "status"))
        self._failures = self._counter("failed_tries", "tries that were made again, or given up", backend)
        self._refused = self._counter("refused_requests", "requests that got an error of our own", ("code",))
        self.connections = ConnectionMetrics(self.registry, self._refused.labels("too_many_connections"))
        self._prompts = self._counter(
            "prompts", "answered calls of rollouts, by what their prompts do with the turn before", ("turn",)
        )
        self._key_requests = self._counter("key_requests", "requests by name of the API key", ("key",))
        self._by_key: dict[str, Counter] = {}  # finding a metric's child costs more than counting
        self.unrecorded = Counter(
            self._name("unrecorded_answers"), "calls answered although Kafka did not take them", registry=self.registry
        )
        self.waiting = Gauge(self._name("waiting_requests"), "requests that wait for a backend", registry=self.registry)
        self.queue_seconds = Histogram(
            self._name("queue_seconds"),
            "from a request to its first try",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.spent_tokens = Counter(
            self._name("spent_tokens"), "tokens of prompts and answers, counted for budgets", registry=self.registry
        )

    def backend(self, url: str) -> BackendMetrics:
        return BackendMetrics(
            in_flight=self._in_flight.labels(url),
            well=self._well.labels(url),
            breaker=self._breaker.labels(url),
            first_byte_seconds=self._first_byte.labels(url),
            answers={hundred: self._answers.labels(url, f"{hundred}xx") for hundred in range(1, 6)},
            failures=self._failures.labels(url),
        )

    def refused(self, code: str) -> None:
        """`code` of an ApiError of ours, never a backend's."""
        self._refused.labels(code).inc()

    def prompt(self, turn: str) -> None:
        """Of an answer of the policy in a rollout. begins: there is none; continues: exactly its tokens; by_text: there
        is one, and no prompt of tokens was asked with; unknown_turn: there is one, not remembered or come back
        otherwise; else why the template's own prompt was used."""
        self._prompts.labels(turn).inc()

    def asked_with(self, key: str) -> None:
        """A key's name, of those in the settings; empty where there are no keys."""
        counter = self._by_key.get(key)
        if counter is None:
            counter = self._by_key[key] = self._key_requests.labels(key)
        counter.inc()

    def app(self) -> ASGIApp:
        return metrics_app(self.registry)

    def _name(self, name: str) -> str:
        return f"fulgurite_gateway_{name}"

    def _gauge(self, name: str, what: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(self._name(name), what, labels, registry=self.registry)

    def _counter(self, name: str, what: str, labels: tuple[str, ...]) -> Counter:
        return Counter(self._name(name), what, labels, registry=self.registry)
