"""What a step's tokens looked like, under the names that users of verl and TRL know, and whether that forbids it.

Computed before the update, of all tokens of all ranks, so that a window past a bound changes nothing. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.objectives.importance import effective_sample_fraction
from fulgurite.streams.objectives.ratios import bounded_exp
from fulgurite.streams.trainer.losses import LossTerms, behaviour_kl

SAME_VERSION_TOKENS: Final = "sampling/same_version_tokens"
MISMATCH_KL: Final = "rollout_corr/k3_kl"
EFFECTIVE_SAMPLE_SIZE: Final = "sampling/effective_sample_size"
_OF_UPDATES: Final = (
    "actor/pg_loss",
    "actor/entropy",
    "actor/pg_clipfrac",
    "actor/pg_clipfrac_lower",
    "actor/ppo_kl",
    "actor/kl_loss",
    "timing_s/pack",
)


MAX_UPDATES: Final = 32
"""Whose figures stand one by one in a step's record."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a micro-batch's tokens looked like under the current policy, tensors [M] on the CPU."""

    policy_loss: float
    """Its share of the window's, without KL penalty and entropy bonus."""
    logprobs: Tensor
    behaviour: Tensor
    old: Tensor
    """The older policy of `ppo_kl`."""
    entropy: Tensor
    same_version: Tensor
    ratios: Tensor
    """What the loss weighed them by."""
    clipped: Tensor
    dual_clipped: Tensor
    held: Tensor
    kl: Tensor | None
    """Against the reference policy; None without one."""

    @staticmethod
    def of(batch: PackedBatch, terms: LossTerms, entropy: Tensor, version_in: int) -> Seen:
        return Seen(
            terms.policy_loss.item(),
            terms.logprobs.cpu(),
            batch.behaviour_logprobs.cpu(),
            terms.old_logprobs.cpu(),
            entropy.cpu(),
            (batch.versions == version_in).cpu(),
            terms.ratios.cpu(),
            terms.clipped.cpu(),
            terms.dual_clipped.cpu(),
            terms.held.cpu(),
            None if terms.kl is None else terms.kl.cpu(),
        )


@dataclass(frozen=True, slots=True)
class Update:
    """One of several updates of a window."""

    loss: float
    grad_norm: float
    learning_rate: float
    fault: str
    """Why it was left out; empty where it was not."""
    metrics: dict[str, float]
    """step_metrics of its tokens."""


def step_metrics(seen: list[Seen]) -> dict[str, float]:
    """`ppo_kl` is against the policy at the window's beginning where there was an update since, else against the one
    that sampled, the only older one there is."""
    current = torch.cat([part.logprobs for part in seen])
    behaviour = torch.cat([part.behaviour for part in seen])
    ratios = torch.cat([part.ratios for part in seen])
    kl, k3 = behaviour_kl(current, behaviour)
    difference = (current - behaviour).abs()
    same = difference[torch.cat([part.same_version for part in seen])]
    penalties = [part.kl for part in seen if part.kl is not None]
    return {
        "actor/pg_loss": sum(part.policy_loss for part in seen),
        "actor/entropy": torch.cat([part.entropy for part in seen]).mean().item(),
        "actor/pg_clipfrac": _share([part.clipped for part in seen]),
        "actor/pg_clipfrac_lower": _share([part.dual_clipped for part in seen]),
        "actor/ppo_kl": behaviour_kl(current, torch.cat([part.old for part in seen]))[0],
        **({"actor/kl_loss": torch.cat(penalties).mean().item()} if penalties else {}),
        "rollout_corr/kl": kl,
        MISMATCH_KL: k3,
        "rollout_corr/rollout_is_mean": ratios.mean().item(),
        "rollout_corr/rollout_is_eff_sample_size": effective_sample_fraction(ratios),
        "rollout_corr/rollout_is_capped_fraction": _share([part.held for part in seen]),
        EFFECTIVE_SAMPLE_SIZE: effective_sample_fraction(bounded_exp(current - behaviour)),
        "sampling/sampling_logp_difference/mean": difference.mean().item(),
        "sampling/sampling_logp_difference/max": difference.max().item(),
        SAME_VERSION_TOKENS: float(same.numel()),
        **({"sampling/same_version_logp_difference/max": same.max().item()} if same.numel() else {}),
    }


def window_fault(settings: TrainerSettings, loss: float, metrics: dict[str, float]) -> str:
    """Why the window must not be trained on, as `kind:figures`; empty where it may."""
    if fault := loss_fault(loss):
        return fault
    for name, value in metrics.items():
        if not math.isfinite(value):
            return f"nonfinite:{name} {value}"
    kl, bound = metrics[MISMATCH_KL], settings.max_mismatch_kl
    if bound is not None and not kl <= bound:
        return f"mismatch_kl:{kl:.4g}, more than trainer.max_mismatch_kl = {bound:g}"
    size, least = metrics[EFFECTIVE_SAMPLE_SIZE], settings.min_effective_sample_size
    if least is not None and not size >= least:
        return f"effective_sample_size:{size:.4g}, less than trainer.min_effective_sample_size = {least:g}"
    return ""


def loss_fault(loss: float) -> str:
    """The part of it that holds for every update of a window."""
    return "" if math.isfinite(loss) else f"nonfinite:loss {loss}"


def update_metrics(updates: list[Update]) -> dict[str, float]:
    """Of a window's several updates: means of what the updates saw, in place of what was seen before them, and the
    figures of each. One that was left out counts as that alone."""
    made = [update for update in updates if not update.fault]
    found = {"actor/updates": float(len(made)), "actor/updates_skipped": float(len(updates) - len(made))}
    for name in _OF_UPDATES:
        values = [update.metrics[name] for update in made if name in update.metrics]
        if values:
            found[name] = sum(values) / len(values)
    for number, update in enumerate(updates[:MAX_UPDATES], 1):
        if not update.fault:
            each = {name: update.metrics[f"actor/{name}"] for name in ("pg_loss", "pg_clipfrac", "ppo_kl", "entropy")}
            each |= {"loss": update.loss, "grad_norm": update.grad_norm}
            found |= {f"update/{number}/{name}": value for name, value in each.items()}
    return found | ({"actor/lr": made[-1].learning_rate} if made else {})


def norm_fault(settings: TrainerSettings, norm: float) -> str:
    """The same of the gradient's norm, known only after the backward pass."""
    if not math.isfinite(norm):
        return f"nonfinite:gradient norm {norm}"
    limit = settings.grad_norm_limit
    if limit is not None and norm > limit:
        return f"grad_norm:{norm:.4g}, more than trainer.grad_norm_limit = {limit:g}"
    return ""


def _share(flags: list[Tensor]) -> float:
    return torch.cat(flags).float().mean().item()
