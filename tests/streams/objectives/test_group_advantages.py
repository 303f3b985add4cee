"""The advantages of a group, against numpy and by hand."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.streams.objectives.advantages import EPS, group_advantages, has_signal, mean_and_std

rewards = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=32)


def test_by_hand() -> None:
    # mean 1/4, unbiased variance (9 + 3)/16 / 3 = 1/4, deviation 1/2
    assert group_advantages([1, 0, 0, 0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_equal_rewards_have_no_advantage_and_no_signal() -> None:
    assert group_advantages([0.7, 0.7, 0.7]) == [0.0, 0.0, 0.0]
    assert not has_signal([0.7, 0.7])
    # Float noise is not a signal that may be blown up to size 1.
    assert group_advantages([0.1 + 0.2, 0.3]) == [0.0, 0.0]
    assert has_signal([0.0, 1.0])


def test_a_group_of_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least two"):
        group_advantages([1.0])


@given(rewards)
def test_agrees_with_numpy(values: list[float]) -> None:
    mean, std = mean_and_std(values)
    assert mean == pytest.approx(numpy.mean(values), rel=1e-9, abs=1e-9)
    assert std == pytest.approx(numpy.std(values, ddof=1), rel=1e-6, abs=1e-6)
    if has_signal(values):
        expected = (numpy.array(values) - numpy.mean(values)) / (numpy.std(values, ddof=1) + EPS)
        assert group_advantages(values) == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


@given(rewards, st.floats(-10, 10), st.floats(0.5, 100))
def test_centred_and_invariant_to_shift_and_scale(values: list[float], shift: float, scale: float) -> None:
    advantages = group_advantages(values)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-4)
    if mean_and_std(values)[1] > 0.1:
        moved = group_advantages([scale * value + shift for value in values])
        assert moved == pytest.approx(advantages, abs=1e-3)


@given(rewards)
def test_the_order_of_members_does_not_matter(values: list[float]) -> None:
    reversed_ = group_advantages(values[::-1])[::-1]
    assert reversed_ == pytest.approx(group_advantages(values), abs=1e-9)
