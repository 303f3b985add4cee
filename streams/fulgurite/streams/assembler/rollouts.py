"""What the assembler remembers: records that wait, rollouts that are open, have ended or are about to, and a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.rollouts import RolloutFinished
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.assembler.join import Announcement


@dataclass(slots=True)
class Held:
    """A span or reward that waits for the end of its rollout."""

    tp: TopicPartition
    offset: int
    rollout_id: str
    attempt_id: str
    key: bytes | None
    value: bytes | None
    """None where memory was short: it is read again when it is needed."""
    due: float
    """When it has waited too long for its rollout to be announced."""
    done: bool = False


@dataclass(slots=True)
class Pending:
    """A `finished` whose trajectory has not been emitted, and the end offsets that must be passed first."""

    event: RolloutFinished
    tp: TopicPartition
    offset: int
    key: bytes | None = None
    value: bytes | None = None
    """The record that said so."""
    barrier: dict[TopicPartition, int] | None = None
    asked: bool = False
    """Whether it has passed its barrier, and it was decided if it waits for a reward in OTLP (waits.py), too."""
    waits: bool = False
    """For that reward. When this is over, `barrier` is another one."""
    since: float = 0.0
    """When it began to wait, by the clock of waits.py."""
    done: bool = False
    """Its trajectory was taken."""


@dataclass(slots=True)
class OpenRollout:
    """A rollout without its trajectory."""

    known: bool = False
    """Whether an event of it was seen."""
    running: bool = False
    """Whether it has an attempt that has not been followed by `requeued`."""
    finishing: bool = False
    """Whether a `finished` of it is pending."""
    recalled: bool = False
    """Whether its trajectory is next, as soon as what was spilled of it has been read again."""
    announced: Announcement | None = None
    hold: tuple[TopicPartition, int] | None = None
    """The event that a restart must read again to know it."""
    latest: tuple[TopicPartition, int] | None = None
    """Its newest event."""
    spans: list[Held] = field(default_factory=list[Held])
    rewards: list[Held] = field(default_factory=list[Held])
    last: dict[TopicPartition, int] = field(default_factory=dict[TopicPartition, int])
    """The newest record of it in each partition."""

    @property
    def held(self) -> list[Held]:
        return self.spans + self.rewards


@dataclass(slots=True)
class Ended:
    """A rollout whose trajectory was emitted."""

    attempt_id: str
    tp: TopicPartition
    offset: int
    last: dict[TopicPartition, int] = field(default_factory=dict[TopicPartition, int])
    """The newest record of it in each partition."""
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction writes."""

    trajectories: list[Trajectory]
    ends: list[Pending]
    """What each trajectory is of."""
    dead_letters: list[DeadLetter]
    offsets: dict[TopicPartition, OffsetAndMetadata]
