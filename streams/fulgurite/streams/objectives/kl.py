"""The divergence from a reference policy, estimated on sampled tokens: as a penalty in the loss, or in the reward
(rewards.py).

    d = log p_ref - log p           tokens sampled by p          joschu.net/blog/kl-approx
    k1 = -d        k2 = d^2 / 2        k3 = e^d - 1 - d          estimates of KL(p || p_ref)

Differentiated as they stand, their expected gradients on p's own samples are: k1: 0, no penalty at all; k2: that of
KL(p || p_ref), which is wanted; k3: that of KL(p_ref || p). So value and gradient are chosen apart:

    estimator      the formula's own gradient: what GRPO (arXiv:2402.03300), verl `k3`, slime do with k3
    k2             the value of the estimator, the gradient of k2: verl `k3+`, OpenRLHF `unbiased_gradient`
    ratio          the estimator times p / p_old, differentiated whole: DeepSeek-V3.2 (arXiv:2512.02556), TRL's default

`k2` and `ratio` both give KL(p || p_ref)'s gradient: `k2` for tokens of p itself, `ratio` for tokens of p_old too.

Where libraries differ. *Default*: TRL multiplies k3 with the ratio, also on-policy, where the ratio is 1 but its
gradient is not 0; verl, Liger and slime do not unless asked. Here nothing is the default: callers say. *Clamp*: verl,
AReaL, SkyRL and OpenRLHF clamp values to +-10, which takes the gradient from the tokens that drifted furthest; TRL,
Liger and slime's `k3` do not. Here only d is clamped to +-20, where e^d is still a float32. *Importance weights* are
never applied to the penalty (as in TRL and Liger; ms-swift does).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fulgurite.streams.objectives.ratios import MAX_LOG_RATIO, bounded_exp

Estimator = Literal["k1", "k2", "k3"]
Gradient = Literal["estimator", "k2", "ratio"]


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """log p and log p_ref of sampled tokens [N] -> the estimate of each [N], with its formula's own gradient."""
    difference = reference_logprobs.detach() - logprobs
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return difference.square() / 2
        case "k3":
            bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return bounded.exp() - 1.0 - bounded


def kl_penalty(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    estimator: Estimator,
    gradient: Gradient,
    *,
    old_logprobs: Tensor | None = None,
) -> Tensor:
    """All [N]; the penalty of each token [N], for the loss. `old_logprobs`, for `ratio`: the policy that sampled."""
    value = kl_estimate(logprobs, reference_logprobs, estimator)
    match gradient:
        case "estimator":
            if estimator == "k1":
                raise ValueError("k1 in the loss has no gradient on average; take gradient = k2 or ratio, or another")
            return value
        case "k2":
            squared = kl_estimate(logprobs, reference_logprobs, "k2")
            return value.detach() + squared - squared.detach()
        case "ratio":
            if old_logprobs is None:
                raise ValueError("gradient = ratio needs the log-probabilities of the policy that sampled the tokens")
            return bounded_exp(logprobs - old_logprobs.detach()) * value
