"""The loss of a micro-batch, put together from the objectives as the settings say: no padding, no mask, no model.

    L = sum_t weight_t * ( importance_t * surrogate_t  +  kl_coefficient * KL_t  -  entropy_coefficient * H_t )

- weight_t makes the sum over all micro-batches of all ranks the window's loss (objectives/aggregation.py): its
  denominators are of the whole window, callers add up.
- importance_t = p_proximal / p_behaviour, without gradient, is there for trainer.correction truncate and mask;
  objective.py says which policy the surrogate's ratio is against. It is never on the KL penalty or the entropy bonus.
- As in PPO a ratio far above 1 is not held where A < 0, unless trainer.dual_clip does; trainer.max_grad_norm bounds
  what it can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.objectives.aggregation import WindowTotals, token_weights
from fulgurite.streams.objectives.entropy import entropy_loss
from fulgurite.streams.objectives.importance import ImportanceWeights, importance_weights
from fulgurite.streams.objectives.kl import kl_penalty
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.objectives.policy_losses import PolicyTokens, policy_loss
from fulgurite.streams.objectives.ratios import MAX_LOG_RATIO
from fulgurite.streams.trainer.objective import recipe_of


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """The sampled tokens of a micro-batch; all tensors [N], only `logprobs` and `entropies` with a gradient."""

    logprobs: Tensor
    entropies: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    sequences: Sequences
    reference_logprobs: Tensor | None = None
    """Needed where trainer.kl_coefficient is not 0 and the penalty is in the loss."""
    proximal_logprobs: Tensor | None = None
    """Under the policy at the window's beginning, where it may be another than the current one."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    loss: Tensor
    """[] this micro-batch's share of the window's loss."""
    policy_loss: Tensor
    """[] the surrogate's part of it, without KL penalty and entropy bonus, detached."""
    logprobs: Tensor
    """[N] current, detached."""
    old_logprobs: Tensor
    """[N] of the older policy that the current one is to be told apart from: proximal, or the one that sampled."""
    ratios: Tensor
    """[N] what the surrogate and its gradient were weighed by: ratio times importance weight, detached."""
    clipped: Tensor
    """[N] bool: the clip took the gradient away."""
    dual_clipped: Tensor
    """[N] bool: the dual clip did."""
    held: Tensor
    """[N] bool: the importance weight was truncated or masked."""
    kl: Tensor | None
    """[N] the penalty's value, detached; None without one."""


def micro_batch_loss(settings: TrainerSettings, tokens: ScoredTokens, totals: WindowTotals) -> LossTerms:
    """totals: of the whole window, over all ranks."""
    recipe = recipe_of(settings)
    current = tokens.logprobs.detach()
    weights = token_weights(
        recipe.aggregation, tokens.sequences, totals, constant=settings.length_constant, dtype=current.dtype
    )
    beginning = current if tokens.proximal_logprobs is None else tokens.proximal_logprobs
    proximal = tokens.behaviour_logprobs if settings.correction == "clip" else beginning
    importance = _importance(settings, beginning, tokens)
    policy_tokens = PolicyTokens(tokens.logprobs, proximal, tokens.advantages, tokens.sequences)
    loss, parts = policy_loss(recipe, policy_tokens, weights, importance.weights if importance else None)
    surrogate = loss.detach()
    kl = _kl(settings, tokens)
    if kl is not None:
        loss = loss + settings.kl_coefficient * (weights * kl).sum()
    if settings.entropy_coefficient:
        loss = loss + entropy_loss(tokens.entropies, weights, settings.entropy_coefficient)
    return LossTerms(
        loss,
        surrogate,
        current,
        tokens.behaviour_logprobs if tokens.proximal_logprobs is None else proximal,
        parts.ratios * importance.weights if importance else parts.ratios,
        parts.clipped,
        parts.dual_clipped,
        importance.held if importance else torch.zeros_like(parts.clipped),
        None if kl is None else kl.detach(),
    )


def _importance(settings: TrainerSettings, proximal: Tensor, tokens: ScoredTokens) -> ImportanceWeights | None:
    if settings.correction in ("clip", "none"):
        return None
    return importance_weights(
        proximal,
        tokens.behaviour_logprobs,
        tokens.sequences,
        mode=settings.correction,
        high=settings.importance_cap,
        low=settings.importance_low,
        level=settings.importance_level,
        gate=settings.importance_gate,
    )


def _kl(settings: TrainerSettings, tokens: ScoredTokens) -> Tensor | None:
    if not settings.kl_coefficient or settings.kl_in_reward:
        return None
    assert tokens.reference_logprobs is not None, "the learner scores with the reference where there is a coefficient"
    return kl_penalty(
        tokens.logprobs,
        tokens.reference_logprobs,
        settings.kl_estimator,
        settings.kl_gradient,
        old_logprobs=tokens.behaviour_logprobs,
    )


def behaviour_kl(current: Tensor, behaviour: Tensor) -> tuple[float, float]:
    """[N] log p now and log p when sampled -> KL(behaviour || current) by the estimators k1 and k3.

    k1 = E[-d], k3 = E[e^d - 1 - d], d = current - behaviour (joschu.net/blog/kl-approx); both need samples of
    `behaviour`.
    """
    difference = (current - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-difference).mean().item(), (difference.exp() - 1.0 - difference).mean().item()
