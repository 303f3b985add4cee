"""The life of a rollout, as events. Direction: coordinator (and any producer of `queued`) -> coordinator, assembler,
materialiser.

    queued -> attempt_started -> attempt_finished -> finished
                    ^                  |
                    +---- requeued <---+            cancelled -> finished, from any state

Every event carries the rollout's identity (run, task, group, mode, agent), so that no reader must have seen the first.
Exactly one `finished` ends a rollout; what comes after it changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fulgurite.schemas.event import Event, Labels, Name, ShortText, TimeNs
from fulgurite.schemas.ids import Id, OptionalId, new_id, now_ns

Mode = Literal["train", "val", "test"]
RolloutStatus = Literal["queuing", "preparing", "running", "succeeded", "failed", "requeuing", "cancelled"]
AttemptStatus = Literal["preparing", "running", "succeeded", "failed", "timeout", "unresponsive", "cancelled"]
FinalStatus = Literal["succeeded", "failed", "cancelled"]
AttemptEnd = Literal["succeeded", "failed", "timeout", "unresponsive", "cancelled"]
RetryCondition = Literal["failed", "timeout", "unresponsive"]

MAX_GROUP_SIZE = 1_024


class RolloutConfig(BaseModel):
    """How a rollout is run and retried."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Longest an attempt may take from its start."""
    unresponsive_seconds: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    """Longest a worker may be silent about a running attempt: the lease."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 2
    retry_condition: list[RetryCondition] = Field(default_factory=lambda: ["timeout", "unresponsive"])
    """After which ends a further attempt is made, while max_attempts allows it."""
    sampling_parameters: dict[str, Any] = Field(default_factory=dict)
    """What the agent should pass to its LLM calls (temperature, max_tokens, …)."""


class RolloutEventBase(Event):
    """Identity and time, on every event of a rollout. Topic `rollouts`, key rollout_id."""

    event_id: Id = Field(default_factory=new_id)
    rollout_id: Id
    time_ns: TimeNs = Field(default_factory=now_ns)
    run_id: OptionalId = ""
    task_id: OptionalId = ""
    group_id: OptionalId = ""
    """The rollouts of one task that are compared with each other."""
    group_size: Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE)] = 1
    mode: Mode = "train"
    agent: Name = ""


class RolloutQueued(RolloutEventBase):
    """A task to be done. Creating the same rollout_id twice is idempotent: the first one counts."""

    event: Literal["queued"] = "queued"
    input: Any = None
    """The task, as JSON."""
    config: RolloutConfig = Field(default_factory=RolloutConfig)
    metadata: Labels = Field(default_factory=dict)


class AttemptStarted(RolloutEventBase):
    event: Literal["attempt_started"] = "attempt_started"
    attempt_id: Id
    sequence_id: Annotated[int, Field(ge=1)]
    """1 for the first attempt."""
    worker_id: OptionalId = ""


class AttemptHeartbeat(RolloutEventBase):
    """Sign of life of an attempt whose worker speaks only Kafka; runners beat over HTTP for all attempts at once."""

    event: Literal["heartbeat"] = "heartbeat"
    attempt_id: Id
    worker_id: OptionalId = ""


class AttemptFinished(RolloutEventBase):
    """Published only after everything the attempt produced was acknowledged: the barrier rests on this order."""

    event: Literal["attempt_finished"] = "attempt_finished"
    attempt_id: Id
    sequence_id: Annotated[int, Field(ge=1)] = 1
    worker_id: OptionalId = ""
    status: AttemptEnd
    error: ShortText = ""


class RolloutRequeued(RolloutEventBase):
    event: Literal["requeued"] = "requeued"
    attempt_id: OptionalId = ""
    """The attempt that ended without being the last."""
    reason: ShortText = ""


class RolloutCancelled(RolloutEventBase):
    """Somebody wants it ended; the coordinator answers with `finished`."""

    event: Literal["cancelled"] = "cancelled"
    reason: ShortText = ""


class RolloutFinished(RolloutEventBase):
    """The end. attempt_id is the attempt that counts; empty when none ever started."""

    event: Literal["finished"] = "finished"
    attempt_id: OptionalId = ""
    status: FinalStatus
    attempt_status: AttemptEnd | Literal[""] = ""
    attempts: Annotated[int, Field(ge=0)] = 0
    error: ShortText = ""


RolloutEvent = Annotated[
    RolloutQueued
    | AttemptStarted
    | AttemptHeartbeat
    | AttemptFinished
    | RolloutRequeued
    | RolloutCancelled
    | RolloutFinished,
    Field(discriminator="event"),
]
ROLLOUT_EVENT: TypeAdapter[RolloutEvent] = TypeAdapter(RolloutEvent)
