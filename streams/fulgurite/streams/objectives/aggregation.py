"""From a loss a token to the loss of a window, as weights per token: loss = sum_t weight_t * loss_t.

    token_mean      1 / N_window                        DAPO arXiv:2503.14476, verl `token-mean`
    sequence_mean   1 / (S_window * |o_i|)              GRPO arXiv:2402.03300, GSPO; verl `seq-mean-token-mean`
    sequence_sum    1 / (S_window * constant)           Dr. GRPO arXiv:2503.20783; verl `seq-mean-token-sum-norm`

Denominators are of the *whole window* and come from the caller, so the losses and gradients of its micro-batches add up
to the window's, whatever the split; nothing is divided by the number of micro-batches.

Where libraries differ. *Micro-batches*: TRL (`grpo`, `bnpo`, `dr_grpo`) takes the mean of every micro-batch and divides
by their number, which weighs a token by the company it is in; SkyRL (except `token_mean_legacy`), verl with its global
counts and OpenRLHF do as here. *Constant*: verl falls back to the longest padded response of the batch, which changes
from step to step; TRL to the largest completion length. Here it must be said. *Empty sequences*: verl and OpenRLHF
leave sequences without sampled tokens out of S; TRL and SkyRL count them. Here the caller counts, and should leave
them out: `window_totals` does. *Masked tokens* (importance.py) stay in every denominator, as in AReaL and verl: taking
them out would weigh the others more the more is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fulgurite.streams.objectives.packing import Sequences

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


@dataclass(frozen=True, slots=True)
class WindowTotals:
    """Of all micro-batches of a window, on all ranks."""

    tokens: int
    """Sampled tokens."""
    sequences: int
    """Sequences with at least one sampled token."""


def window_totals(lengths: Iterable[int]) -> WindowTotals:
    """Numbers of sampled tokens of all sequences of a window -> its totals.

    >>> window_totals([3, 0, 5])
    WindowTotals(tokens=8, sequences=2)
    """
    counted = [length for length in lengths if length]
    if not counted:
        raise ValueError("a window without sampled tokens has no loss")
    return WindowTotals(sum(counted), len(counted))


def token_weights(
    aggregation: Aggregation,
    sequences: Sequences,
    totals: WindowTotals,
    *,
    constant: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights [N] of a micro-batch's tokens. `constant` is for `sequence_sum`: Dr. GRPO's longest length."""
    match aggregation:
        case "token_mean":
            return torch.full((len(sequences.index),), 1.0 / totals.tokens, dtype=dtype, device=sequences.index.device)
        case "sequence_mean":
            return sequences.spread(1.0 / (totals.sequences * sequences.lengths.clamp(min=1).to(dtype)))
        case "sequence_sum":
            if constant is None or constant <= 0:
                raise ValueError(
                    f"sequence_sum divides by a constant, the longest length a sequence may have, not by {constant}"
                )
            weight = 1.0 / (totals.sequences * constant)
            return torch.full((len(sequences.index),), weight, dtype=dtype, device=sequences.index.device)
