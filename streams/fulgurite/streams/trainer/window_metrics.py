"""What a window's rollouts were like, under the names that verl and TRL users know. Pure, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fulgurite.streams.objectives.advantages import mean_and_std
from fulgurite.streams.trainer.sample import Sample
from fulgurite.streams.trainer.samples import TrainingSet, trained_sequences
from fulgurite.streams.trainer.windows import FILLED, Window


def staleness(training: TrainingSet, window: Window) -> tuple[float, int]:
    """Versions behind, over the tokens trained on: mean and largest."""
    behind = [
        window.measured_at.get(sample.rollout_id, window.version_in) - version
        for sample in training.samples
        for version, sampled in zip(sample.versions, sample.loss_mask, strict=True)
        if sampled
    ]
    return (math.fsum(behind) / len(behind), max(0, *behind)) if behind else (0.0, 0)


def window_metrics(
    window: Window, training: TrainingSet, resource: str, agents: Sequence[str] = ()
) -> dict[str, float]:
    """Lengths are of what the resource's policy sampled for these agents: see trained_sequences."""
    members = [member for group in window.groups for member in group if member.reason != FILLED]
    sequences = [trained_sequences(member.trajectory, resource, agents) for member in members]
    lengths = [float(sum(sum(sequence.loss_mask) for sequence in own)) for own in sequences]
    prompts = [float(sequence.loss_mask.index(1)) for own in sequences for sequence in own]
    found = {
        **_spread("critic/score", training.rewards),
        **_spread("critic/rewards", [sum(both) for both in zip(training.rewards, training.penalties, strict=True)]),
        **_spread("critic/advantages", [value for each in training.samples for value in each.sampled_advantages()]),
        **_spread("response_length", lengths),
        **_spread("prompt_length", prompts),
        **_spread("num_turns", [float(member.trajectory.calls) for member in members]),
        "frac_reward_zero_std": training.groups_without_signal / max(1, training.groups),
        "groups/incomplete": float(window.groups_incomplete),
        "rollouts/trained": float(len(training.rollout_ids)),
        "rollouts/trained_again": float(len(training.again)),
        "rollouts/filled": float(sum(member.reason == FILLED for group in window.groups for member in group)),
        "rollouts/dropped": float(len(training.dropped) + sum(window.named.values())),
    }
    dropped = Counter(each.reason.partition(":")[0] for each in training.dropped)
    dropped.update(window.named)
    return found | {f"rollouts/dropped/{reason}": float(count) for reason, count in dropped.items()}


def penalty_metrics(
    samples: Sequence[Sample], kl: Sequence[Sequence[float]], after: Sequence[Sample], coefficient: float
) -> dict[str, float]:
    """What the penalty made of the rollouts that are trained on, counted as verl does: rewards by rollout, advantages
    by token, the penalty by sequence."""
    left: dict[str, float] = {}
    for sample, own in zip(samples, kl, strict=True):
        paid = sum(call.reward for call in sample.calls) - coefficient * math.fsum(own)
        left[sample.rollout_id] = left.get(sample.rollout_id, 0.0) + paid
    return {
        **_spread("critic/rewards", list(left.values())),
        **_spread("critic/advantages", [value for sample in after for value in sample.sampled_advantages()]),
        "actor/reward_kl_penalty": math.fsum(math.fsum(own) / len(own) for own in kl) / len(kl),
        "actor/reward_kl_penalty_coeff": coefficient,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Metrics as verl names them; none of nothing."""
    if not values:
        return {}
    return {f"{name}/mean": mean_and_std(values)[0], f"{name}/max": max(values), f"{name}/min": min(values)}
