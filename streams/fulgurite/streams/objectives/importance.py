"""Importance weights that correct for tokens sampled by another policy than the loss is against. No gradient.

    r = p_proximal / p_behaviour                          at the level asked for, see ratios.py
    truncate:  w = min(r, high)                           TIS, fengyao.notion.site/off-policy-rl; with low: clamped
    mask:      w = r if low <= r <= high else 0           IcePop arXiv:2510.18855, masked importance sampling

Multiplied onto the policy loss of a token, never onto a KL penalty or an entropy bonus. Decoupled PPO
(arXiv:2505.24298) is the clipped loss against the proximal policy times these weights.

Where libraries differ. *Sequence level*: verl and SkyRL weigh every token by the product of its sequence's ratios,
AReaL by their geometric mean; OpenRLHF gates sequences by the geometric mean and keeps token weights inside (`gate`).
All three are here. *Mask*: the denominator stays that of all tokens (verl, AReaL); a ratio at a bound is kept, as
everywhere. *Truncation*: without a floor, as in verl and SkyRL; TRL, AReaL and OpenRLHF can have one (`low`).
*Normalisation* of the weights to mean 1 (an option of verl) is not done: it would depend on the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.objectives.ratios import Level, bounded_exp, log_ratios

Mode = Literal["truncate", "mask"]


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    weights: Tensor
    """[N] what the loss of a token is multiplied by."""
    ratios: Tensor
    """[N] before anything was done to them."""
    held: Tensor
    """[N] bool: truncated or masked."""


def importance_weights(
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    sequences: Sequences,
    *,
    mode: Mode,
    high: float,
    low: float = 0.0,
    level: Level = "token",
    gate: Level | None = None,
) -> ImportanceWeights:
    """log p of both policies [N] -> weights. `gate`, for masks, is the level of the ratio that the bounds are for."""
    if not 0.0 <= low < high:
        raise ValueError(f"importance weights need bounds 0 <= low < high, not {low} and {high}")
    proximal, behaviour = proximal_logprobs.detach(), behaviour_logprobs.detach()
    ratios = bounded_exp(log_ratios(proximal, behaviour, sequences, level))
    if mode == "truncate":
        if gate is not None:
            raise ValueError("a gate masks; to truncate, only the level of the weights can be chosen")
        weights = ratios.clamp(low, high)
        return ImportanceWeights(weights, ratios, weights != ratios)
    gated = ratios if gate is None else bounded_exp(log_ratios(proximal, behaviour, sequences, gate))
    held = (gated < low) | (gated > high)
    return ImportanceWeights(torch.where(held, 0.0, ratios), ratios, held)


def effective_sample_fraction(weights: Tensor) -> float:
    """[N] importance weights -> (sum w)^2 / (N sum w^2): 1 when all are equal, towards 1/N when one has it all."""
    squares = weights.square().sum().item()
    if squares == 0.0:
        return 0.0
    return weights.sum().item() ** 2 / (weights.numel() * squares)
