"""The state machine of rollouts and attempts: a fold over the topic `rollouts`, and nothing else.

    queuing ──attempt_started──► preparing ──attempt_finished──► (owes a successor) ──finished──► succeeded
       ▲                                                              │                          failed
       └───────────────── requeuing ◄────────requeued─────────────────┘                          cancelled
    any state but the last ──cancelled──► (owes `finished`)

Promises: `apply` is deterministic and idempotent; events of different rollouts may come in any order, those of one
rollout come in the order of its partition. An event that does not fit where the log puts it is void and changes
nothing: this is what makes the log the judge. Of two coordinators that start the same rollout, the second one's
`attempt_started` is void, for both: both read the same log. A rollout ends once and never has two live attempts.

What an interrupted writer left half done (an `attempt_finished` without `finished` or `requeued`, a `cancelled` without
`finished`) is in `owed`; commands.py knows the events that complete it.

Does not know: clocks, leases (leases.py), HTTP, Kafka. "running" is not in the log but heard from workers: views.py.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from fulgurite.consumers.coordinator.work_queue import WorkQueue
from fulgurite.schemas.rollouts import (
    AttemptEnd,
    AttemptFinished,
    AttemptHeartbeat,
    AttemptStarted,
    Mode,
    RolloutCancelled,
    RolloutConfig,
    RolloutEvent,
    RolloutFinished,
    RolloutQueued,
    RolloutRequeued,
    RolloutStatus,
)

Outcome = Literal["applied", "void", "unknown"]
"""unknown: about a rollout nobody queued, or one already forgotten."""

FINAL: frozenset[RolloutStatus] = frozenset({"succeeded", "failed", "cancelled"})

_MAX_SHARED_CONFIGS = 1_024
"""Equal configs are kept once. Runs use a handful; callers who make every config different must not fill the memory."""


@dataclass(slots=True)
class AttemptRecord:
    attempt_id: str
    sequence_id: int
    worker_id: str
    started_ns: int
    end: AttemptEnd | None = None
    ended_ns: int = 0
    error: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class RolloutRecord:
    rollout_id: str
    run_id: str
    task_id: str
    group_id: str
    group_size: int
    mode: Mode
    agent: str
    input: Any
    config: RolloutConfig
    metadata: dict[str, str]
    resources_id: str | None
    queued_ns: int
    status: RolloutStatus = "queuing"
    attempts: list[AttemptRecord] = field(default_factory=list)
    cancel_reason: str | None = None
    """Why it shall end; None unless somebody asked for it."""
    ended_ns: int = 0
    error: str = ""

    @property
    def latest(self) -> AttemptRecord | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def open_attempt(self) -> AttemptRecord | None:
        """The attempt somebody may be working on."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].end is None else None

    @property
    def is_queued(self) -> bool:
        return self.status in ("queuing", "requeuing") and self.cancel_reason is None

    @property
    def owes_successor(self) -> bool:
        """The log holds a beginning (an attempt's end, a wish to cancel) whose consequence is not in it yet."""
        if self.status in FINAL:
            return False
        return self.cancel_reason is not None or (
            self.status == "preparing" and bool(self.attempts) and self.attempts[-1].end is not None
        )

    def attempt(self, attempt_id: str) -> AttemptRecord | None:
        return next((attempt for attempt in self.attempts if attempt.attempt_id == attempt_id), None)


