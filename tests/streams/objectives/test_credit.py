"""What calls led to, and what is done to rewards before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.streams.objectives.credit import span_returns
from fulgurite.streams.objectives.rewards import overlong_penalty, penalised_rewards


def test_a_call_is_credited_with_what_it_led_to() -> None:
    assert span_returns([0.0, 1.0, 0.0], 0.5) == [0.5, 1.0, 0.0]
    assert span_returns([], 0.5) == []


@given(st.lists(st.floats(-3, 3), max_size=20), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_returns_are_sums_of_what_follows_by_its_distance(rewards: list[float], discount: float) -> None:
    expected = [sum(r * discount**k for k, r in enumerate(rewards[at:])) for at in range(len(rewards))]
    assert span_returns(rewards, discount) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_call_pays_for_its_own_divergence() -> None:
    assert penalised_rewards([1.0, 7.0, 3.0], [1.5, 0.0, -2.0], 0.1) == pytest.approx([0.85, 7.0, 3.2])
    with pytest.raises(ValueError, match="zip"):
        penalised_rewards([1.0], [], 0.1)


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
