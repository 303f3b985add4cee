"""Windows: which rollouts a step trains on. Pure: it knows trajectories, counts and a clock it is told; no Kafka.

    trajectory ─► open group ─► (all members, or the deadline) closed group ─► groups_per_step of them ─► window

- A group is complete when each of its `group_size` rollouts gave a trajectory. A failed, cancelled or unusable one
  counts as a member without data. `group_deadline_seconds` after its first record a group closes without the missing
  ones (dropped as `deadline`); they are not waited for and not trained on when they come after all.
- Of a closed group the *survivors* count: members with data whose oldest sampled token is at most `max_staleness`
  versions behind the version that will be trained (the others are dropped as `stale`, and as `unknown_version` where a
  token claims a newer version than there is). Fewer than two survivors: the whole group is dropped (`too_few`), and
  pacing asks for another.
- A window is the `groups_per_step` oldest usable groups, by the order in which they were asked for. Groups whose
  rewards do not differ count as groups of the window, though nothing can be learned from them: asked for and consumed
  stay equal.
- Where a member gives no data (failed, partial, stale, missing) `shape.incomplete` says what becomes of its group.
  mask: the others are trained on, if there are two, and compared with each other. drop: none is (`incomplete`). fill:
  its reward, or `shape.fill_reward` where it has none, counts in the group's comparison; it has no gradient.
- `shape.refill`: a group whose rewards do not differ is dropped whole (`zero_variance`) before a window is made of it,
  and pacing asks for another: DAPO's dynamic sampling. At most MOST_REFILLS windows' worth for one window: where
  nothing differs any more, windows go on with what there is.
- A window may slide: `overlap_groups` of the groups in earlier windows, the newest ones, are in it again (once
  `remember` said that these were trained on), as long as they are neither too stale nor more than `overlap_seconds`
  older than its newest group (by the time their last member was written, so the log alone decides). A rollout has a
  gradient once in each window that it is in; the ledger names it in the first one's record, later ones list it apart
  (`TrainingStep.again`).
- In a replay (`shape.replayed`) the source run's ledger closes groups, no clock does: see `settle`. What is in a window
  is then a function of the log alone.

- `choice`: a window that an earlier life of the run had taken, and maybe trained on, when it died. It is taken again as
  soon as its members are here, whatever else waits by then.

Promise: every rollout asked for (in a replay: read) comes out exactly once, in a window's survivors or in `dropped`.
One that nobody asked for is dropped once, too, as long as it is remembered (MOST_STRANGERS).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fulgurite.schemas.training import DroppedRollout
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.objectives.advantages import has_signal
from fulgurite.streams.trainer.groups import FILLED as FILLED
from fulgurite.streams.trainer.groups import LEFT_OUT as LEFT_OUT
from fulgurite.streams.trainer.groups import MIN_SURVIVORS as MIN_SURVIVORS
from fulgurite.streams.trainer.groups import Choice as Choice
from fulgurite.streams.trainer.groups import Group as Group
from fulgurite.streams.trainer.groups import Member as Member
from fulgurite.streams.trainer.groups import Shape as Shape
from fulgurite.streams.trainer.groups import Window as Window
from fulgurite.streams.trainer.groups import filled_in

MOST_REFILLS = 10
"""Windows' worth of groups without a signal that are replaced for one window."""

