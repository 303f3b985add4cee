"""Group-normalised advantages: how much better a rollout was than the others of its task. Pure, no torch.

    A_i = (r_i - mean(r)) / (std(r) + EPS)          GRPO, arXiv:2402.03300

The standard deviation is the unbiased one (n - 1) and EPS is verl's 1e-6 (TRL adds 1e-4). One number per *rollout*:
mean and deviation are taken over rollouts, then the number is broadcast to the rollout's sequences, so that a rollout
with more turns does not weigh more in its group's baseline. A group of one has no baseline: verl gives it its raw
reward, TRL gives it 0; here it is an error, since a window never lets one through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPS = 1e-6
"""Keeps the division finite; also the deviation below which a group is said to have none (float noise, not signal)."""


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation of n >= 2 values; the deviation of fewer is 0."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance)


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """[G] rewards of one group's rollouts -> [G] advantages; all 0.0 where the rewards do not differ.

    >>> [round(a, 3) for a in group_advantages([1.0, 0.0, 0.0, 1.0])]
    [0.866, -0.866, -0.866, 0.866]
    """
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has no baseline: advantages need at least two rollouts")
    mean, std = mean_and_std(rewards)
    if std <= EPS:
        return [0.0] * len(rewards)
    return [(reward - mean) / (std + EPS) for reward in rewards]


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards differ: otherwise every advantage is 0 and nothing can be learned from it."""
    return mean_and_std(rewards)[1] > EPS
