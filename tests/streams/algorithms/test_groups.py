"""Groups whose members come late, in no order and after restarts: of one at most one list comes out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import cast

import pytest

from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.groups import Change, Group, Groups, GroupState, Record

DEADLINE = 600.0


@dataclass(frozen=True)
class _Place:
    partition: int
    offset: int


class Log:
    """Groups, what they gave, and what is remembered of them."""

    def __init__(self, limit: int = 100) -> None:
        self.groups = Groups(limit, DEADLINE)
        self.given: list[tuple[str, list[str]]] = []
        self.remembered: dict[str, GroupState] = {}
        self._limit = limit
        self._log: list[Trajectory] = []

    def member(self, group_id: str, number: int, now: float, size: int = 4) -> None:
        one = Trajectory(rollout_id=f"{group_id}{number}", group_id=group_id, group_size=size, status="succeeded")
        self._log.append(one)
        self._take(self.groups.add(_record(len(self._log) - 1), one, now))
        if (overfull := self.groups.overfull()) is not None:
            self._take(self.groups.close(overfull, now))

    def tick(self, now: float) -> None:
        for group_id in self.groups.due(now):
            self._take(self.groups.close(group_id, now))

    def restart(self, now: float) -> None:
        self.groups = Groups(self._limit, DEADLINE)
        for group_id, state in self.remembered.items():
            members = {self._log[at].rollout_id: (_record(at), self._log[at]) for _, at in state.members}
            self.groups.restore(Group(group_id, now, members, state.given, state.missing))

    def _take(self, change: Change) -> None:
        if change.group is not None:
            self.given.append((change.group.group_id, sorted(change.group.members)))
        for group_id, state in change.remember.items():
            self.remembered.pop(group_id, None)
            if state is not None:
                self.remembered[group_id] = state


def _record(at: int) -> Record:
    return cast(Record, _Place(0, at))


@pytest.mark.parametrize("restarts", [False, True])
def test_members_two_deadlines_late_are_no_second_list(restarts: bool) -> None:
    log = Log()
    log.member("g", 0, 0)
    log.member("g", 1, 1)
    for now in (601, 1_202):
        log.tick(now)
        if restarts:
            log.restart(now)
    log.member("g", 2, 1_300)
    assert (log.groups.due(9_999), len(log.groups)) == ([], 0), "a group that was given is not open"
    log.member("g", 3, 1_301)
    log.tick(1_950)
    assert log.given == [("g", ["g0", "g1"])]
    assert log.groups.counts["late"] == 2
    assert log.remembered == {}, "all members came"


def test_of_those_given_the_oldest_are_let_go_of_where_there_is_no_room() -> None:
    log = Log(limit=3)
    for number, group_id in enumerate("abc"):
        log.member(group_id, 0, number)
        log.member(group_id, 1, number)
    log.tick(700)
    log.member("d", 0, 701)
    assert list(log.remembered) == ["b", "c", "d"]
    log.restart(702)
    log.member("b", 2, 703)
    log.member("e", 0, 704)
    assert len(log.remembered) == 3
    assert [group_id for group_id, _ in log.given] == ["a", "b", "c"]


def test_whatever_the_order_no_group_comes_out_twice() -> None:
    chance = random.Random(7)
    for _ in range(200):
        log = Log()
        members = [(group_id, number) for group_id in "abcdef" for number in range(4)]
        chance.shuffle(members)
        now = 0.0
        for group_id, number in members:
            now += chance.choice([1.0, 300.0, 2_000.0])
            log.tick(now)
            if chance.random() < 0.2:
                log.restart(now)
            log.member(group_id, number, now)
        log.tick(now + 9_999)
        names = [group_id for group_id, _ in log.given]
        assert len(names) == len(set(names)), log.given
        assert log.remembered == {} or all(state.given for state in log.remembered.values())