MOST_STRANGERS = 4096
"""Of rollouts that nobody asked for so many are remembered, the newest: the record of one may come again."""


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
    """For the next step's record, or one before it (`ledger.py`)."""
    held: int = 0
    """The first so many of them wait for their groups."""
    named: Counter[str] = field(default_factory=Counter[str])
    """Dropped rollouts that records since the last window have named, by reason."""
    passed: dict[str, str] = field(default_factory=dict[str, str])
    """Of a replay by selection: named already, and why; their groups are still to come."""
    groups_failed: int = 0
    """Since this life of the run began, groups dropped for too few survivors: agents failed, or were too slow."""
    recent: list[Group] = field(default_factory=list[Group])
    """Of earlier windows, for the next ones: their survivors, oldest group first."""
    choice: Choice | None = None
    """Of an earlier life: the next window."""
    strangers: dict[str, None] = field(default_factory=dict[str, None])
    """Dropped as `not_asked`, the newest MOST_STRANGERS of them in their order."""
    taken: list[Group] = field(default_factory=list[Group])
    """Groups of the window that was taken last, until it is known what became of them."""
    refilled: int = 0
    """Groups without a signal dropped since the last window."""
    waiting: tuple[int, ...] = ()
    """Complete groups that waited when `take` last looked, and are in no window."""
    late: int = 0
    """Members that came after their group's deadline, since the last window."""
    duplicates: int = 0

    def add(self, member: Member, now_ns: int) -> None:
        """Takes in a trajectory of this run."""
        trajectory = member.trajectory
        index = self._index(trajectory)
        if index is None:
            self._name_stranger(trajectory.rollout_id)
            return
        group = self.groups.get(index)
        if trajectory.rollout_id in self.missing:
            self.missing.discard(trajectory.rollout_id)
            self.late += 1
            if group and self.shape.replayed:
                group.left_out.add(trajectory.rollout_id)
            return
        if self.is_settled(index) or (group and (group.closed or group.has(trajectory.rollout_id))):
            self.duplicates += 1
            return
        if group is None:
            group = self.groups[index] = Group(index, now_ns)
        group.members[trajectory.rollout_id] = member
        if len(group.members) == self.shape.group_size and not self.shape.replayed:
            group.closed = True

    def expect(self, group_id: str, now_ns: int) -> None:
        """A record of this group came that says no more, or none will: its deadline counts, as from a first member."""
        prefix, _, number = group_id.rpartition("-g")
        if prefix != self.shape.run_id or not number.isascii() or not number.isdigit() or self.shape.replayed:
            return
        index = int(number)
        if self.shape.group_id(index) == group_id and index < self.asked and not self.is_settled(index):
            self.groups.setdefault(index, Group(index, now_ns))

    def settle(self, decided: Mapping[str, str], version: int | None, *, within_groups: bool = False) -> int:
        """For a replay: what a record of the source's ledger decided, rollout by rollout; "" or why it was dropped.

        Called when everything that the source had read by then is here. What it dropped because of its clock (LEFT_OUT)
        is dropped with its reason; the other groups are closed, for this run's own judgement. A group of which
        something lies before the replay's begin is dropped whole, its number of groups is returned. The age of tokens
        is measured against `version`, or within each group.
        """
        groups: dict[int, list[str]] = {}
        for rollout_id, reason in decided.items():
            index = self.index_of(rollout_id)
            if index is None or self.is_settled(index):
                continue  # dropped as `not_asked` when it was read
            if reason not in LEFT_OUT:
                groups.setdefault(index, []).append(rollout_id)
                continue
            group = self.groups.get(index)
            if group and group.members.pop(rollout_id, None):
                group.left_out.add(rollout_id)
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
                group.closed, group.version = True, group.max_version if within_groups else version
        return cut

    def put(self, index: int, members: Iterable[Member]) -> None:
        """For a replay by selection: a whole group, at this place of the order. Its age is measured within it."""
        found = {member.trajectory.rollout_id: member for member in members}
        group = self.groups[index] = Group(index, 0, found, True, None, len(found))
        group.version = group.max_version

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

    def take(self, version_in: int, least: int | None = None) -> Window | None:
        """The next window for a policy at `version_in`, as soon as there are groups_per_step usable groups, or `least`
        of them."""
        if not self._choice_is_here(version_in):
            return None
        usable: list[Group] = []
        for index in sorted(self.groups):
            group = self.groups[index]
            if not group.closed:
                continue
            if fault := self._fault(group, version_in):
                self.groups_failed += fault == "too_few"
                self.refilled += fault == "zero_variance"
                self._settle(group, version_in, fault)
            else:
                usable.append(group)
        chosen = self._chosen(usable, least or self.shape.groups_per_step)
        self.waiting = tuple(group.index for group in usable if group not in chosen)
        if not chosen:
            return None
        again = self._again(chosen, version_in)
        members = [self._trained(group, version_in) for group in (*chosen, *again)]
        incomplete = sum(len(self._survivors(group, version_in)) < self._size(group) for group in chosen)
        measured_at = {
            member.trajectory.rollout_id: group.version
            for group, those in zip((*chosen, *again), members, strict=True)
            if group.version is not None
            for member in those
        }
        for group in chosen:
            self._settle(group, version_in, "")
        repeated = frozenset(rollout_id for group in again for rollout_id in group.members)
        choice = Choice(version_in, {group.index: sorted(group.members) for group in chosen})
        window = Window(
            version_in,
            members,
            self.dropped,
            measured_at,
            repeated,
            incomplete,
            None if self.shape.replayed else choice,
            self.named,
        )
        self.dropped, self.held, self.named = [], 0, Counter()
        self.taken, self.choice, self.refilled = chosen, None, 0
        self._forget_strangers()
        return window

    def remember(self, version_in: int, left_out: Collection[str] = ()) -> None:
        """The last window was trained on: later ones may have its groups again, but for those with rollouts that were
        left out. What the ledger has named as dropped stays dropped; where it counts in its group's comparison, it goes
        on doing so."""
        trained = [group for group in self.taken if not group.members.keys() & set(left_out)]
        self.recent += [self._kept(group, version_in) for group in trained]
        self.taken = []
        self.forget()

    def forget(self) -> None:
        """Earlier groups that the shape no longer asks for: it may be another one than in the run's life before."""
        self.recent = self.recent[max(0, len(self.recent) - self.shape.overlap_groups) :]

    def unrecorded(self) -> list[int]:
        """Groups asked for of which no record has come."""
        asked = range(self.settled_below, self.asked)
        return [index for index in asked if index not in self.groups and not self.is_settled(index)]

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
            self.mark_settled(index)
        dropped, self.dropped = self.dropped, []
        return dropped

    @property
    def groups_settled(self) -> int:
        """How many groups windows have had, or were dropped whole."""
        return self.settled_below + len(self.settled)

    def is_settled(self, index: int) -> bool:
        return index < self.settled_below or index in self.settled

    def _index(self, trajectory: Trajectory) -> int | None:
        """The group's number, None for a rollout of somebody else's making that carries this run's name.

        An earlier life may have asked for a few groups more than this one knows of (Kafka forgets the marker beside the
        offsets after a week of silence), never for more than pacing has on their way. They are taken in, but do not
        move `asked`: anybody can give a rollout such a name, and the groups below it would never be asked for. Asking
        again for one that is here already is harmless, its ids are the same.
        """
        index = self.index_of(trajectory.rollout_id)
        if index is None or trajectory.group_id != self.shape.group_id(index):
            return None
        return index if self.shape.replayed or index < self.asked + self.shape.groups_ahead else None

    def _name_stranger(self, rollout_id: str) -> None:
        """Once. A rollout of our own whose record names another group is named for what becomes of its own place."""
        own = self.index_of(rollout_id)
        is_ours = own is not None and (self.shape.replayed or own < self.asked)
        if is_ours or rollout_id in self.strangers:
            self.duplicates += 1
            return
        self._drop(rollout_id, "not_asked")
        self.strangers[rollout_id] = None
        self._forget_strangers()

    def _forget_strangers(self) -> None:
        """Not those that were named since the last window: after a restart their records are read again."""
        while len(self.strangers) > MOST_STRANGERS + self.named["not_asked"]:
            del self.strangers[next(iter(self.strangers))]

    def index_of(self, rollout_id: str) -> int | None:
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
        if member.max_version > version_in:
            return "unknown_version"
        return "stale" if version_in - member.min_version > self.shape.max_staleness else ""

    def _size(self, group: Group) -> int:
        return self.shape.group_size if group.size is None else group.size

    def _fault(self, group: Group, version_in: int) -> str:
        """Why a closed group cannot be trained on; empty where it can."""
        survivors = len(self._survivors(group, version_in))
        if self.shape.incomplete == "drop" and MIN_SURVIVORS <= survivors < self._size(group):
            return "incomplete"
        filled = self.shape.incomplete == "fill" and survivors > 0 and self._size(group) >= MIN_SURVIVORS
        if survivors < MIN_SURVIVORS and not filled:
            return "too_few"
        is_chosen = self.choice is not None and group.index in self.choice.groups
        if self.shape.refill and not is_chosen and self.refilled < MOST_REFILLS * self.shape.groups_per_step:
            rewards = [member.trajectory.reward or 0.0 for member in self._trained(group, version_in)]
            return "" if has_signal(rewards) else "zero_variance"
        return ""

    def _trained(self, group: Group, version_in: int) -> list[Member]:
        """The survivors, and behind them what is filled in."""
        survivors = self._survivors(group, version_in)
        if self.shape.incomplete != "fill":
            return survivors
        return [*survivors, *filled_in(group, survivors, self.shape)]

    def _again(self, chosen: list[Group], version_in: int) -> list[Group]:
        """Groups of earlier windows that are in this one too. A replay measures them against the newest version of this
        window, or, where the selection's order is not that of versions, their own."""
        newest_ns = max(group.assembled_ns for group in chosen)
        version = max((group.version for group in chosen if group.version is not None), default=None)
        found: list[Group] = []
        for group in self.recent:
            seconds = (newest_ns - group.assembled_ns) / 1e9
            if self.shape.overlap_seconds is not None and seconds > self.shape.overlap_seconds:
                continue
            group.version = None if version is None else max(version, group.max_version)
            if not self._fault(group, version_in):
                found.append(group)
        return found

    def _kept(self, group: Group, version_in: int) -> Group:
        if self.shape.incomplete == "fill":
            return group
        survivors = {member.trajectory.rollout_id: member for member in self._survivors(group, version_in)}
        return replace(group, members=survivors, size=len(survivors))

    def _chosen(self, usable: list[Group], least: int) -> list[Group]:
        """The next window's new groups; none where there are too few."""
        if self.choice is not None:
            return [group for group in usable if group.index in self.choice.groups]
        return usable[: self.shape.groups_per_step] if len(usable) >= least else []

    def _choice_is_here(self, version_in: int) -> bool:
        """Whether what an earlier life took can be taken now; closes its groups with the members that they had. One
        that cannot be taken any more (its version is over, a group was closed with others) is forgotten."""
        choice = self.choice
        if choice is None:
            return True
        for index, rollout_ids in choice.groups.items():
            group = self.groups.get(index)
            if group and group.members.keys() >= set(rollout_ids):
                continue
            if choice.version_in == version_in and not self.is_settled(index) and not (group and group.closed):
                return False
            self.choice = None
            return True
        if choice.version_in != version_in:
            self.choice = None
            return True
        for index, rollout_ids in choice.groups.items():
            self._close_with(self.groups[index], rollout_ids)
        return True

    def _close_with(self, group: Group, rollout_ids: list[str]) -> None:
        """Who else belongs to the group was late then, and is now."""
        for rollout_id in self.shape.rollout_ids(group.index):
            if rollout_id in rollout_ids:
                continue
            if group.members.pop(rollout_id, None):
                self._drop(rollout_id, "deadline")
            elif not group.closed:
                self.missing.add(rollout_id)
                self._drop(rollout_id, "deadline")
        group.closed = True

    def _settle(self, group: Group, version_in: int, reason_for_survivors: str) -> None:
        version = version_in if group.version is None else group.version
        for rollout_id, member in sorted(group.members.items()):
            reason = self._reason(member, version) or reason_for_survivors
            if reason:
                self._drop(rollout_id, reason)
        self.mark_settled(group.index)

    def mark_settled(self, index: int) -> None:
        self.groups.pop(index, None)
        self.settled.add(index)
        while self.settled_below in self.settled:
            self.settled.discard(self.settled_below)
            self.settled_below += 1

    def _drop(self, rollout_id: str, reason: str) -> None:
        self.dropped.append(DroppedRollout(rollout_id=rollout_id, reason=reason))
