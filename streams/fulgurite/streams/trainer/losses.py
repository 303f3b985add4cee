"""The loss of a step, as pure functions of per-token tensors [N]: no padding, no mask, no model.

    w_t = min(pi_prox / pi_behaviour, importance_cap)            truncated importance weight, no gradient
    u_t = pi_theta / pi_prox
    L   = -1/N sum_t w_t * min(u_t A_t, clip(u_t, 1 - clip_low, 1 + clip_high) A_t)

- Decoupled PPO (AReaL, arXiv:2505.24298): the clip is against the proximal policy (the one at the start of the step),
  the weight corrects from the behaviour policy that sampled the token. TIS (fengyao.notion.site/off-policy-rl): the
  weight is capped. Clip-higher and the mean over all tokens of the window: DAPO (arXiv:2503.14476).
- With one optimizer step a window the callers' choice of the proximal policy is one of two (`trainer.correction`):
  `clip`: the behaviour policy. w is 1, u = pi_theta / pi_behaviour: PPO's and GRPO's ratio against the recorded
  logprobs. The clip acts on stale tokens; at staleness 0 u is 1 and the gradient is that of REINFORCE.
  `truncate`: the current policy. u is 1 and the clip never acts; the capped weight is all that corrects.
- As in PPO a ratio far above 1 is not held where A < 0; `trainer.max_grad_norm` bounds what it can do.
- N is the number of sampled tokens of the whole window, not of a micro-batch: callers pass it as `token_count` and add
  up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.streams.objectives.ratios import MAX_LOG_RATIO, bounded_exp


@dataclass(frozen=True, slots=True)
class LossTerms:
    loss: Tensor
    """[] this micro-batch's share of the window's mean."""
    importance_weights: Tensor
    """[N] w, detached."""
    ratios: Tensor
    """[N] u, detached."""
    clipped: Tensor
    """[N] bool: the clip took the gradient away."""
    capped: Tensor
    """[N] bool: the cap held the weight."""


def policy_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    *,
    token_count: int,
    clip_low: float,
    clip_high: float,
    importance_cap: float,
) -> LossTerms:
    """All of [N]; only `logprobs` carries a gradient."""
    weights_raw = bounded_exp(proximal_logprobs - behaviour_logprobs).detach()
    weights = weights_raw.clamp(max=importance_cap)
    ratio = bounded_exp(logprobs - proximal_logprobs.detach())
    free = ratio * advantages
    held = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -(weights * torch.minimum(free, held)).sum() / token_count
    return LossTerms(loss, weights, ratio.detach(), (held < free).detach(), weights_raw > importance_cap)


def behaviour_kl(current: Tensor, behaviour: Tensor) -> tuple[float, float]:
    """[N] log p now and log p when sampled -> KL(behaviour || current) by the estimators k1 and k3.

    k1 = E[-d], k3 = E[e^d - 1 - d], d = current - behaviour (joschu.net/blog/kl-approx); both need samples of
    `behaviour`.
    """
    difference = (current - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-difference).mean().item(), (difference.exp() - 1.0 - difference).mean().item()
