"""The learning rate by the number of updates done: so it needs no state of its own to go on after a restart."""

from __future__ import annotations

import math

from fulgurite.schemas.settings import TrainerSettings


def learning_rate(settings: TrainerSettings, updates: int) -> float:
    """Of the next update, after `updates`: up linearly, then as trainer.schedule says.

    Windows without an update (no group with a signal, a step skipped) do not count: the end is reached after
    trainer.steps windows' updates, by a run that had no such window.
    """
    warmup, floor = settings.warmup_steps, settings.min_learning_rate_ratio
    total = settings.steps * settings.epochs * settings.minibatches
    if updates < warmup:
        return settings.learning_rate * (updates + 1) / warmup
    done = min(1.0, (updates - warmup) / max(1, total - warmup))
    match settings.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = floor + (1.0 - floor) * (1.0 - done)
        case "cosine":
            share = floor + (1.0 - floor) * (1.0 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * share
