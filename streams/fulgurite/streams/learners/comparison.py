"""Trainer against sampler: tokens of the very version under training must have the probabilities it gave them.

Knows no engine; a rank compares what it scored. Tokens of a version that had the same weights come as the current one's
(`trainer/samples.py`); those of other weights are never compared: they may differ.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.trainer.sample import Sample

logger = logging.getLogger(__name__)

LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.5}
"""By trainer.dtype, where trainer.max_logprob_difference is not set."""
UNCHECKED_STEPS = 20
"""So many steps in a row without one token of the weights under training are worth a warning: nothing was compared."""


MISMATCH: Final = "logprob_mismatch"
"""Kind of a fault: trainer and sampler disagree."""
USUAL_CAUSES: Final = (
    "usual causes: a temperature or top_p other than 1, a stale prefix cache after a swap, weights not as announced; "
    "or a sampler of another precision than trainer.dtype, then raise trainer.max_logprob_difference"
)


def same_version_fault(settings: TrainerSettings, batch: PackedBatch, current: Tensor, version_in: int) -> str:
    """The worst disagreement, with its place, beyond trainer.max_logprob_difference, as `kind:figures`; empty where
    there is none."""
    same = batch.versions == version_in
    difference = torch.where(same, (current - batch.behaviour_logprobs).abs(), torch.zeros_like(current))
    # NaN counts as a difference: it compares false with everything.
    bound = settings.max_logprob_difference or LARGEST_DIFFERENCE[settings.dtype]
    wrong = ~(difference <= bound)
    if not wrong.any():
        return ""
    at = int(difference.nan_to_num(nan=float("inf")).argmax())
    return (
        f"{MISMATCH}:rollout {batch.rollout_ids[int(batch.sequences[at])]}, "
        f"position {int(batch.position_ids[batch.predicting[at]]) + 1}, "
        f"token {int(batch.targets[at])}: log p is {current[at].item():.6f} here, "
        f"{batch.behaviour_logprobs[at].item():.6f} as recorded; {int(wrong.sum())} of {len(wrong)} tokens differ "
        f"by more than trainer.max_logprob_difference = {bound:g}"
    )


def undecided_fault(samples: Sequence[Sample], version_in: int) -> str:
    """Of a window after one in which they disagreed: that nothing of it can tell whether they still do, as
    `kind:figures`; empty where something can."""
    for sample in samples:
        if any(at and version == version_in for at, version in zip(sample.loss_mask, sample.versions, strict=True)):
            return ""
    return (
        f"{MISMATCH}:nothing could be compared since trainer and sampler disagreed: no token of the window was sampled "
        f"by the weights of version {version_in}"
    )


class ComparisonWatch:
    """Says so when there are never any tokens to compare."""

    def __init__(self) -> None:
        self._unchecked = 0

    def saw(self, same_version_tokens: float) -> None:
        """After each step."""
        self._unchecked = 0 if same_version_tokens else self._unchecked + 1
        if self._unchecked and self._unchecked % UNCHECKED_STEPS == 0:
            logger.warning(
                "%d steps without a token sampled by the weights under training: trainer and sampler were not compared "
                "(trainer.max_logprob_difference); trainer.pacing_staleness = 0 would make every token one, and "
                "trainer.max_mismatch_kl bounds how far off tokens of any version are",
                self._unchecked,
            )
