"""Which groups are open: members come one by one, and a group is given when it is complete or has waited too long.

Pure: a clock and records are told. Promises: of a group that is remembered at most one list of members comes out; a
member that comes after its group was given, or that is alone, is counted and given to nobody; at most `limit` groups
are remembered, open ones and those that were given while members may still come, however late: of these the oldest
are let go of first, where there is no room, and nothing else forgets one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from fulgurite.producers.reading import Fetched
from fulgurite.schemas.trajectories import Trajectory

Record = Fetched

MIN_MEMBERS = 2
"""A group with fewer is given to nobody: there is nothing to compare."""


class GroupState(BaseModel):
    """What is remembered of a group: where its members lie. The log has the rest."""

    members: list[tuple[int, int]] = Field(default_factory=list[tuple[int, int]])
    """(partition, offset) of each that came."""
    given: bool = False
    """It was given, or given up, without those that are missing."""
    missing: int = 0
    """Of a group that was given."""

    @classmethod
    def parse(cls, value: Any) -> GroupState | None:
        try:
            return cls.model_validate(value)
        except ValidationError:
            return None


@dataclass(slots=True)
class Group:
    """A group that is remembered."""

    group_id: str
    since: float
    """When its first member came, or this process."""
    members: dict[str, tuple[Record, Trajectory]] = field(default_factory=dict[str, tuple[Record, Trajectory]])
    given: bool = False
    missing: int = 0

    def state(self) -> GroupState:
        places = [] if self.given else [(record.partition, record.offset) for record, _ in self.members.values()]
        return GroupState(members=places, given=self.given, missing=self.missing)

    def trajectories(self) -> list[Trajectory]:
        """In the order of their ids, so that it does not depend on who ended first."""
        return [self.members[rollout_id][1] for rollout_id in sorted(self.members)]

    def records(self) -> list[Record]:
        return [self.members[rollout_id][0] for rollout_id in sorted(self.members)]


@dataclass(frozen=True, slots=True)
class Change:
    """What a record, or time, did: a group to be given, and what is to be remembered of which groups from now on."""

    group: Group | None = None
    remember: Mapping[str, GroupState | None] = field(default_factory=dict[str, "GroupState | None"])
    """By group_id; None: nothing any more."""


class Groups:
    """All groups of one algorithm."""

    def __init__(self, limit: int, deadline_seconds: float) -> None:
        self._limit = limit
        self._deadline_seconds = deadline_seconds
        self._open: dict[str, Group] = {}
        self._given: dict[str, Group] = {}
        """Without those that are missing, which may still come; the oldest first."""
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        """Open ones."""
        return len(self._open)

    def restore(self, group: Group) -> None:
        """As it was remembered; the oldest first."""
        (self._given if group.given else self._open)[group.group_id] = group

    def add(self, record: Record, trajectory: Trajectory, now: float) -> Change:
        """Takes in one trajectory."""
        group_id = trajectory.group_id
        if not group_id or trajectory.group_size < MIN_MEMBERS:
            self.counts["alone"] += 1
            return Change()
        if given := self._given.get(group_id):
            return self._late(given)
        group = self._open.setdefault(group_id, Group(group_id, now))
        group.members.setdefault(trajectory.rollout_id, (record, trajectory))
        if len(group.members) < trajectory.group_size:
            remember: dict[str, GroupState | None] = {group_id: group.state()}
            return Change(None, remember | self._let_go())
        del self._open[group_id]
        return Change(group, {group_id: None})

    def due(self, now: float) -> list[str]:
        """Groups that have waited long enough: ask the log for what is there before `close` them."""
        before = now - self._deadline_seconds
        return [group_id for group_id, group in self._open.items() if group.since <= before]

    def close(self, group_id: str, now: float) -> Change:
        """Waits no longer for a group: it is given as it is, and remembered until `limit` pushes it out."""
        group = self._open.pop(group_id)
        size = next(iter(group.members.values()))[1].group_size
        kept = self._given[group_id] = Group(group_id, now, given=True, missing=size - len(group.members))
        enough = len(group.members) >= MIN_MEMBERS
        self.counts["partial" if enough else "too_few"] += 1
        remember: dict[str, GroupState | None] = {group_id: kept.state()}
        return Change(group if enough else None, remember | self._let_go())

    def overfull(self) -> str | None:
        """The group to close because too many are open, None where there is room."""
        return next(iter(self._open)) if len(self._open) > self._limit else None

    def _late(self, group: Group) -> Change:
        self.counts["late"] += 1
        group.missing -= 1
        if group.missing > 0:
            return Change(None, {group.group_id: group.state()})
        del self._given[group.group_id]
        return Change(None, {group.group_id: None})

    def _let_go(self) -> dict[str, GroupState | None]:
        """Forgets groups that were given, the oldest first, while there are too many."""
        gone: dict[str, GroupState | None] = {}
        while self._given and len(self._open) + len(self._given) > self._limit:
            oldest = next(iter(self._given))
            del self._given[oldest]
            gone[oldest] = None
        return gone
