"""Windows: what a step gets, and that no rollout is lost or named twice, whatever happens to the groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer.run_state import RunState, member_lines, of_windows, restored
from fulgurite.streams.trainer.windows import (
    FILLED,
    MOST_REFILLS,
    MOST_STRANGERS,
    Choice,
    Member,
    Shape,
    Window,
    Windows,
)

SHAPE = Shape(run_id="r", group_size=3, groups_per_step=2, groups_ahead=4, max_staleness=2, group_deadline_seconds=10.0)
SECOND = 1_000_000_000


def member(group: int, index: int, reason: str = "", min_version: int = 5, reward: float = 0.0) -> Member:
    trajectory = Trajectory(
        rollout_id=f"r-g{group}-r{index}", run_id="r", group_id=f"r-g{group}", status="succeeded", reward=reward
    )
    return Member(trajectory, reason, min_version)


def stranger(rollout_id: str, group_id: str = "") -> Member:
    return Member(Trajectory(rollout_id=rollout_id, run_id="r", group_id=group_id, status="succeeded"))


def windows(asked: int = 4) -> Windows:
    return Windows(SHAPE, asked=asked)


def add_group(to: Windows, group: int, **fields: object) -> None:
    for index in range(3):
        to.add(member(group, index, **fields), 0)  # pyright: ignore[reportArgumentType]


def dropped(of: Windows | Window) -> dict[str, str]:
    return {d.rollout_id: d.reason for d in of.dropped}


def taken(w: Windows, version: int) -> Window | None:
    """The next window, trained on."""
    window = w.take(version)
    w.remember(version)
    return window


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
    assert w.groups_settled == 1


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
    assert w.groups_settled == 3


def test_duplicates_and_strangers() -> None:
    w = windows()
    w.add(member(0, 0), 0)
    w.add(member(0, 0), 0)
    assert w.duplicates == 1
    for rollout_id, group_id in (("x", ""), ("r-g0-r3", "r-g0"), ("r-g0-rx", "r-g0"), ("r-g99999-r0", "r-g99999")):
        w.add(stranger(rollout_id, group_id), 0)
    assert dropped(w) == {"x": "not_asked", "r-g0-r3": "not_asked", "r-g0-rx": "not_asked", "r-g99999-r0": "not_asked"}


def test_a_stranger_that_comes_twice_is_named_once() -> None:
    w = windows()
    for _ in range(2):
        w.add(stranger("stranger"), 0)
    assert [d.rollout_id for d in w.dropped] == ["stranger"]
    for group in range(4):
        add_group(w, group)
    first = taken(w, 5)
    assert first
    assert dropped(first) == {"stranger": "not_asked"}
    w.add(stranger("stranger"), 0)
    second = taken(w, 6)
    assert second
    assert second.dropped == [], "a step's record has named it"
    assert w.duplicates == 2


def test_what_is_remembered_of_strangers_is_bounded() -> None:
    w = windows()
    for number in range(MOST_STRANGERS + 1):
        w.add(stranger(f"s{number}"), 0)
    assert len(w.strangers) == MOST_STRANGERS
    w.add(stranger(f"s{MOST_STRANGERS}"), 0)
    w.add(stranger("s1"), 0)
    assert len(w.dropped) == MOST_STRANGERS + 1
    w.add(stranger("s0"), 0)
    assert len(w.dropped) == MOST_STRANGERS + 2, "forgotten, so named once more"


def test_a_rollout_that_was_asked_for_is_no_stranger_in_another_group() -> None:
    """It is named for what becomes of its own place."""
    w = windows(asked=1)
    w.add(stranger("r-g0-r1", "else"), 0)
    add_group(w, 0)
    w.add(stranger("r-g0-r2", "else"), 0)
    assert w.dropped == []
    assert [d.rollout_id for d in w.end()] == [f"r-g0-r{index}" for index in range(3)]


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


def test_incomplete_groups_are_masked_dropped_or_filled() -> None:
    """r-g0 has a failed member, r-g1 one that does not come."""
    found: dict[str, Window] = {}
    for policy in ("mask", "drop", "fill"):
        shape = replace(SHAPE, incomplete=policy, fill_reward=-1.0)
        w = Windows(shape, asked=4)
        for group in (0, 1, 2, 3):
            for index in range(3):
                failed = (group, index) == (0, 1)
                if (group, index) != (1, 2):
                    w.add(member(group, index, "failed" if failed else "", reward=0.5 * index), 0)
        w.close([1])
        window = w.take(5)
        assert window
        found[policy] = window
    assert ids(found["mask"].groups) == [["r-g0-r0", "r-g0-r2"], ["r-g1-r0", "r-g1-r1"]]
    assert found["mask"].groups_incomplete == 2
    assert ids(found["drop"].groups) == [[f"r-g{group}-r{index}" for index in range(3)] for group in (2, 3)]
    reasons = {d.rollout_id: d.reason for d in found["drop"].dropped}
    assert reasons == {
        "r-g1-r2": "deadline", "r-g0-r0": "incomplete", "r-g0-r1": "failed", "r-g0-r2": "incomplete",
        "r-g1-r0": "incomplete", "r-g1-r1": "incomplete",
    }  # fmt: skip
    filled = [[(m.trajectory.rollout_id, m.trajectory.reward, m.reason) for m in g] for g in found["fill"].groups]
    assert filled == [
        [("r-g0-r0", 0.0, ""), ("r-g0-r2", 1.0, ""), ("r-g0-r1", 0.5, "filled")],
        [("r-g1-r0", 0.0, ""), ("r-g1-r1", 0.5, ""), ("r-g1-r2", -1.0, "filled")],
    ]


def test_one_survivor_is_enough_where_the_others_are_filled_in() -> None:
    w = Windows(replace(SHAPE, incomplete="fill", groups_per_step=1), asked=1)
    for index in range(3):
        w.add(member(0, index, "failed" if index else ""), 0)
    window = w.take(5)
    assert window
    assert [m.reason for m in window.groups[0]] == ["", "filled", "filled"]
    assert [(d.rollout_id, d.reason) for d in window.dropped] == [("r-g0-r1", "failed"), ("r-g0-r2", "failed")]


def test_windows_slide_by_count_within_the_bound_on_staleness() -> None:
    w = Windows(replace(SHAPE, groups_per_step=1, overlap_groups=2), asked=6)
    for group in range(6):
        add_group(w, group, min_version=5 + group)
    seen: list[tuple[list[str], set[str]]] = []
    for version in range(5, 11):
        window = taken(w, version)
        assert window
        groups = [group[0].trajectory.group_id for group in window.groups]
        seen.append((groups, {rollout_id.rpartition("-")[0] for rollout_id in window.again}))
        assert window.dropped == []
    assert seen == [
        (["r-g0"], set()),
        (["r-g1", "r-g0"], {"r-g0"}),
        *(([f"r-g{n}", f"r-g{n - 2}", f"r-g{n - 1}"], {f"r-g{n - 2}", f"r-g{n - 1}"}) for n in range(2, 6)),
    ]
    assert w.take(13) is None
    add_group(w, 5)
    assert w.duplicates == 3, "it was trained on: what comes again does not count again"


@pytest.mark.parametrize("versions", [(5, 6, 7), (7, 6, 5), (6, 5, 6)])
def test_a_replay_slides_in_whatever_order_its_groups_were_selected(versions: tuple[int, ...]) -> None:
    shape = replace(SHAPE, groups_per_step=1, overlap_groups=1, group_size=2, replayed=True)
    w = Windows(shape)
    slid: list[set[str]] = []
    for group, version in enumerate(versions):
        members = [member(group, index, min_version=version) for index in range(2)]
        w.put(group, [replace(each, max_version=version) for each in members])
        window = taken(w, group + 1)
        assert window
        slid.append({rollout_id.rpartition("-")[0] for rollout_id in window.again})
    assert slid == [set(), {"r-g0"}, {"r-g1"}]


def test_groups_of_a_window_that_was_not_trained_on_are_in_no_later_one() -> None:
    w = Windows(replace(SHAPE, groups_per_step=1, overlap_groups=2), asked=4)
    for group in range(4):
        add_group(w, group)
    assert w.take(5)  # its step was refused: nobody says remember
    second, third = taken(w, 5), taken(w, 5)
    assert second
    assert third
    assert [group[0].trajectory.group_id for group in second.groups] == ["r-g1"]
    assert [group[0].trajectory.group_id for group in third.groups] == ["r-g2", "r-g1"]
    w.recent.clear()
    assert w.take(5)
    w.remember(5, ["r-g3-r1"])  # one of several updates was
    assert w.recent == []


def test_what_is_filled_in_counts_in_later_windows_too() -> None:
    w = Windows(replace(SHAPE, groups_per_step=1, overlap_groups=1, incomplete="fill", fill_reward=-1.0), asked=2)
    for group, failed in ((0, (1, 2)), (1, ())):
        for index in range(3):
            w.add(member(group, index, "failed" if index in failed else "", reward=float(index)), 0)
    first, second = taken(w, 5), taken(w, 5)
    assert first
    assert second
    assert second.groups[1] == first.groups[0], "the same comparison, and the only survivor still has one"
    assert [m.reason for m in second.groups[1]] == ["", "filled", "filled"]
    assert second.dropped == []


def test_groups_without_a_signal_are_replaced_within_a_bound() -> None:
    w = Windows(replace(SHAPE, groups_per_step=1, refill=True), asked=30)
    for group in range(MOST_REFILLS + 2):
        add_group(w, group, reward=1.0)
    window = w.take(5)
    assert window
    assert [group[0].trajectory.group_id for group in window.groups] == [f"r-g{MOST_REFILLS}"], "enough of asking"
    assert w.groups_settled == MOST_REFILLS + 1
    assert {d.reason for d in window.dropped} == {"zero_variance"}
    for index in range(3):
        w.add(member(20, index, reward=float(index)), 0)
    window = w.take(5)
    assert window
    assert [group[0].trajectory.group_id for group in window.groups] == ["r-g20"]
    assert w.groups_settled == MOST_REFILLS + 3


def test_rewards_that_differ_by_rounding_alone_are_no_signal() -> None:
    """As training counts it: else the window would have nothing to train on."""
    w = Windows(replace(SHAPE, groups_per_step=1, refill=True), asked=30)
    for index, reward in enumerate((0.3, 0.1 + 0.2, 0.3)):
        w.add(member(0, index, reward=reward), 0)
        w.add(member(1, index, reward=float(index)), 0)
    window = w.take(5)
    assert window
    assert [group[0].trajectory.group_id for group in window.groups] == ["r-g1"]
    assert {d.reason for d in window.dropped} == {"zero_variance"}


def test_a_window_that_was_taken_before_a_crash_is_taken_again() -> None:
    w = windows()
    add_group(w, 2)
    w.add(member(3, 0), 0)
    w.add(member(3, 2), 0)
    w.close([3])
    before = w.take(5)
    assert before
    after = windows()
    after.choice = before.choice
    for group in (0, 1, 2):  # what came too late then is first in line now
        add_group(after, group)
    assert after.take(5) is None, "a member that was there is not here yet"
    for index in (0, 1, 2):
        after.add(member(3, index), 0)
    again = after.take(5)
    assert again
    assert ids(again.groups) == ids(before.groups) == [["r-g2-r0", "r-g2-r1", "r-g2-r2"], ["r-g3-r0", "r-g3-r2"]]
    assert dropped(before) == dropped(again) == {"r-g3-r1": "deadline"}
    following = after.take(5)
    assert following
    assert [group[0].trajectory.group_id for group in following.groups] == ["r-g0", "r-g1"]


def test_a_choice_has_the_groups_that_the_bound_of_replacing_left_in_it() -> None:
    shape = replace(SHAPE, groups_per_step=2, groups_ahead=40, refill=True)
    last = 2 * MOST_REFILLS
    before = Windows(shape, asked=40)
    for group in (*range(1, last), 0, last, last + 1):
        add_group(before, group, reward=1.0)
        if window := before.take(5):
            break
    else:
        raise AssertionError("no window")
    after = Windows(shape, asked=40)
    after.choice = window.choice
    for group in range(last + 2):
        add_group(after, group, reward=1.0)
    for group, index in ((30, 0), (30, 1), (30, 2), (31, 0), (31, 1), (31, 2)):  # what came after the crash
        after.add(member(group, index, reward=float(index)), 0)
    again = after.take(5)
    assert again
    assert ids(again.groups) == ids(window.groups)


def test_a_version_that_does_not_exist_yet_is_not_trained_on() -> None:
    w = windows()
    for group in (0, 1):
        for index in range(3):
            made_up = index == 1 and group == 1
            w.add(replace(member(group, index), max_version=6 if made_up else 5), 0)
    window = w.take(5)
    assert window
    assert dropped(window) == {"r-g1-r1": "unknown_version"}


def test_the_deadline_counts_from_a_record_that_says_no_more_than_its_group() -> None:
    w = windows()
    for group_id in ("r-g1", "r-g9", "r-g01", "r-g-1", "r-g", "other-g0", "r"):
        w.expect(group_id, 0)
    assert w.deadline_due(10 * SECOND) == [1]
    w.close([1])
    assert w.take(5) is None
    assert dropped(w) == {f"r-g1-r{index}": "deadline" for index in range(3)}
    assert w.groups_settled == 1, "pacing asks for another"


def test_a_choice_that_cannot_be_taken_any_more_is_forgotten() -> None:
    for choice in (Choice(4, {2: ["r-g2-r0"]}), Choice(5, {2: ["r-g2-r0"]})):
        w = windows()
        w.choice = choice
        w.add(member(2, 1), 0)
        w.close([2])
        add_group(w, 0)
        add_group(w, 1)
        window = w.take(5)
        assert window
        assert [group[0].trajectory.group_id for group in window.groups] == ["r-g0", "r-g1"]


def test_windows_slide_by_time() -> None:
    w = Windows(replace(SHAPE, groups_per_step=1, overlap_groups=9, overlap_seconds=2.5), asked=5)
    for group in range(5):
        for index in range(3):
            one = member(group, index)
            at = one.trajectory.model_copy(update={"assembled_ns": group * SECOND})
            w.add(Member(at, "", 5), 0)
    windows_found = [taken(w, 5) for _ in range(5)]
    assert [[group[0].trajectory.group_id for group in window.groups] for window in windows_found if window] == [
        ["r-g0"], ["r-g1", "r-g0"], ["r-g2", "r-g0", "r-g1"], ["r-g3", "r-g1", "r-g2"], ["r-g4", "r-g2", "r-g3"],
    ]  # fmt: skip


def test_a_window_closed_by_time_has_what_is_there_and_pacing_knows() -> None:
    w = windows()
    add_group(w, 0)
    assert w.take(5) is None
    assert w.waiting == (0,)
    window = w.take(5, least=1)
    assert window
    assert len(window.groups) == 1
    assert w.groups_settled == 1


def test_in_a_replay_the_sources_ledger_closes_groups_and_this_run_judges_them() -> None:
    w = Windows(replace(SHAPE, replayed=True))
    for group, index in ((7, 0), (7, 1), (3, 2), (3, 0), (3, 1), (5, 0), (5, 1)):
        w.add(member(group, index, min_version=4), 0)
    assert w.take(90) is None, "complete, but not settled by the source"
    # What the source dropped as stale or trained on is ours to judge; its deadline is not.
    decided = {"r-g7-r0": "", "r-g7-r1": "", "r-g7-r2": "deadline", "r-g3-r0": "stale", "r-g3-r1": "stale"}
    assert w.settle({**decided, "r-g3-r2": "stale", "stranger": "not_asked"}, version=6) == 0
    window = w.take(90)
    assert window
    assert ids(window.groups) == [["r-g3-r0", "r-g3-r1", "r-g3-r2"], ["r-g7-r0", "r-g7-r1"]]
    assert set(window.measured_at.values()) == {6}, "ages are those of the source, not 90 versions"
    assert [(d.rollout_id, d.reason) for d in window.dropped] == [("r-g7-r2", "deadline")]
    w.add(member(7, 2), 0)
    assert w.late == 1
    assert {d.rollout_id: d.reason for d in w.end()} == {"r-g5-r0": "run_ended", "r-g5-r1": "run_ended"}


@pytest.mark.parametrize("is_there", [True, False])
def test_in_a_replay_a_record_that_is_there_twice_makes_no_member_of_who_was_left_out(is_there: bool) -> None:
    """The source had named it before its group was in a window: its copy comes between the two records."""
    w = Windows(replace(SHAPE, replayed=True, groups_per_step=1))
    for index in range(3 if is_there else 2):
        w.add(member(0, index), 0)
    w.settle({"r-g0-r2": "deadline"}, version=1)
    state = RunState(run_id="x", resource="x", version=1, step=1, offsets={}, **of_windows(w))
    lines = [line.model_dump_json() for line in member_lines(w)]
    w = restored(RunState.model_validate_json(state.model_dump_json()), lines, w.shape, 0)
    for _ in range(2):
        w.add(member(0, 2), 0)
    w.settle({"r-g0-r0": "", "r-g0-r1": ""}, version=1)
    window = w.take(1)
    assert window
    assert ids(window.groups) == [["r-g0-r0", "r-g0-r1"]]
    assert dropped(window) == {"r-g0-r2": "deadline"}
    assert (w.late, w.duplicates) == ((0, 2) if is_there else (1, 1))


def test_age_within_a_group_is_that_of_the_tokens_that_are_trained_on() -> None:
    """Neither the versions of this run, nor those of other policies in the same rollouts."""
    aged = [replace(member(0, index, min_version=version), max_version=version) for index, version in ((0, 4), (1, 9))]
    other = replace(member(0, 2, "wrong_model"), max_version=500)
    selected = Windows(replace(SHAPE, replayed=True, groups_per_step=1, max_staleness=5))
    selected.put(0, [*aged, other])
    settled = Windows(selected.shape)
    for each in (*aged, other):
        settled.add(each, 0)
    settled.settle(dict.fromkeys(("r-g0-r0", "r-g0-r1", "r-g0-r2"), ""), version=90, within_groups=True)
    for w in (selected, settled):
        window = w.take(40)
        assert window
        assert window.measured_at == {"r-g0-r0": 9, "r-g0-r1": 9}
        assert dropped(window) == {"r-g0-r2": "wrong_model"}


def test_in_a_replay_groups_that_begin_before_it_are_left_out_whole() -> None:
    w = Windows(replace(SHAPE, replayed=True, max_staleness=1))
    w.add(member(0, 2), 0)
    for index in range(3):
        w.add(member(1, index, min_version=5 - index), 0)
    cut = w.settle({f"r-g{group}-r{index}": "" for group in (0, 1, 2) for index in range(3)}, version=5)
    assert cut == 2, "of group 0 something is missing, of group 2 everything"
    assert w.take(9, least=1) is not None
    found = w.take(9, least=1)
    assert found is None
    assert w.settled_below == 3
    w.add(member(0, 1), 0)
    assert w.duplicates == 1


happening = st.tuples(
    st.integers(0, 5), st.integers(0, 2), st.sampled_from(["", "", "", "failed"]), st.integers(0, 6), st.booleans()
)


@settings(deadline=None, max_examples=300)
@given(st.lists(happening, max_size=60), st.sampled_from(["mask", "drop", "fill"]), st.integers(0, 3))
def test_every_rollout_comes_out_exactly_once(
    happenings: list[tuple[int, int, str, int, bool]], incomplete: Literal["mask", "drop", "fill"], overlap: int
) -> None:
    w = Windows(replace(SHAPE, incomplete=incomplete, overlap_groups=overlap), asked=6)
    version, found = 4, list[str]()
    for group, index, reason, min_version, closes in happenings:
        w.add(member(group, index, reason, min_version), 0)
        if closes and group in w.groups:
            w.close([group])
        window = taken(w, version)
        if window:
            version += 1
            survivors = [[m for m in g if m.reason != FILLED] for g in window.groups]
            assert SHAPE.groups_per_step <= len(window.groups) <= SHAPE.groups_per_step + overlap
            assert all((1 if incomplete == "fill" else 2) <= len(g) <= 3 for g in survivors)
            assert all(len(g) == 3 for g in survivors) or incomplete != "drop" or window.again
            assert all(window.version_in - m.min_version <= SHAPE.max_staleness for g in survivors for m in g)
            ids_in = [m.trajectory.rollout_id for g in survivors for m in g]
            assert len(ids_in) == len(set(ids_in)), "in one window twice"
            assert {i for i in ids_in if i in window.again} <= set(found), "again before it was named"
            found += [i for i in ids_in if i not in window.again]
            found += [d.rollout_id for d in window.dropped]
    found += [d.rollout_id for d in w.end()]
    assert sorted(found) == sorted(f"r-g{g}-r{i}" for g in range(6) for i in range(3))
