"""Windows: which rollouts a step trains on. Pure: it knows trajectories, counts and a clock it is told; no Kafka.

    trajectory ─► open group ─► (all members, or the deadline) closed group ─► groups_per_step of them ─► window

- A group is complete when each of its `group_size` rollouts gave a trajectory. A failed, cancelled or unusable one
  counts as a member without data. `group_deadline_seconds` after its first member a group closes without the missing
  ones (dropped as `deadline`); they are not waited for and not trained on when they come after all.
- Of a closed group the *survivors* count: members with data whose oldest sampled token is at most `max_staleness`
  versions behind the version that will be trained (the others are dropped as `stale`). Fewer than two survivors: the
  whole group is dropped (`too_few`), and pacing asks for another.
- A window is the `groups_per_step` oldest usable groups, by the order in which they were asked for. Groups whose
  rewards do not differ count as groups of the window, though nothing can be learned from them: asked for and consumed
  stay equal.
- In a replay (`shape.replayed`) the source run's ledger closes groups, no clock does: see `settle`. What is in a window
  is then a function of the log alone.

Promise: every rollout asked for (in a replay: read) comes out exactly once, in a window's survivors or in `dropped`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fulgurite.schemas.training import DroppedRollout
from fulgurite.schemas.trajectories import Trajectory

MIN_SURVIVORS = 2
"""Below it there is no baseline to compare with."""

LEFT_OUT = ("deadline", "run_ended", "not_asked")
"""Why a source run dropped a rollout, where its clock or its own counts decided: a replay leaves the same ones out."""


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
    replayed: bool = False
    """The groups are those of another run, `run_id`, which asked for them and decided when they were over."""

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


@dataclass(frozen=True, slots=True)
class Window:
    """What one step consumes."""

    version_in: int
    groups: list[list[Member]]
    """[groups_per_step][2..group_size] survivors, in the order of their ids."""
    dropped: list[DroppedRollout]
    """Everything settled since the last window without being trained on."""
    measured_at: dict[str, int] = field(default_factory=dict[str, int])
    """The version that a rollout's age is measured against, where it is not version_in."""


