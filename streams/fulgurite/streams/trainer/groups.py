"""What windows are made of: a run's constants, members, groups, and a window. Pure; `windows.py` says how one becomes
the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fulgurite.schemas.training import DroppedRollout
from fulgurite.schemas.trajectories import Trajectory

MIN_SURVIVORS = 2
"""Below it there is no baseline to compare with."""

LEFT_OUT = ("deadline", "run_ended", "not_asked")
"""Why a source run dropped a rollout, where its clock or its own counts decided: a replay leaves the same ones out."""


FILLED = "filled"
"""The reason of a member that only counts in its group's comparison; the ledger has its own."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The run's constants that windows depend on."""

    run_id: str
    group_size: int
    groups_per_step: int
    groups_ahead: int
    """Most groups that pacing has on their way at once."""
    max_staleness: int
    group_deadline_seconds: float
    incomplete: Literal["mask", "drop", "fill"] = "mask"
    """What becomes of a group of which a member gives no data."""
    fill_reward: float = 0.0
    overlap_groups: int = 0
    """Groups of earlier windows that a window has besides its new ones."""
    overlap_seconds: float | None = None
    """How old these may be."""
    replayed: bool = False
    """The groups are those of another run, `run_id`, which asked for them and decided when they were over."""
    refill: bool = False
    """Whether groups whose rewards do not differ are dropped before a window is made, and others asked for instead."""

    def group_id(self, index: int) -> str:
        return f"{self.run_id}-g{index}"

    def rollout_ids(self, index: int) -> list[str]:
        """All rollouts of a group. The ids follow from run and index, so asking twice asks for the same ones."""
        return [f"{self.run_id}-g{index}-r{member}" for member in range(self.group_size)]


@dataclass(slots=True)
class Member:
    """A rollout that ended. `reason` says why it gives no data, empty when it does."""

    trajectory: Trajectory
    reason: str = ""
    min_version: int = 0
    """Oldest version that sampled one of its tokens; meaningless without data."""
    max_version: int = 0
    """The newest one."""


@dataclass(slots=True)
class Group:
    index: int
    arrived_ns: int
    """When its first member was read: the deadline counts from here."""
    members: dict[str, Member] = field(default_factory=dict[str, Member])
    closed: bool = False
    """No further member is waited for."""
    version: int | None = None
    """The version that the age of its tokens is measured against; None: the one that is trained."""
    size: int | None = None
    """Members that it has; None: shape.group_size."""
    left_out: set[str] = field(default_factory=set[str])
    """Of a replay: who came and was dropped with the source's reason, and does not come again."""

    def has(self, rollout_id: str) -> bool:
        """Whether its trajectory came."""
        return rollout_id in self.members or rollout_id in self.left_out

    @property
    def max_version(self) -> int:
        """The newest that sampled a token of it, as far as its members give data."""
        return max((member.max_version for member in self.members.values() if not member.reason), default=0)

    @property
    def assembled_ns(self) -> int:
        """When its last member was written."""
        return max((member.trajectory.assembled_ns for member in self.members.values()), default=0)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which groups a window has, and which of their members were there. When that was, no log says: several groups may
    have been waiting. So it is written down before it is trained on, and a restart takes the same."""

    version_in: int
    groups: dict[int, list[str]]
    """Index -> rollout ids, also of members without data."""


@dataclass(frozen=True, slots=True)
class Window:
    """What one step consumes."""

    version_in: int
    groups: list[list[Member]]
    """[groups_per_step][2..group_size] survivors, in the order of their ids; behind them members that were filled in,
    without sequences; behind the new groups those of earlier windows."""
    dropped: list[DroppedRollout]
    """Everything settled since the last window without being trained on."""
    measured_at: dict[str, int] = field(default_factory=dict[str, int])
    """The version that a rollout's age is measured against, where it is not version_in."""
    again: frozenset[str] = frozenset()
    """Rollouts of earlier windows."""
    groups_incomplete: int = 0
    """New groups of which a member gave no data."""
    choice: Choice | None = None
    """To be taken again after a crash; None where the log alone decides."""
    named: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of rollouts dropped since the last window those that other records have named, by reason."""


def filled_in(group: Group, survivors: list[Member], shape: Shape) -> list[Member]:
    """For every member without data one that counts in its group's comparison: a reward, nothing to train on."""
    alive = {member.trajectory.rollout_id for member in survivors}
    named = shape.rollout_ids(group.index) if group.size is None else sorted(group.members)
    found: list[Member] = []
    for rollout_id in named:
        if rollout_id in alive:
            continue
        member = group.members.get(rollout_id)
        trajectory = member.trajectory if member else Trajectory(rollout_id=rollout_id, status="cancelled")
        reward = shape.fill_reward if trajectory.reward is None else trajectory.reward
        found.append(Member(trajectory.model_copy(update={"sequences": [], "reward": reward}), FILLED))
    return found
