"""The only place with topic names: what each topic holds, its key, its partitions, how long it is kept.

`rollouts`, `spans` and `rewards` are co-partitioned: same key (rollout_id), same partitioner (Kafka's murmur2), same
number of partitions, so that everything about a rollout lies in the partition of the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic. `name` is without the prefix; `settings.kafka.topic(T)` gives the name on the broker."""

    name: str
    key: str
    holds: str
    cleanup: Literal["delete", "compact", "compact,delete"]
    retention_ms: int
    """How long records are kept where `cleanup` deletes; -1 is for ever."""
    partitions: int | None = None
    """None: as many as the setting kafka.partitions says (the co-partitioned topics and trajectories)."""
    prefixed: bool = True
    """False for the one topic whose name another product chose."""
    log_append_time: bool = False
    """True where readers seek by time and need the broker's clock instead of producers' clocks."""


ROLLOUTS = Topic("rollouts", "rollout_id", "lifecycle events of rollouts and attempts", "delete", 30 * DAY_MS)
SPANS = Topic("spans", "rollout_id", "spans, flat JSON: one a line, one line or several a record", "delete", 7 * DAY_MS)
REWARDS = Topic("rewards", "rollout_id", "rewards: one a line, one line or several a record", "delete", 90 * DAY_MS)
TRAJECTORIES = Topic(
    "trajectories",
    "group_id",
    "one ended rollout each, ready to train on",
    "delete",
    7 * DAY_MS,
    log_append_time=True,
)
ATTEMPTS = Topic(
    "attempts",
    "group_id",
    "trajectories with their spans, on their way to the aggregator (where assembler.output says so)",
    "delete",
    7 * DAY_MS,
    log_append_time=True,
)
RESOURCES = Topic("resources", "resource", "versions of policies and other resources", "compact", -1, partitions=1)
TRAINING = Topic(
    "training", "run_id", "runs, steps and versions applied by servers", "delete", 90 * DAY_MS, partitions=1
)
WORKERS = Topic("workers", "worker_id", "heartbeats of runners", "compact,delete", 7 * DAY_MS, partitions=1)
ALGORITHM_STATE = Topic(
    "algorithm_state", "algorithm/name", "what algorithms remember: open groups, searches", "compact", -1, partitions=1
)
DEAD_LETTERS = Topic(
    "dead_letters", "as the original", "original bytes of what could not be used", "delete", 90 * DAY_MS, partitions=1
)
OTLP_SPANS = Topic(
    "otlp_spans", "any", "OTLP protobuf as the Collector writes it", "delete", 7 * DAY_MS, prefixed=False
)

TOPICS: tuple[Topic, ...] = (
    ROLLOUTS,
    SPANS,
    REWARDS,
    ATTEMPTS,
    TRAJECTORIES,
    RESOURCES,
    TRAINING,
    WORKERS,
    ALGORITHM_STATE,
    DEAD_LETTERS,
    OTLP_SPANS,
)
CO_PARTITIONED: tuple[Topic, ...] = (ROLLOUTS, SPANS, REWARDS)

TRANSLATOR_GROUP: Final = "translator"
"""Consumer group of the translator, after the topic prefix. What it has committed of `otlp_spans` has been published to
`rewards`: the assembler waits for that."""
