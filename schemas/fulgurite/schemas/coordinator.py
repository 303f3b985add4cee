"""What the coordinator's HTTP API takes and gives: the shapes runners, trainers and Agent Lightning's clients share.

Routes live under /v1/agl (see docs/contract.md). Times here are seconds since the epoch, as Agent Lightning's are.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fulgurite.schemas.event import Labels, Name, ShortText
from fulgurite.schemas.ids import Id, OptionalId
from fulgurite.schemas.rollouts import (
    MAX_GROUP_SIZE,
    AttemptEnd,
    AttemptStatus,
    Mode,
    RolloutConfig,
    RolloutStatus,
)

MAX_ENQUEUE = 10_000
MAX_DEQUEUE = 256
MAX_WAIT_SECONDS = 60.0


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EnqueueRollout(_Wire):
    """A rollout to be done. Without rollout_id the coordinator makes one; with one, creating it again is idempotent."""

    rollout_id: OptionalId = ""
    input: Any = None
    mode: Mode = "train"
    run_id: OptionalId = ""
    task_id: OptionalId = ""
    group_id: OptionalId = ""
    group_size: Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE)] = 1
    agent: Name = ""
    resources_id: OptionalId | None = None
    config: RolloutConfig = Field(default_factory=RolloutConfig)
    metadata: Labels = Field(default_factory=dict)


class EnqueueRequest(_Wire):
    """POST /v1/agl/queues/rollouts/enqueue -> 201, list of Rollout."""

    rollouts: Annotated[list[EnqueueRollout], Field(min_length=1, max_length=MAX_ENQUEUE)]


class DequeueRequest(_Wire):
    """POST /v1/agl/queues/rollouts/dequeue -> list of AttemptedRollout. Waits up to wait_seconds for the first one."""

    limit: Annotated[int, Field(ge=1, le=MAX_DEQUEUE)] = 1
    worker_id: OptionalId = ""
    wait_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 0.0


class UpdateAttempt(_Wire):
    """POST /v1/agl/rollouts/{rollout_id}/attempts/{attempt_id}: the end of an attempt, or a sign of life."""

    status: AttemptStatus | None = None
    worker_id: OptionalId | None = None
    last_heartbeat_time: float | None = None
    error: ShortText = ""
    metadata: Labels | None = None


class UpdateRollout(_Wire):
    """POST /v1/agl/rollouts/{rollout_id}. Only `cancelled` may be asked for; the rest follows from attempts."""

    status: RolloutStatus
    reason: ShortText = ""


class WaitRequest(_Wire):
    """POST /v1/agl/waits/rollouts -> those of the named rollouts that have ended, as soon as all have or time is up."""

    rollout_ids: Annotated[list[Id], Field(max_length=MAX_ENQUEUE)]
    timeout: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 0.0


class WorkerBeat(_Wire):
    """POST /v1/agl/workers/{worker_id} -> WorkerBeatReply. Renews the lease of every attempt named in `running`."""

    running: Annotated[list[Id], Field(max_length=MAX_ENQUEUE)] = Field(default_factory=list)
    capacity: Annotated[int, Field(ge=0)] = 0
    stopping: bool = False
    heartbeat_stats: dict[str, Any] = Field(default_factory=dict)


class WorkerBeatReply(BaseModel):
    """Attempts the worker must stop: cancelled, timed out, or no longer its own."""

    stop: list[str] = Field(default_factory=list)


class Attempt(BaseModel):
    """One try at a rollout."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    status: AttemptStatus
    worker_id: str = ""
    start_time: float
    end_time: float | None = None
    last_heartbeat_time: float | None = None
    error: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)


class Rollout(BaseModel):
    """A rollout as it stands."""

    rollout_id: str
    input: Any = None
    status: RolloutStatus
    mode: Mode = "train"
    run_id: str = ""
    task_id: str = ""
    group_id: str = ""
    group_size: int = 1
    agent: str = ""
    resources_id: str | None = None
    config: RolloutConfig = Field(default_factory=RolloutConfig)
    metadata: dict[str, str] = Field(default_factory=dict)
    start_time: float
    end_time: float | None = None
    error: str = ""


class AttemptedRollout(Rollout):
    """A rollout together with its newest attempt: what a runner gets to work on."""

    attempt: Attempt


def attempt_end(status: AttemptStatus | None) -> AttemptEnd | None:
    """The end this status means, None where the attempt goes on."""
    match status:
        case "succeeded" | "failed" | "timeout" | "unresponsive" | "cancelled":
            return status
        case _:
            return None
