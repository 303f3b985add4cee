"""Advantages of rollouts from their rewards: how much better each was than its baseline. Pure, no torch.

    group_normalised              (r_i - mean(group)) / (std(group) + EPS)              GRPO, arXiv:2402.03300
    mean_centred                   r_i - mean(group)                                    Dr. GRPO, arXiv:2503.20783
    leave_one_out                  r_i - mean(the others of the group)                  RLOO, arXiv:2402.14740
    batch_normalised              (r_i - mean(window)) / std(window)                    REINFORCE++, arXiv:2501.03262
    one                            1, whatever the reward: imitation
    group_mean_batch_normalised   first - mean(group), then normalised over the window  the same, with its baseline

One number per *rollout*: mean and deviation are taken over rollouts, then the number is broadcast to the rollout's
sequences and tokens (trainer/sample.py), so that a rollout with more turns does not weigh more in its group's baseline.
(TRL and SkyRL take every sequence as a member of its own; so does verl, but for GRPO in its newest trainer.)

Where libraries differ.
- *Deviation*: unbiased (n - 1) everywhere for groups. EPS is 1e-6 in verl and SkyRL, 1e-4 in TRL and ms-swift, 1e-9 in
  OpenRLHF, 1e-5 in AReaL. Here 1e-6: rewards are of size 1, and a larger one quietly shrinks small differences.
- *A group of one*: GRPO: verl and SkyRL give it its raw reward, TRL and ms-swift 0, OpenRLHF NaN. RLOO: verl its raw
  reward, SkyRL, TRL and ms-swift 0, OpenRLHF a division by zero. Here it is an error: it has no baseline, and a window
  never lets one through.
- *Equal rewards*: 0 everywhere; here also where they differ by float noise only (at most EPS), which others divide by.
- *Over the window*: verl, SkyRL and OpenRLHF take mean and deviation over tokens, so that a long rollout counts more;
  ms-swift over sequences. Here over tokens. The variance is unbiased in verl and SkyRL, biased in OpenRLHF; its floor
  is added in verl (1e-8), a clamp in OpenRLHF. Here verl's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

EPS = 1e-6
"""Keeps the division finite; also the deviation below which a group is said to have none (float noise, not signal)."""

VARIANCE_FLOOR = 1e-8
"""Added to the window's variance."""

Groups = Sequence[Sequence[float]]
"""[groups][rollouts] of a window."""


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation of n >= 2 values; the deviation of fewer is 0."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance)


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards differ: otherwise every advantage is 0 and nothing can be learned from it."""
    return mean_and_std(rewards)[1] > EPS


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """[G] rewards of one group's rollouts -> [G] advantages; all 0.0 where the rewards do not differ.

    >>> [round(a, 3) for a in group_advantages([1.0, 0.0, 0.0, 1.0])]
    [0.866, -0.866, -0.866, 0.866]
    """
    _refuse_small(rewards)
    mean, std = mean_and_std(rewards)
    if std <= EPS:
        return [0.0] * len(rewards)
    return [(reward - mean) / (std + EPS) for reward in rewards]


def mean_centred(rewards: Sequence[float]) -> list[float]:
    """[G] -> [G]: the difference from the group's mean, not divided: hard and easy tasks keep their size.

    >>> mean_centred([1.0, 0.0])
    [0.5, -0.5]
    """
    _refuse_small(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """[G] -> [G]: the difference from the mean of the others, an unbiased baseline; G/(G-1) times `mean_centred`.

    >>> leave_one_out([1.0, 0.0, 0.0])
    [1.0, -0.5, -0.5]
    """
    _refuse_small(rewards)
    total = math.fsum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def batch_normalised(values: Groups, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    """values [groups][rollouts] -> the same shape, with mean 0 and deviation 1 over all sampled tokens of the window.

    tokens, of the same shape: how many tokens each rollout has, over which its value is broadcast. A window of a single
    token is its own mean: 0.
    """
    flat = [value for group in values for value in group]
    counts = [count for group in tokens for count in group]
    total = sum(counts)
    if len(flat) != len(counts) or total < 1:
        raise ValueError(f"{len(flat)} values for {len(counts)} rollouts of {total} tokens: nothing to normalise over")
    mean = math.fsum(value * count for value, count in zip(flat, counts, strict=True)) / total
    squares = math.fsum((value - mean) ** 2 * count for value, count in zip(flat, counts, strict=True))
    scale = 1.0 / math.sqrt(squares / max(total - 1, 1) + VARIANCE_FLOOR)
    return [[(value - mean) * scale for value in group] for group in values]


def _refuse_small(rewards: Sequence[float]) -> None:
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has no baseline: advantages need at least two rollouts")


def _by_group(of_group: Callable[[Sequence[float]], list[float]]) -> Estimator:
    return lambda rewards, tokens: [of_group(group) for group in rewards]


Estimator = Callable[[Groups, Sequence[Sequence[int]]], list[list[float]]]
"""(rewards, sampled tokens) of a window's rollouts, both [groups][rollouts] -> advantages of the same shape."""

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "group_normalised": _by_group(group_advantages),
        "mean_centred": _by_group(mean_centred),
        "leave_one_out": _by_group(leave_one_out),
        "batch_normalised": batch_normalised,
        "group_mean_batch_normalised": lambda rewards, tokens: batch_normalised(
            [mean_centred(group) for group in rewards], tokens
        ),
        "one": lambda rewards, tokens: [[1.0] * len(group) for group in rewards],
    }
)

OVER_WINDOW = frozenset({"batch_normalised", "group_mean_batch_normalised"})
"""The estimators in which a rollout's advantage depends on other groups, too."""

WITHOUT_GROUP = frozenset({"batch_normalised"})
"""Those in which a group whose rewards are all the same has an advantage: better or worse than the window's mean."""

BY_TOKEN = frozenset({"batch_normalised"})
"""Those that with KL in the reward normalise what each token led to (credit.py), as REINFORCE++ is published and verl,
OpenRLHF and SkyRL have it. The others compare rollouts or calls, each with the sum of its tokens' penalties."""
