"""What this process has heard from workers: the leases of open attempts, and the workers themselves.

A lease begins when an attempt starts, or when a restarted coordinator finds it open (heartbeats over HTTP are not in
the log, so each gets one whole lease again), and is renewed by every sign of life. Not part of the log's truth.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fulgurite.consumers.coordinator.state import State
from fulgurite.schemas.rollouts import AttemptFinished, AttemptHeartbeat, AttemptStarted, RolloutEvent, RolloutFinished
from fulgurite.schemas.workers import WorkerHeartbeat

MAX_WORKERS = 10_000
"""Workers remembered; beyond it the one that was silent longest is forgotten."""

Expiry = Literal["timeout", "unresponsive"]


class Leases:
    def __init__(self) -> None:
        self._heard: dict[str, float] = {}
        self._beating: dict[str, float] = {}

    def grant(self, attempt_id: str, now: float) -> None:
        self._heard[attempt_id] = now

    def renew(self, attempt_id: str, now: float) -> None:
        self._heard[attempt_id] = now
        self._beating[attempt_id] = time.time()

    def follow(self, event: RolloutEvent, state: State, now: float) -> None:
        """After `event` was folded in: leases begin and end with attempts."""
        match event:
            case AttemptStarted() if event.attempt_id in state.open_attempts:
                self._heard.setdefault(event.attempt_id, now)
            case AttemptHeartbeat() if event.attempt_id in state.open_attempts:
                self.renew(event.attempt_id, now)
            case AttemptFinished() if event.attempt_id not in state.open_attempts:
                self.drop(event.attempt_id)
            case RolloutFinished():
                record = state.rollouts.get(event.rollout_id)
                if record is not None and (latest := record.latest) is not None and latest.end is not None:
                    self.drop(latest.attempt_id)
            case _:
                pass

    def drop(self, attempt_id: str) -> None:
        self._heard.pop(attempt_id, None)
        self._beating.pop(attempt_id, None)

    def last_heartbeat(self, attempt_id: str) -> float | None:
        """Seconds since the epoch; None when it was never heard of: it is still `preparing`."""
        return self._beating.get(attempt_id)

    def __len__(self) -> int:
        return len(self._heard)

    @property
    def beating(self) -> int:
        """Open attempts that gave a sign of life."""
        return len(self._beating)

    def forgive(self, seconds: float) -> None:
        """Makes every lease longer: this process was stopped, and nobody could reach it meanwhile."""
        for attempt_id in self._heard:
            self._heard[attempt_id] += seconds

    def expired(self, state: State, now: float, now_ns: int) -> Iterator[tuple[str, str, Expiry]]:
        """(rollout_id, attempt_id, how it ended) of attempts that took too long or whose worker is silent."""
        for attempt_id, rollout_id in state.open_attempts.items():
            record = state.rollouts[rollout_id]
            attempt = record.attempts[-1]
            if now_ns - attempt.started_ns > record.config.timeout_seconds * 1e9:
                yield rollout_id, attempt_id, "timeout"
            elif now - self._heard.setdefault(attempt_id, now) > record.config.unresponsive_seconds:
                yield rollout_id, attempt_id, "unresponsive"


@dataclass(slots=True)
class WorkerRecord:
    worker_id: str
    status: Literal["idle", "busy", "stopped", "unknown"] = "unknown"
    running: list[str] = field(default_factory=list)
    capacity: int = 0
    heartbeat_stats: dict[str, Any] = field(default_factory=dict)
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None


class Workers:
    def __init__(self) -> None:
        self._known: OrderedDict[str, WorkerRecord] = OrderedDict()

    def heard(self, worker_id: str) -> WorkerRecord:
        """The worker's record, made if need be."""
        worker = self._known.setdefault(worker_id, WorkerRecord(worker_id))
        self._known.move_to_end(worker_id)
        if len(self._known) > MAX_WORKERS:
            self._known.popitem(last=False)
        return worker

    def beat(self, heartbeat: WorkerHeartbeat, now: float) -> None:
        worker = self.heard(heartbeat.worker_id)
        worker.status = heartbeat.status
        worker.running = heartbeat.running
        worker.capacity = heartbeat.capacity
        worker.heartbeat_stats = heartbeat.stats
        worker.last_heartbeat_time = now
        if heartbeat.status == "busy":
            worker.last_busy_time = now
        elif heartbeat.status == "idle":
            worker.last_idle_time = now

    def get(self, worker_id: str) -> WorkerRecord | None:
        return self._known.get(worker_id)

    def all(self) -> list[WorkerRecord]:
        return sorted(self._known.values(), key=lambda worker: worker.worker_id)
