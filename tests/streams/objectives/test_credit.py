"""Credit of tokens and calls, and what is done to rewards before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.streams.objectives.advantages import group_advantages
from fulgurite.streams.objectives.credit import (
    discounted_returns,
    rollout_level,
    span_advantages,
    span_level,
    span_returns,
)
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.objectives.rewards import keep_group, overlong_penalty

rewards_of_sequences = st.lists(st.lists(st.floats(-3, 3), max_size=20), min_size=1, max_size=6)


def test_every_token_of_a_rollout_gets_its_advantage() -> None:
    """Rollout 1 has two sequences: they share one advantage, also when it is summed over tokens."""
    sequences = Sequences.from_lengths(torch.tensor([2, 1, 3]))
    credit = rollout_level(torch.tensor([-1.0, 1.0]), torch.tensor([1, 0, 1]), sequences)
    assert credit.tolist() == [1.0, 1.0, -1.0, 1.0, 1.0, 1.0]


@settings(deadline=None)
@given(rewards_of_sequences, st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_returns_are_those_of_the_recursion(rewards: list[list[float]], discount: float) -> None:
    expected = [value for sequence in rewards for value in span_returns(sequence, discount)]
    sequences = Sequences.from_lengths(torch.tensor([len(sequence) for sequence in rewards]))
    flat = torch.tensor([value for sequence in rewards for value in sequence], dtype=torch.float64)
    assert discounted_returns(flat, sequences, discount).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_discount_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="discount"):
        discounted_returns(torch.ones(1), Sequences.from_lengths(torch.tensor([1])), 1.1)


def test_a_call_is_credited_with_what_it_led_to() -> None:
    assert span_returns([0.0, 1.0, 0.0], 0.5) == [0.5, 1.0, 0.0]
    assert span_returns([], 0.5) == []
    assert span_level(torch.tensor([0.5, -1.0]), torch.tensor([2, 1])).tolist() == [0.5, 0.5, -1.0]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_rollouts_of_one_call_have_their_groups_advantages(rewards: list[float]) -> None:
    assert [only for (only,) in span_advantages([[reward] for reward in rewards])] == group_advantages(rewards)


def test_calls_are_normalised_over_all_calls_of_the_group() -> None:
    found = span_advantages([[1.0, 0.0], [0.0, 0.0]])
    assert found == [[pytest.approx(1.5, abs=1e-5), pytest.approx(-0.5, abs=1e-5)], [pytest.approx(-0.5, abs=1e-5)] * 2]


@given(st.integers(0, 5000), st.integers(1, 1000), st.integers(0, 1000), st.floats(0, 2))
def test_the_overlong_penalty_falls_from_nothing_to_its_factor(
    length: int, buffer: int, room: int, factor: float
) -> None:
    longest = buffer + room
    penalty = overlong_penalty(length, max_length=longest, buffer=buffer, factor=factor)
    assert -factor <= penalty <= 0.0
    assert (penalty == 0.0) or length > room
    if length >= longest:
        assert penalty == -factor
    if room < length < longest:
        assert penalty == pytest.approx(-factor * (length - room) / buffer)


def test_an_overlong_buffer_longer_than_all_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(1, max_length=10, buffer=11)


def test_groups_that_can_teach_are_kept() -> None:
    assert keep_group([1.0, 0.0])
    assert not keep_group([0.3, 0.3])
    # Shaped rewards differ, but all answers are right: the paper leaves the group out.
    assert not keep_group([1.0, 0.5], correct=[True, True])
    assert not keep_group([0.0, 0.1], correct=[False, False])
    assert keep_group([1.0, 0.5], correct=[True, False])
