"""Which samples each optimizer update of a window is made of: trainer.epochs passes, each in trainer.minibatches parts.

Promises: every sample once an epoch; all sequences of a rollout in one part; the same window behind the same updates is
split the same way, on every rank, after a restart, and in a replay, whose versions have other numbers. And what came of
them: who was trained on. Pure, no torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.trainer.sample import Sample


def update_plan(samples: Sequence[Sample], settings: TrainerSettings, done: int) -> list[list[int]]:
    """Numbers of samples by update, in the order of the updates; `done`: how many the run has made. A window with fewer
    rollouts than parts has as many parts as rollouts."""
    of_rollout: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        of_rollout.setdefault(sample.rollout_id, []).append(number)
    parts = min(settings.minibatches, len(of_rollout))
    if parts == 1:
        return [list(range(len(samples)))] * settings.epochs
    plan: list[list[int]] = []
    for epoch in range(settings.epochs):
        order = list(of_rollout)
        random.Random(f"{settings.seed} {done} {epoch}").shuffle(order)
        for part in range(parts):
            chosen = order[part * len(order) // parts : (part + 1) * len(order) // parts]
            plan.append(sorted(number for rollout_id in chosen for number in of_rollout[rollout_id]))
    return plan


def trained_tokens(samples: Sequence[Sample], updates: Iterable[tuple[Sequence[int], str]]) -> int:
    """Sampled tokens that had a gradient, each once. An update: its samples, by number; why it was refused, if so."""
    members = {number for numbers, fault in updates if not fault for number in numbers}
    return sum(sum(samples[number].loss_mask) for number in members)


def left_out(samples: Sequence[Sample], updates: Iterable[tuple[Sequence[int], str]]) -> dict[str, str]:
    """Rollouts that no update was made of, and why their first one was refused."""
    trained: set[str] = set()
    reasons: dict[str, str] = {}
    for numbers, fault in updates:
        for rollout_id in [samples[number].rollout_id for number in numbers]:
            if fault:
                reasons.setdefault(rollout_id, fault)
            else:
                trained.add(rollout_id)
    return {rollout_id: fault for rollout_id, fault in reasons.items() if rollout_id not in trained}
