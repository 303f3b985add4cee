"""What trainer.loss = sft learns from: of each group the best rollouts, all of them that the policy sampled. Pure.

The gradient is that of - log p: every rollout chosen has the advantage 1 (rejection sampling, RAFT arXiv:2304.06767).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.objectives.advantages import WITHOUT_GROUP
from fulgurite.streams.trainer.objective import recipe_of

NOT_CHOSEN = "not_best"
"""Why the others of a group are dropped."""


def best_count(share: float, size: int) -> int:
    """ceil(share * size), of the share as it is written: 0.07 of 100 are 7, though the product is above that.

    >>> best_count(0.07, 100), best_count(0.25, 6)
    (7, 2)
    """
    return math.ceil(Fraction(str(share)) * size)


def best(rewards: Sequence[float], share: float, threshold: float | None) -> list[bool]:
    """[G] rewards of a group -> [G] whether it is among its best ceil(share * G) and reaches the threshold.

    Of equal ones the first: their order is that of their ids, so it is the same after a restart.

    >>> best([0.0, 1.0, 0.5, 1.0], 0.5, None)
    [False, True, False, True]
    >>> best([0.0, 1.0, 0.5, 1.0], 1.0, 0.5)
    [False, True, True, True]
    """
    order = sorted(range(len(rewards)), key=lambda member: (-rewards[member], member))
    chosen = set(order[: best_count(share, len(rewards))])
    return [member in chosen and (threshold is None or reward >= threshold) for member, reward in enumerate(rewards)]


def chosen(rewards: Sequence[float], settings: TrainerSettings) -> list[bool]:
    """[G] -> [G] whether a rollout is trained on: all of them, but for sft without demonstrations."""
    if settings.loss != "sft" or settings.demonstrations is not None:
        return [True] * len(rewards)
    return best(rewards, settings.best_share, settings.best_threshold)


def needs_signal(settings: TrainerSettings) -> bool:
    """Whether a group whose rewards do not differ teaches nothing. With a threshold, a demonstration, or a baseline
    that is not the group's, it does."""
    if settings.zero_variance == "keep" or settings.demonstrations is not None:
        return False
    if settings.zero_variance == "recipe" and recipe_of(settings).advantage in WITHOUT_GROUP:
        return False
    return settings.loss != "sft" or settings.best_threshold is None
