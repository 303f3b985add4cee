"""Advantages: by hand where libraries disagree, and what holds between estimators."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fulgurite.streams.objectives.advantages import (
    EPS,
    ESTIMATORS,
    batch_normalised,
    group_advantages,
    leave_one_out,
    mean_centred,
)

reward = st.floats(-100, 100).map(lambda x: round(x, 3))
group = st.lists(reward, min_size=2, max_size=9)
window = st.lists(group, min_size=1, max_size=5)


def flat(groups: list[list[float]]) -> list[float]:
    return [value for group in groups for value in group]


def ones(groups: list[list[float]]) -> list[list[int]]:
    return [[1] * len(group) for group in groups]


def test_by_hand() -> None:
    rewards = [[1.0, 0.0, 0.0, 0.0], [2.0, 4.0]]
    tokens = ones(rewards)

    def of(name: str) -> list[list[float]]:
        return ESTIMATORS[name](rewards, tokens)

    assert of("mean_centred") == [[0.75, -0.25, -0.25, -0.25], [-1.0, 1.0]]
    assert of("leave_one_out")[0] == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert of("leave_one_out")[1] == pytest.approx([-2.0, 2.0])
    assert of("group_normalised")[0] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    # mean 7/6, sum of squares 21 - 49/6 = 77/6
    scale = math.sqrt(77 / 6 / 5)
    assert flat(of("batch_normalised")) == pytest.approx([(r - 7 / 6) / scale for r in flat(rewards)], abs=1e-6)
    # centred by group: squares 0.75 + 2
    scale = math.sqrt(2.75 / 5)
    assert flat(of("group_mean_batch_normalised"))[4:] == pytest.approx([-1 / scale, 1 / scale], abs=1e-6)


def test_epsilon_is_small_against_small_differences() -> None:
    """TRL's 1e-4 takes a third off rewards that differ by 4e-4; 1e-6 takes less than a percent."""
    small = [0.0, 4e-4]
    deviation = 2e-4 * math.sqrt(2)
    assert group_advantages(small)[1] == pytest.approx(2e-4 / (deviation + EPS))
    assert group_advantages(small)[1] == pytest.approx(math.sqrt(0.5), rel=0.01)
    assert 2e-4 / (deviation + 1e-4) == pytest.approx(0.522, abs=1e-3)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"batch_normalised", "one"}))
def test_a_group_of_one_is_an_error(name: str) -> None:
    """verl gives it its raw reward, TRL and SkyRL 0, OpenRLHF NaN."""
    with pytest.raises(ValueError, match="at least two"):
        ESTIMATORS[name]([[1.0, 0.0], [5.0]], [[1, 1], [1]])


def test_only_the_batch_is_a_baseline_for_a_group_of_one() -> None:
    assert flat(batch_normalised([[0.0], [1.0]], [[1], [1]])) == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    with pytest.raises(ValueError, match="nothing to normalise"):
        batch_normalised([[1.0]], [[0]])


def test_a_window_of_one_token_does_not_end_the_run() -> None:
    """One survivor that said one token, and members filled in, which have none."""
    (first, *_) = flat(batch_normalised([[5.0, 0.0, 0.0]], [[1, 0, 0]]))
    assert first == 0.0
    assert flat(batch_normalised([[5.0]], [[1]])) == [0.0]


@given(window)
def test_leave_one_out_is_the_centred_times_g_over_g_minus_one(groups: list[list[float]]) -> None:
    for rewards in groups:
        size = len(rewards)
        expected = [value * size / (size - 1) for value in mean_centred(rewards)]
        assert leave_one_out(rewards) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(window)
def test_group_baselines_add_up_to_nothing_in_every_group(groups: list[list[float]]) -> None:
    for name in ("group_normalised", "mean_centred", "leave_one_out"):
        for advantages in ESTIMATORS[name](groups, ones(groups)):
            assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-6)


@given(window, st.data())
def test_over_the_window_tokens_have_mean_zero_and_deviation_one(
    groups: list[list[float]], data: st.DataObject
) -> None:
    counts = [[data.draw(st.integers(1, 50)) for _ in rewards] for rewards in groups]
    spread = flat(groups)
    assume(max(spread) - min(spread) > 0.01)
    advantages = flat(batch_normalised(groups, counts))
    weights = [count for group in counts for count in group]
    total = sum(weights)
    assert math.fsum(a * w for a, w in zip(advantages, weights, strict=True)) / total == pytest.approx(0, abs=1e-6)
    squares = math.fsum(a * a * w for a, w in zip(advantages, weights, strict=True))
    assert squares / (total - 1) == pytest.approx(1.0, rel=2e-2)


def test_a_long_rollout_counts_more_in_the_windows_mean() -> None:
    """As in verl and OpenRLHF; ms-swift counts each rollout once."""
    short, long = flat(batch_normalised([[1.0, 0.0]], [[1, 9]]))
    assert abs(short) > abs(long)
    assert short * 1 + long * 9 == pytest.approx(0.0, abs=1e-6)


@given(window, st.floats(-5, 5), st.sampled_from(sorted(ESTIMATORS)))
def test_a_constant_added_to_all_rewards_changes_nothing(groups: list[list[float]], shift: float, name: str) -> None:
    spread = flat(groups)
    assume(max(spread) - min(spread) > 1.0)
    assume(all(max(rewards) - min(rewards) > 1.0 for rewards in groups))
    moved = [[value + shift for value in rewards] for rewards in groups]
    assert flat(ESTIMATORS[name](moved, ones(groups))) == pytest.approx(
        flat(ESTIMATORS[name](groups, ones(groups))), rel=1e-6, abs=1e-6
    )
