"""What trainers did and what servers applied. Direction: trainer, follower -> materialiser, dashboards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter

from fulgurite.schemas.event import Event, Name, ShortText, Text, TimeNs, Version
from fulgurite.schemas.ids import Id, OptionalId, new_id, now_ns

Metrics = Annotated[dict[str, FiniteFloat], Field(max_length=512)]


class TrainingEventBase(Event):
    """Topic `training`, key run_id."""

    event_id: Id = Field(default_factory=new_id)
    run_id: Id
    time_ns: TimeNs = Field(default_factory=now_ns)


class DroppedRollout(BaseModel):
    """A rollout that will not be trained on, and why: stale, zero_variance, no_reward, deadline, run_ended, …"""

    rollout_id: Id
    reason: Name


class RunStarted(TrainingEventBase):
    """A run begins, or goes on after a restart (step > 0)."""

    event: Literal["run_started"] = "run_started"
    step: Annotated[int, Field(ge=0)] = 0
    resource: Id
    version: Version
    steps_total: Annotated[int, Field(ge=0)] = 0
    lineage: OptionalId = ""
    """Of the run's offsets on this log: which checkpoints are this run's, and which another log's."""
    config: dict[str, Any] = Field(default_factory=dict)


class TrainingStep(TrainingEventBase):
    """One optimizer step and the version it made, committed in one transaction with the offsets it consumed. Rollouts
    that its record has no room for are in records `rollouts_decided` before it."""

    event: Literal["step"] = "step"
    step: Annotated[int, Field(ge=1)]
    resource: Id
    version_in: Version
    version_out: Version
    rollout_ids: list[Id] = Field(default_factory=list)
    """Trained on, each named once in the life of the run."""
    again: list[Id] = Field(default_factory=list)
    """Trained on here, too, after an earlier step that named them: windows that slide."""
    dropped: list[DroppedRollout] = Field(default_factory=list)
    groups: Annotated[int, Field(ge=0)] = 0
    tokens: Annotated[int, Field(ge=0)] = 0
    """Sampled tokens that had a gradient."""
    reward_mean: FiniteFloat = 0.0
    """Over all rollouts of the window that had a reward, dropped for zero variance or not."""
    reward_std: FiniteFloat = 0.0
    loss: FiniteFloat = 0.0
    """All of it; without KL penalty and entropy bonus it is actor/pg_loss among the metrics."""
    grad_norm: FiniteFloat = 0.0
    staleness_mean: FiniteFloat = 0.0
    """Versions behind, over trained tokens."""
    staleness_max: Annotated[int, Field(ge=0)] = 0
    window_start_ns: TimeNs = 0
    window_end_ns: TimeNs = 0
    offsets: dict[str, int] = Field(default_factory=dict)
    """Next offset per partition of `trajectories`."""
    metrics: Metrics = Field(default_factory=dict)


class RolloutsDecided(TrainingEventBase):
    """More of what a run has decided about rollouts: what the record of a step, or of the run's end, has no room for,
    in the same transaction before it; and many that were dropped, long before the next step is made."""

    event: Literal["rollouts_decided"] = "rollouts_decided"
    step: Annotated[int, Field(ge=0)]
    """The one whose record would name them."""
    resource: Id
    version_in: Version
    version_out: Version
    """That of version_in where no version was made: between two steps, or at the end."""
    part_of: OptionalId = ""
    """The event_id of the record that has no room for them; empty in one that stands for itself."""
    rollout_ids: list[Id] = Field(default_factory=list)
    again: list[Id] = Field(default_factory=list)
    dropped: list[DroppedRollout] = Field(default_factory=list)
    offsets: dict[str, int] = Field(default_factory=dict)
    """Next offset per partition of `trajectories` when they were dropped; empty in a part."""


class VersionApplied(TrainingEventBase):
    """A server serves this version (or refused it, with the reason in `error`)."""

    event: Literal["version_applied"] = "version_applied"
    resource: Id
    version: Version
    server: ShortText
    ok: bool = True
    error: ShortText = ""
    seconds: Annotated[dict[str, FiniteFloat], Field(max_length=32)] = Field(default_factory=dict)
    """Of each phase: verify (with fetching), turn, pause, load, check, resume, unload; their total; and published, the
    time since the version was announced."""


class RunFinished(TrainingEventBase):
    """The run is over. `dropped` names what was still on its way; where that is too much, records before it do."""

    event: Literal["run_finished"] = "run_finished"
    step: Annotated[int, Field(ge=0)] = 0
    resource: Id
    version: Version
    dropped: list[DroppedRollout] = Field(default_factory=list)
    reason: Text = ""


TrainingEvent = Annotated[
    RunStarted | TrainingStep | RolloutsDecided | VersionApplied | RunFinished, Field(discriminator="event")
]
TRAINING_EVENT: TypeAdapter[TrainingEvent] = TypeAdapter(TrainingEvent)


def scalars(step: TrainingStep) -> dict[str, float]:
    """What is drawn of a step: its metrics, and what its record holds beside them."""
    return {
        **step.metrics,
        "reward": step.reward_mean,
        "reward_std": step.reward_std,
        "actor/loss": step.loss,
        "actor/grad_norm": step.grad_norm,
        "staleness/mean": step.staleness_mean,
        "staleness/max": float(step.staleness_max),
        "training/version": float(step.version_out),
        "training/tokens": float(step.tokens),
    }