@dataclass(slots=True)
class Windows:
    """The groups on their way, and what became of those that are not. All of it goes into the checkpoint."""

    shape: Shape
    asked: int = 0
    """Groups asked for since the start of the run: indices 0 to asked - 1."""
    groups: dict[int, Group] = field(default_factory=dict[int, Group])
    settled_below: int = 0
    settled: set[int] = field(default_factory=set[int])
    """Groups that went into a window or were dropped: all below `settled_below`, and these."""
    missing: set[str] = field(default_factory=set[str])
    """Dropped by deadline, their trajectories still to come."""
    dropped: list[DroppedRollout] = field(default_factory=list[DroppedRollout])
    """For the next step's record."""
    groups_dropped: int = 0
    late: int = 0
    """Members that came after their group's deadline, since the last window."""
    duplicates: int = 0

    def add(self, member: Member, now_ns: int) -> None:
        """Takes in a trajectory of this run."""
        trajectory = member.trajectory
        index = self._index(trajectory)
        if index is None:
            self._drop(trajectory.rollout_id, "not_asked")
            return
        if trajectory.rollout_id in self.missing:
            self.missing.discard(trajectory.rollout_id)
            self.late += 1
            return
        group = self.groups.get(index)
        if self.is_settled(index) or (group and (group.closed or trajectory.rollout_id in group.members)):
            self.duplicates += 1
            return
        if group is None:
            group = self.groups[index] = Group(index, now_ns)
        group.members[trajectory.rollout_id] = member
        if len(group.members) == self.shape.group_size and not self.shape.replayed:
            group.closed = True

    def settle(self, decided: Mapping[str, str], version: int | None) -> int:
        """For a replay: what a record of the source's ledger decided, rollout by rollout; "" or why it was dropped.

        Called when everything that the source had read by then is here. What it dropped because of its clock (LEFT_OUT)
        is dropped with its reason; the other groups are closed, for this run's own judgement. A group of which
        something lies before the replay's begin is dropped whole, its number of groups is returned.
        """
        groups: dict[int, list[str]] = {}
        for rollout_id, reason in decided.items():
            index = self._index_of(rollout_id)
            if index is None or self.is_settled(index):
                continue  # dropped as `not_asked` when it was read
            if reason not in LEFT_OUT:
                groups.setdefault(index, []).append(rollout_id)
                continue
            group = self.groups.get(index)
            if group and group.members.pop(rollout_id, None):
                self._drop(rollout_id, reason)
            elif group and reason == "deadline":
                self.missing.add(rollout_id)
                self._drop(rollout_id, reason)
        cut = 0
        for index, rollout_ids in sorted(groups.items()):
            group = self.groups.get(index) or Group(index, 0)
            if any(rollout_id not in group.members for rollout_id in rollout_ids):
                cut += 1
                self._settle(group, 0, "before_begin")
            else:
                group.closed, group.version = True, version
        return cut

    def put(self, index: int, members: Iterable[Member], version: int | None) -> None:
        """For a replay by selection: a whole group, at this place of the order."""
        found = {member.trajectory.rollout_id: member for member in members}
        self.groups[index] = Group(index, 0, found, True, version)

    def deadline_due(self, now_ns: int) -> list[int]:
        """Groups that have waited long enough. Ask the log for what is there before `close` them."""
        limit = int(self.shape.group_deadline_seconds * 1e9)
        return [
            index for index, group in self.groups.items() if not group.closed and now_ns - group.arrived_ns >= limit
        ]

    def close(self, indices: Iterable[int]) -> None:
        """These groups wait no longer; who is missing is dropped."""
        for index in indices:
            group = self.groups[index]
            if group.closed:
                continue
            group.closed = True
            absent = [rollout_id for rollout_id in self.shape.rollout_ids(index) if rollout_id not in group.members]
            self.missing.update(absent)
            for rollout_id in absent:
                self._drop(rollout_id, "deadline")

    def take(self, version_in: int) -> Window | None:
        """The next window for a policy at `version_in`, as soon as there are enough usable groups."""
        usable: list[int] = []
        for index in sorted(self.groups):
            group = self.groups[index]
            if not group.closed:
                continue
            if len(self._survivors(group, version_in)) >= MIN_SURVIVORS:
                usable.append(index)
            else:
                self._drop_group(group, version_in)
        if len(usable) < self.shape.groups_per_step:
            return None
        chosen: list[list[Member]] = []
        measured_at: dict[str, int] = {}
        for index in usable[: self.shape.groups_per_step]:
            group = self.groups[index]
            survivors = self._survivors(group, version_in)
            chosen.append(survivors)
            if group.version is not None:
                measured_at.update({member.trajectory.rollout_id: group.version for member in survivors})
            self._settle(group, version_in, "")
        window = Window(version_in, chosen, self.dropped, measured_at)
        self.dropped = []
        return window

    def outstanding(self) -> list[str]:
        """Rollouts asked for whose trajectories were not read, whether or not anyone still waits for them."""
        found = set(self.missing)
        for index in range(self.settled_below, self.asked):
            group = self.groups.get(index)
            if not self.is_settled(index) and not (group and group.closed):
                found.update(id for id in self.shape.rollout_ids(index) if not group or id not in group.members)
        return sorted(found)

    def end(self) -> list[DroppedRollout]:
        """Drops everything that is left, because the run is over; gives all that no step's record named."""
        for index in sorted({*range(self.settled_below, self.asked), *self.groups}):
            if self.is_settled(index):
                continue
            group = self.groups.get(index)
            # Who is missing from a closed group is dropped already, from a group not asked for was never asked.
            waits = index < self.asked and not (group and group.closed)
            named = self.shape.rollout_ids(index) if waits else sorted(group.members) if group else []
            for rollout_id in named:
                member = group.members.get(rollout_id) if group else None
                if member or waits:
                    self._drop(rollout_id, (member.reason if member else "") or "run_ended")
            self._mark_settled(index)
        dropped, self.dropped = self.dropped, []
        return dropped

    def is_settled(self, index: int) -> bool:
        return index < self.settled_below or index in self.settled

    def _index(self, trajectory: Trajectory) -> int | None:
        """The group's number, None for a rollout of somebody else's making that carries this run's name.

        An earlier life may have asked for a few groups more than this one knows of (Kafka forgets the marker beside the
        offsets after a week of silence), never for more than pacing has on their way. They are taken in, but do not
        move `asked`: anybody can give a rollout such a name, and the groups below it would never be asked for. Asking
        again for one that is here already is harmless, its ids are the same.
        """
        index = self._index_of(trajectory.rollout_id)
        if index is None or trajectory.group_id != self.shape.group_id(index):
            return None
        return index if self.shape.replayed or index < self.asked + self.shape.groups_ahead else None

    def _index_of(self, rollout_id: str) -> int | None:
        """The group's number in a name such as the run makes them, None for any other name."""
        prefix = f"{self.shape.run_id}-g"
        found = re.fullmatch(r"(0|[1-9][0-9]{0,14})-r(0|[1-9][0-9]{0,5})", rollout_id.removeprefix(prefix))
        if not rollout_id.startswith(prefix) or found is None or int(found[2]) >= self.shape.group_size:
            return None
        return int(found[1])

    def _survivors(self, group: Group, version_in: int) -> list[Member]:
        version = version_in if group.version is None else group.version
        # Sorted, so that the window does not depend on the order in which members were read.
        alive = [member for member in group.members.values() if not self._reason(member, version)]
        return sorted(alive, key=lambda member: member.trajectory.rollout_id)

    def _reason(self, member: Member, version_in: int) -> str:
        if member.reason:
            return member.reason
        return "stale" if version_in - member.min_version > self.shape.max_staleness else ""

    def _drop_group(self, group: Group, version_in: int) -> None:
        self.groups_dropped += 1
        self._settle(group, version_in, "too_few")

    def _settle(self, group: Group, version_in: int, reason_for_survivors: str) -> None:
        version = version_in if group.version is None else group.version
        for rollout_id, member in sorted(group.members.items()):
            reason = self._reason(member, version) or reason_for_survivors
            if reason:
                self._drop(rollout_id, reason)
        self._mark_settled(group.index)

    def _mark_settled(self, index: int) -> None:
        self.groups.pop(index, None)
        self.settled.add(index)
        while self.settled_below in self.settled:
            self.settled.discard(self.settled_below)
            self.settled_below += 1

    def _drop(self, rollout_id: str, reason: str) -> None:
        self.dropped.append(DroppedRollout(rollout_id=rollout_id, reason=reason))
