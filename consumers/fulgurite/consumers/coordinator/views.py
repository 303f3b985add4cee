"""Records as the API shows them. Here "running" joins in: a started attempt whose worker has given a sign of life."""

from __future__ import annotations

from fulgurite.consumers.coordinator.leases import Leases
from fulgurite.consumers.coordinator.state import AttemptRecord, RolloutRecord, State
from fulgurite.schemas.coordinator import Attempt, AttemptedRollout, Rollout
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.rollouts import AttemptStatus, RolloutStatus


def status(record: RolloutRecord, leases: Leases) -> RolloutStatus:
    attempt = record.open_attempt
    if record.status == "preparing" and attempt is not None and leases.last_heartbeat(attempt.attempt_id) is not None:
        return "running"
    return record.status


def attempt(record: RolloutRecord, of: AttemptRecord, leases: Leases) -> Attempt:
    heard = leases.last_heartbeat(of.attempt_id)
    going: AttemptStatus = "preparing" if heard is None else "running"
    return Attempt(
        rollout_id=record.rollout_id,
        attempt_id=of.attempt_id,
        sequence_id=of.sequence_id,
        status=of.end or going,
        worker_id=of.worker_id,
        start_time=of.started_ns / 1e9,
        end_time=of.ended_ns / 1e9 if of.end else None,
        last_heartbeat_time=heard,
        error=of.error,
        metadata=of.metadata,
    )


def rollout(record: RolloutRecord, leases: Leases) -> Rollout | AttemptedRollout:
    """With its newest attempt, once it has one."""
    plain = Rollout(
        rollout_id=record.rollout_id,
        input=record.input,
        status=status(record, leases),
        mode=record.mode,
        run_id=record.run_id,
        task_id=record.task_id,
        group_id=record.group_id,
        group_size=record.group_size,
        agent=record.agent,
        resources_id=record.resources_id,
        config=record.config,
        metadata=record.metadata,
        start_time=record.queued_ns / 1e9,
        end_time=record.ended_ns / 1e9 if record.ended_ns else None,
        error=record.error,
    )
    latest = record.latest
    if latest is None:
        return plain
    return AttemptedRollout.model_construct(**plain.__dict__, attempt=attempt(record, latest, leases))


def statistics(state: State, leases: Leases) -> dict[str, object]:
    """Counts by status, the queue, open attempts."""
    counts: dict[str, int] = {name: count for name, count in state.counts.items() if count}
    beating = min(leases.beating, counts.get("preparing", 0))
    if beating:
        counts["preparing"] -= beating
        counts["running"] = beating
    oldest_ns = state.queue.oldest_ns()
    return {
        "rollouts": counts,
        "total_rollouts": len(state.rollouts),
        "queued": len(state.queue),
        "oldest_queued_seconds": None if oldest_ns is None else max(0.0, (now_ns() - oldest_ns) / 1e9),
        "open_attempts": len(state.open_attempts),
    }
