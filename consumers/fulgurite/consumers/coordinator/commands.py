"""What to publish: pure functions from a rollout as it stands (and a wish) to the events that make it so.

They decide nothing about whether the events take effect: the log does (state.py). All events of one call have the same
key and are published together, in order, so that they lie in one partition one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from fulgurite.consumers.coordinator.state import RolloutRecord
from fulgurite.schemas.coordinator import EnqueueRollout
from fulgurite.schemas.ids import new_id, now_ns
from fulgurite.schemas.rollouts import (
    AttemptEnd,
    AttemptFinished,
    AttemptStarted,
    FinalStatus,
    Mode,
    RolloutCancelled,
    RolloutEvent,
    RolloutFinished,
    RolloutQueued,
    RolloutRequeued,
)


class Identity(TypedDict):
    """On every event of a rollout, so that no reader must have seen the first."""

    rollout_id: str
    run_id: str
    task_id: str
    group_id: str
    group_size: int
    mode: Mode
    agent: str


def identity(of: RolloutRecord | RolloutQueued) -> Identity:
    return Identity(
        rollout_id=of.rollout_id,
        run_id=of.run_id,
        task_id=of.task_id,
        group_id=of.group_id,
        group_size=of.group_size,
        mode=of.mode,
        agent=of.agent,
    )


def queue(requests: Iterable[EnqueueRollout]) -> list[RolloutQueued]:
    """One `queued` each. Their times grow by a nanosecond, so that the queue keeps the order of the request."""
    start_ns = now_ns()
    return [_queued(request, start_ns + index) for index, request in enumerate(requests)]


def _queued(request: EnqueueRollout, time_ns: int) -> RolloutQueued:
    event = RolloutQueued(
        rollout_id=request.rollout_id or new_id(),
        time_ns=time_ns,
        run_id=request.run_id,
        task_id=request.task_id,
        group_id=request.group_id,
        group_size=request.group_size,
        mode=request.mode,
        agent=request.agent,
        input=request.input,
        config=request.config,
        metadata=request.metadata,
    )
    if request.resources_id is not None and event.model_extra is not None:
        event.model_extra["resources_id"] = request.resources_id
    return event


def start_attempt(of: RolloutRecord | RolloutQueued, worker_id: str) -> AttemptStarted:
    """The next attempt of a queued rollout."""
    sequence_id = len(of.attempts) + 1 if isinstance(of, RolloutRecord) else 1
    return AttemptStarted(**identity(of), attempt_id=new_id(), sequence_id=sequence_id, worker_id=worker_id)


def end_attempt(
    record: RolloutRecord, status: AttemptEnd, error: str, metadata: dict[str, str] | None = None
) -> list[RolloutEvent]:
    """The end of the open attempt, and what follows from it."""
    attempt = record.open_attempt
    assert attempt is not None, record
    end = AttemptFinished(
        **identity(record),
        attempt_id=attempt.attempt_id,
        sequence_id=attempt.sequence_id,
        worker_id=attempt.worker_id,
        status=status,
        error=error,
    )
    if metadata and end.model_extra is not None:
        end.model_extra["metadata"] = metadata
    return [end, _successor(record, attempt.attempt_id, attempt.sequence_id, status, error)]


def cancel(record: RolloutRecord, reason: str) -> list[RolloutEvent]:
    """The wish and its fulfilment."""
    return [RolloutCancelled(**identity(record), reason=reason), *_end_cancelled(record, reason)]


def complete(record: RolloutRecord) -> list[RolloutEvent]:
    """What the log still lacks: the last word on a cancelled rollout, or on an attempt whose end is there alone."""
    if record.cancel_reason is not None:
        return _end_cancelled(record, record.cancel_reason)
    attempt = record.latest
    assert attempt is not None, record
    assert attempt.end is not None, record
    return [_successor(record, attempt.attempt_id, attempt.sequence_id, attempt.end, attempt.error)]


def _end_cancelled(record: RolloutRecord, reason: str) -> list[RolloutEvent]:
    attempt = record.open_attempt
    if attempt is None:
        return [_finished(record, "cancelled", reason)]
    end = AttemptFinished(
        **identity(record),
        attempt_id=attempt.attempt_id,
        sequence_id=attempt.sequence_id,
        worker_id=attempt.worker_id,
        status="cancelled",
        error=reason,
    )
    return [end, _finished(record, "cancelled", reason, end.attempt_id, "cancelled")]


def _successor(
    record: RolloutRecord, attempt_id: str, sequence_id: int, end: AttemptEnd, error: str
) -> RolloutRequeued | RolloutFinished:
    """Retry rule: the end is in retry_condition and another attempt is allowed."""
    match end:
        case "succeeded" | "cancelled":
            return _finished(record, end, error, attempt_id, end)
        case "failed" | "timeout" | "unresponsive":
            if end in record.config.retry_condition and sequence_id < record.config.max_attempts:
                return RolloutRequeued(**identity(record), attempt_id=attempt_id, reason=end)
            return _finished(record, "failed", error or end, attempt_id, end)


def _finished(
    record: RolloutRecord, status: FinalStatus, error: str, attempt_id: str = "", end: AttemptEnd | None = None
) -> RolloutFinished:
    """attempt_id is the last attempt's, also where it had ended before somebody cancelled the rollout."""
    if not attempt_id and (latest := record.latest) is not None:
        attempt_id, end = latest.attempt_id, latest.end
    return RolloutFinished(
        **identity(record),
        attempt_id=attempt_id,
        status=status,
        attempt_status=end or "",
        attempts=len(record.attempts),
        error=error,
    )
