"""What the materialiser tells Prometheus, and whether it keeps up.

    /metrics   lag, rows, bytes, batch sizes, insert time, retries, dead letters, offsets checked and missing
    /ready     200 while every partition is resumed, Kafka answers and what it gives can be read, and no record waits
               longer than materialiser.ready_lag_seconds; else 503 with the reasons
    /health    200 while the process answers

One registry of its own for each Metrics, so that several live in one process. Knows nothing of Kafka or ClickHouse:
others say what happened.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp

from fulgurite.producers.service import metrics_app

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_RECORDS = (1, 10, 100, 1_000, 5_000, 10_000, 50_000, 100_000, 500_000)
_WHERE = ("topic", "partition")


@dataclass(frozen=True, slots=True)
class Lag:
    """Of one partition: records not yet in the tables, and how long the oldest of them has been in the log."""

    records: int
    seconds: float


class Metrics:
    """Described in docs/operations.md; every counter begins at 0 with the process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lag_records = self._gauge("lag_records", "records that may be read and are not yet in the tables", _WHERE)
        self._lag_seconds = self._gauge("lag_seconds", "age of the oldest of them in the log", _WHERE)
        self._records = self._counter("records", "records inserted or found there", _WHERE)
        self._bytes = self._counter("bytes", "their keys and values", _WHERE)
        self._batch_records = self._histogram("batch_records", "records of an insert", _RECORDS)
        self._insert_seconds = self._histogram("insert_seconds", "time an insert took", _SECONDS)
        self._retries = self._counter("retries", "inserts and questions tried again", _WHERE)
        self._rejected = self._counter("rejected_records", "records ClickHouse refused, dead letters now", _WHERE)
        self._undecodable = self._counter(
            "undecodable_records", "records that could not be decoded, dead letters now", _WHERE
        )
        self._unreadable = self._counter("unreadable", "tries to read what could not be read", _WHERE)
        self._dead_letters = self._gauge(
            "dead_letters", "rows of dead_letters by reason and stage", ("reason", "stage")
        )
        self._dead_letter_kinds: set[tuple[str, str]] = set()
        """All that were ever there."""
        self._checked = self._counter("checked_offsets", "offsets of finished ranges looked for in the tables", _WHERE)
        self._missing = self._counter("missing_offsets", "of those, neither a row nor a dead letter", _WHERE)
        self._skipped = self._counter("skipped_offsets", "offsets at which Kafka has no record", _WHERE)
        self._last_insert = self._gauge("last_insert_timestamp_seconds", "when an insert last succeeded", ())
        self._waits_for: dict[str, str] = {}
        self.left()
        self._cannot_read: dict[str, str] = {}
        self._silent: dict[str, str] = {}
        self._lacking: dict[str, str] = {}
        self._lags: dict[str, Lag] = {}

    def _name(self, name: str) -> str:
        return f"fulgurite_materialiser_{name}"

    def _gauge(self, name: str, what: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(self._name(name), what, labels, registry=self.registry)

    def _counter(self, name: str, what: str, labels: tuple[str, ...]) -> Counter:
        return Counter(self._name(name), what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(self._name(name), what, ("topic",), buckets=buckets, registry=self.registry)

    def left(self) -> None:
        """Until `joined` nothing is ours."""
        self._waits_for["group"] = "not a member of the consumer group"

    def joined(self) -> None:
        """The group has said which partitions are ours, perhaps none."""
        self._waits_for.pop("group", None)

    def resuming(self, topic: str, partition: int) -> None:
        """The partition is ours and not yet read from."""
        self._waits_for[f"{topic}-{partition}"] = "resuming"

    def resumed(self, topic: str, partition: int) -> None:
        self._waits_for.pop(f"{topic}-{partition}", None)

    def retried(self, topic: str, partition: int, why: str) -> None:
        """Until the next success the partition is not keeping up."""
        self._retries.labels(topic, partition).inc()
        self._waits_for[f"{topic}-{partition}"] = why

    def rejected(self, topic: str, partition: int, records: int = 1) -> None:
        self._rejected.labels(topic, partition).inc(records)

    def undecodable(self, topic: str, partition: int, records: int) -> None:
        self._undecodable.labels(topic, partition).inc(records)

    def unreadable(self, topic: str, partition: int, why: str) -> None:
        """Until it is readable or gone the partition stands still, whatever of it is inserted meanwhile."""
        self._unreadable.labels(topic, partition).inc()
        self._cannot_read[f"{topic}-{partition}"] = why

    def readable(self, topic: str, partition: int) -> None:
        self._cannot_read.pop(f"{topic}-{partition}", None)

    def silent(self, topic: str, partition: int, why: str) -> None:
        """Until it is heard of or gone."""
        self._silent[f"{topic}-{partition}"] = why

    def heard(self, topic: str, partition: int) -> None:
        self._silent.pop(f"{topic}-{partition}", None)

    def lacking_topics(self, topics: Collection[str]) -> None:
        """These of ours are not in Kafka."""
        self._lacking = dict.fromkeys(sorted(topics), "the topic is not in Kafka, or has no leader")

    def not_fetched(self, why: str) -> None:
        """Of all partitions, until the next success."""
        self._cannot_read["fetch"] = why

    def fetched(self) -> None:
        self._cannot_read.pop("fetch", None)

    def inserted(self, topic: str, parts: Sequence[tuple[str, int, int, int]], seconds: float) -> None:
        """One insert; of each of its partitions topic, number, records and bytes."""
        for name, partition, records, size in parts:
            self._waits_for.pop(f"{name}-{partition}", None)
            self._records.labels(name, partition).inc(records)
            self._bytes.labels(name, partition).inc(size)
        self._batch_records.labels(topic).observe(sum(part[2] for part in parts))
        self._insert_seconds.labels(topic).observe(seconds)
        self._last_insert.set(time.time())

    def lag(self, topic: str, partition: int, lag: Lag) -> None:
        self._lags[f"{topic}-{partition}"] = lag
        self._lag_records.labels(topic, partition).set(lag.records)
        self._lag_seconds.labels(topic, partition).set(lag.seconds)

    def gone(self, topic: str, partition: int) -> None:
        """The partition is another consumer's now: what we last knew of it must not go on being shown."""
        self._waits_for.pop(f"{topic}-{partition}", None)
        self._cannot_read.pop(f"{topic}-{partition}", None)
        self._silent.pop(f"{topic}-{partition}", None)
        if self._lags.pop(f"{topic}-{partition}", None) is not None:
            self._lag_records.remove(topic, partition)
            self._lag_seconds.remove(topic, partition)

    def dead_letters(self, counts: dict[tuple[str, str], int]) -> None:
        """(reason, stage) -> rows. What was there before and is not any more, as it expired, is 0."""
        self._dead_letter_kinds |= counts.keys()
        for labels in self._dead_letter_kinds:
            self._dead_letters.labels(*labels).set(counts.get(labels, 0))

    def reconciled(self, topic: str, partition: int, offsets: int, missing: int) -> None:
        self._checked.labels(topic, partition).inc(offsets)
        self._missing.labels(topic, partition).inc(missing)

    def skipped(self, topic: str, partition: int, offsets: int) -> None:
        self._skipped.labels(topic, partition).inc(offsets)

    def not_ready(self, ready_lag_seconds: float) -> dict[str, str]:
        """Partition -> why it does not keep up. Empty: ready."""
        late = {
            name: f"{lag.records} records wait, the oldest for {lag.seconds:.0f} s"
            for name, lag in self._lags.items()
            if lag.seconds > ready_lag_seconds
        }
        return late | self._lacking | self._silent | self._waits_for | self._cannot_read

    def app(self, ready_lag_seconds: float) -> ASGIApp:
        return metrics_app(self.registry, lambda: self.not_ready(ready_lag_seconds))
