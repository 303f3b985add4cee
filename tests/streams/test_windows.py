"""Windows: what a step gets, and that no rollout is lost or named twice, whatever happens to the groups."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer.windows import Member, Shape, Windows

SHAPE = Shape(run_id="r", group_size=3, groups_per_step=2, groups_ahead=4, max_staleness=2, group_deadline_seconds=10.0)
SECOND = 1_000_000_000


def member(group: int, index: int, reason: str = "", min_version: int = 5, reward: float = 0.0) -> Member:
    trajectory = Trajectory(
        rollout_id=f"r-g{group}-r{index}", run_id="r", group_id=f"r-g{group}", status="succeeded", reward=reward
    )
    return Member(trajectory, reason, min_version)


def windows(asked: int = 4) -> Windows:
    return Windows(SHAPE, asked=asked)


def add_group(to: Windows, group: int, **fields: object) -> None:
    for index in range(3):
        to.add(member(group, index, **fields), 0)  # pyright: ignore[reportArgumentType]


def dropped(of: Windows) -> dict[str, str]:
    return {d.rollout_id: d.reason for d in of.dropped}


def ids(groups: list[list[Member]]) -> list[list[str]]:
    return [[m.trajectory.rollout_id for m in group] for group in groups]


def test_a_window_is_the_oldest_complete_groups_whatever_order_they_came_in() -> None:
    w = windows()
    for group in (3, 1, 2):
        for index in (2, 0, 1):
            w.add(member(group, index), 0)
    window = w.take(5)
    assert window
    assert ids(window.groups) == [[f"r-g{g}-r{i}" for i in range(3)] for g in (1, 2)]
    assert w.take(5) is None
    assert w.outstanding() == ["r-g0-r0", "r-g0-r1", "r-g0-r2"]


def test_members_without_data_complete_a_group_and_are_dropped_with_their_reason() -> None:
    w = windows()
    add_group(w, 0)
    w.add(member(1, 0), 0)
    w.add(member(1, 1, "failed"), 0)
    assert w.take(5) is None
    w.add(member(1, 2), 0)
    window = w.take(5)
    assert window
    assert ids(window.groups)[1] == ["r-g1-r0", "r-g1-r2"]
    assert [(d.rollout_id, d.reason) for d in window.dropped] == [("r-g1-r1", "failed")]


def test_deadline_closes_with_two_survivors_and_the_late_one_is_counted_not_used() -> None:
    w = windows()
    add_group(w, 0)
    w.add(member(1, 0), 0)
    w.add(member(1, 2), 9 * SECOND)
    assert w.deadline_due(9 * SECOND) == []
    assert w.deadline_due(10 * SECOND) == [1]
    w.close(w.deadline_due(10 * SECOND))
    window = w.take(5)
    assert window
    assert ids(window.groups)[1] == ["r-g1-r0", "r-g1-r2"]
    assert [(d.rollout_id, d.reason) for d in window.dropped] == [("r-g1-r1", "deadline")]
    assert "r-g1-r1" in w.outstanding()
    w.add(member(1, 1), 11 * SECOND)
    assert w.late == 1
    assert w.dropped == []
    assert "r-g1-r1" not in w.outstanding()


def test_a_group_with_one_survivor_is_dropped_whole_and_counted_for_pacing() -> None:
    w = windows()
    w.add(member(0, 0), 0)
    w.add(member(0, 1, "failed"), 0)
    w.close([0])
    assert w.take(5) is None
    assert dropped(w) == {"r-g0-r2": "deadline", "r-g0-r0": "too_few", "r-g0-r1": "failed"}
    assert w.groups_dropped == 1


def test_stale_rollouts_are_dropped_when_the_version_has_moved_on() -> None:
    w = windows()
    add_group(w, 0, min_version=5)
    assert w.take(7) is None
    add_group(w, 1, min_version=8)
    add_group(w, 2, min_version=6)
    window = w.take(8)  # group 0 is 3 behind, group 2 is 2 behind: the bound is 2
    assert window
    assert ids(window.groups) == [[f"r-g{g}-r{i}" for i in range(3)] for g in (1, 2)]
    assert {d.reason for d in window.dropped} == {"stale"}
    assert w.groups_dropped == 1


def test_duplicates_and_strangers() -> None:
    w = windows()
    w.add(member(0, 0), 0)
    w.add(member(0, 0), 0)
    assert w.duplicates == 1
    for rollout_id, group_id in (("x", ""), ("r-g0-r3", "r-g0"), ("r-g0-rx", "r-g0"), ("r-g99999-r0", "r-g99999")):
        stranger = Trajectory(rollout_id=rollout_id, run_id="r", group_id=group_id, status="succeeded")
        w.add(Member(stranger), 0)
    assert dropped(w) == {"x": "not_asked", "r-g0-r3": "not_asked", "r-g0-rx": "not_asked", "r-g99999-r0": "not_asked"}


def test_a_group_not_asked_for_as_far_as_we_know_is_taken_in_but_never_moves_pacing() -> None:
    w = windows(asked=4)
    add_group(w, 7)  # the furthest that an earlier life can have asked for
    w.add(member(8, 0), 0)
    assert dropped(w) == {"r-g8-r0": "not_asked"}
    assert w.asked == 4, "groups 4 to 6 would never be asked for"
    add_group(w, 0)
    window = w.take(5)
    assert window
    assert [group[0].trajectory.group_id for group in window.groups] == ["r-g0", "r-g7"]
    w.add(member(6, 0), 0)
    assert {d.rollout_id: d.reason for d in w.end()} == {
        f"r-g{group}-r{index}": "run_ended" for group in (1, 2, 3) for index in range(3)
    } | {"r-g6-r0": "run_ended"}


def test_the_end_names_everything_that_is_left_once() -> None:
    w = windows(asked=3)
    w.add(member(0, 0), 0)
    w.add(member(0, 1), 0)
    w.close([0])
    w.add(member(1, 0, "failed"), 0)
    assert {d.rollout_id: d.reason for d in w.end()} == {
        "r-g0-r0": "run_ended", "r-g0-r1": "run_ended", "r-g0-r2": "deadline",
        "r-g1-r0": "failed", "r-g1-r1": "run_ended", "r-g1-r2": "run_ended",
        "r-g2-r0": "run_ended", "r-g2-r1": "run_ended", "r-g2-r2": "run_ended",
    }  # fmt: skip
    assert w.end() == []


happening = st.tuples(
    st.integers(0, 5), st.integers(0, 2), st.sampled_from(["", "", "", "failed"]), st.integers(0, 6), st.booleans()
)


@settings(deadline=None, max_examples=300)
@given(st.lists(happening, max_size=60))
def test_every_rollout_comes_out_exactly_once(happenings: list[tuple[int, int, str, int, bool]]) -> None:
    w = windows(asked=6)
    version, found = 4, list[str]()
    for group, index, reason, min_version, closes in happenings:
        w.add(member(group, index, reason, min_version), 0)
        if closes and group in w.groups:
            w.close([group])
        window = w.take(version)
        if window:
            version += 1
            assert len(window.groups) == SHAPE.groups_per_step
            assert all(2 <= len(g) <= 3 for g in window.groups)
            assert all(window.version_in - m.min_version <= SHAPE.max_staleness for g in window.groups for m in g)
            found += [m.trajectory.rollout_id for g in window.groups for m in g]
            found += [d.rollout_id for d in window.dropped]
    found += [d.rollout_id for d in w.end()]
    assert sorted(found) == sorted(f"r-g{g}-r{i}" for g in range(6) for i in range(3))
