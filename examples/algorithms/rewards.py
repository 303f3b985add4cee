"""A reward of one's own for the aggregator (aggregator.sources): function(attempt) gives a number.

[[aggregator.sources]]
name = "short"
function = "examples.algorithms.rewards:short_answer"
weight = 0.1
"""

from __future__ import annotations

from fulgurite.schemas.trajectories import FinishedAttempt

ENOUGH_TOKENS = 200


def short_answer(attempt: FinishedAttempt) -> float:
    """1 for an attempt that says little, falling to 0 at ENOUGH_TOKENS sampled tokens."""
    sampled = sum(sum(sequence.loss_mask) for sequence in attempt.sequences)
    return max(0.0, 1.0 - sampled / ENOUGH_TOKENS)