class State:
    """All rollouts as the log tells them. At most `max_ended` ended ones are remembered, the newest."""

    def __init__(self, max_ended: int) -> None:
        self.rollouts: dict[str, RolloutRecord] = {}
        self.open_attempts: dict[str, str] = {}
        """attempt_id -> rollout_id"""
        self.owed: dict[str, None] = {}
        """Rollouts whose log lacks its last word, in the order they came up."""
        self.queue = WorkQueue()
        self.counts: Counter[RolloutStatus] = Counter()
        self._max_ended = max_ended
        self._ended: list[tuple[int, str]] = []
        self._configs: dict[str, RolloutConfig] = {}

    def apply(self, event: RolloutEvent) -> Outcome:
        """Folds one event in. `void` and `unknown` changed nothing."""
        if isinstance(event, RolloutQueued):
            return self._queued(event)
        record = self.rollouts.get(event.rollout_id)
        if record is None:
            return "unknown"
        if record.status in FINAL:
            return "void"
        match event:
            case AttemptStarted():
                applied = self._attempt_started(record, event)
            case AttemptFinished():
                applied = self._attempt_finished(record, event)
            case RolloutRequeued():
                applied = self._requeued(record, event)
            case RolloutCancelled():
                applied = self._cancelled(record, event)
            case RolloutFinished():
                applied = self._finished(record, event)
            case AttemptHeartbeat():
                attempt = record.open_attempt
                return "applied" if attempt is not None and attempt.attempt_id == event.attempt_id else "void"
        if record.owes_successor:
            self.owed[record.rollout_id] = None
        else:
            self.owed.pop(record.rollout_id, None)
        return "applied" if applied else "void"

    def _queued(self, event: RolloutQueued) -> Outcome:
        if event.rollout_id in self.rollouts:
            return "void"
        resources_id = (event.model_extra or {}).get("resources_id")
        record = RolloutRecord(
            rollout_id=event.rollout_id,
            run_id=event.run_id,
            task_id=event.task_id,
            group_id=event.group_id,
            group_size=event.group_size,
            mode=event.mode,
            agent=event.agent,
            input=event.input,
            config=self._shared(event.config),
            metadata=event.metadata,
            resources_id=resources_id if isinstance(resources_id, str) else None,
            queued_ns=event.time_ns,
        )
        self.rollouts[event.rollout_id] = record
        self.counts[record.status] += 1
        self.queue.push(record.rollout_id, record.queued_ns, retry=False)
        return "applied"

    def _attempt_started(self, record: RolloutRecord, event: AttemptStarted) -> bool:
        if not record.is_queued or event.sequence_id != len(record.attempts) + 1:
            return False
        record.attempts.append(AttemptRecord(event.attempt_id, event.sequence_id, event.worker_id, event.time_ns))
        self.open_attempts[event.attempt_id] = record.rollout_id
        self.queue.discard(record.rollout_id)
        self._set_status(record, "preparing")
        return True

    def _attempt_finished(self, record: RolloutRecord, event: AttemptFinished) -> bool:
        attempt = record.open_attempt
        if attempt is None or attempt.attempt_id != event.attempt_id:
            return False
        metadata = (event.model_extra or {}).get("metadata")
        if isinstance(metadata, dict):
            attempt.metadata = {str(name): str(value) for name, value in metadata.items()}
        self._close(attempt, event.status, event.time_ns, event.error)
        return True

    def _requeued(self, record: RolloutRecord, event: RolloutRequeued) -> bool:
        latest = record.latest
        if latest is None or latest.attempt_id != event.attempt_id:
            return False
        if not record.owes_successor or record.cancel_reason is not None:
            return False
        self._set_status(record, "requeuing")
        self.queue.push(record.rollout_id, record.queued_ns, retry=True)
        return True

    def _cancelled(self, record: RolloutRecord, event: RolloutCancelled) -> bool:
        if record.cancel_reason is not None:
            return False
        record.cancel_reason = event.reason
        self.queue.discard(record.rollout_id)
        return True

    def _finished(self, record: RolloutRecord, event: RolloutFinished) -> bool:
        if (attempt := record.open_attempt) is not None:
            self._close(attempt, event.attempt_status or "cancelled", event.time_ns, event.error)
        self.queue.discard(record.rollout_id)
        self._set_status(record, event.status)
        record.ended_ns = event.time_ns
        record.error = event.error
        record.input = None  # the task is done; readers who want it have it in the log and in ClickHouse
        heapq.heappush(self._ended, (event.time_ns, record.rollout_id))
        while len(self._ended) > self._max_ended:
            _, forgotten = heapq.heappop(self._ended)
            self.counts[self.rollouts.pop(forgotten).status] -= 1
        return True

    def _close(self, attempt: AttemptRecord, end: AttemptEnd, ended_ns: int, error: str) -> None:
        attempt.end, attempt.ended_ns, attempt.error = end, ended_ns, error
        self.open_attempts.pop(attempt.attempt_id, None)

    def _set_status(self, record: RolloutRecord, status: RolloutStatus) -> None:
        self.counts[record.status] -= 1
        self.counts[status] += 1
        record.status = status

    def _shared(self, config: RolloutConfig) -> RolloutConfig:
        if len(self._configs) >= _MAX_SHARED_CONFIGS:
            self._configs.clear()
        return self._configs.setdefault(config.model_dump_json(), config)
