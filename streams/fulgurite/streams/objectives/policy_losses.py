"""The policy losses by name: how a token's log-probability, its old one and its advantage become a loss.

A surrogate gives a loss per sampled token; aggregation.py weighs and adds. With r = p / p_old (ratios.py):

    clipped     - min(r A, clip(r, 1 - low, 1 + high) A)                     PPO, arXiv:1707.06347
                  and with `dual`: at most -dual * A where A < 0             arXiv:1912.09729
    sequence_clipped   the same with s, the geometric mean of r              GSPO, arXiv:2507.18071
    cispo       - sg[clip(r, 1 - low, 1 + high)] A log p                     MiniMax-M1, arXiv:2506.13585
    reinforce   - A log p                                                    Williams 1992

p_old is the policy the ratio is against: the one at the start of the step (the proximal policy of decoupled PPO,
arXiv:2505.24298, whose further factor p_old / p_behaviour is importance.py's), or the one that sampled.

Where libraries differ.
- *Dual clip*: verl's PPO loss always has it, at 3; TRL (`delta`), AReaL, OpenRLHF, SkyRL and slime only if asked. The
  papers of GRPO, Dr. GRPO and DAPO do not have it. Here: None unless said. TRL's `delta` bounds the ratio for A > 0
  too, which changes nothing as long as delta > 1 + high.
- *CISPO's bounds*: TRL and Liger take `epsilon_high` as the bound itself and have no lower one; verl, SkyRL and slime
  take 1 + high and 1 - low. Here the latter; low = 1 is no lower bound, as in the paper's experiments, and the default.
- *GSPO*: TRL, AReaL and OpenRLHF differentiate s itself, verl, SkyRL and ms-swift (`sequence_token`) the token form.
  The same gradient where a sequence's tokens share advantage and weight. Here the token form. OpenRLHF puts the
  sampling policy for p_old when its correction is on.
- *RLOO*: TRL's trainer clips the ratio of whole sequences (the product of r); verl, OpenRLHF, SkyRL and ms-swift take
  the leave-one-out advantage into the token-wise loss. Here the latter: products of thousands of ratios are 0 or
  infinite. On-policy both are REINFORCE with that advantage.
- *Clipping at equality* takes no gradient away in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.objectives.ratios import bounded_exp, straight_through_sequence_ratio
from fulgurite.streams.objectives.recipes import Clip, PolicyLoss, SurrogateName, find


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """The sampled tokens of a micro-batch; all tensors [N], only `logprobs` with a gradient."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    sequences: Sequences


@dataclass(frozen=True, slots=True)
class TokenLosses:
    losses: Tensor
    """[N] to be weighted and added."""
    ratios: Tensor
    """[N] p / p_old as the loss used it, detached."""
    clipped: Tensor
    """[N] bool: the clip took the gradient away (CISPO: bounded the weight)."""
    dual_clipped: Tensor
    """[N] bool: the dual clip did."""


Surrogate = Callable[[PolicyTokens, Clip], TokenLosses]


def clipped(tokens: PolicyTokens, clip: Clip) -> TokenLosses:
    """PPO's surrogate per token; at ratio 1 its gradient is REINFORCE's: -A."""
    ratios = bounded_exp(tokens.logprobs - tokens.old_logprobs.detach())
    return _clipped(ratios, tokens.advantages, clip)


def sequence_clipped(tokens: PolicyTokens, clip: Clip) -> TokenLosses:
    """GSPO's surrogate: all tokens of a sequence are clipped together."""
    ratios = straight_through_sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.sequences)
    return _clipped(ratios, tokens.advantages, clip)


def cispo(tokens: PolicyTokens, clip: Clip) -> TokenLosses:
    """The ratio, bounded and without gradient, weighs REINFORCE: a token past the bounds still learns."""
    ratios = bounded_exp(tokens.logprobs.detach() - tokens.old_logprobs.detach())
    bounded = ratios.clamp(1.0 - clip.low, 1.0 + clip.high)
    losses = -bounded * tokens.advantages * tokens.logprobs
    return TokenLosses(losses, ratios, bounded != ratios, torch.zeros_like(ratios, dtype=torch.bool))


def reinforce(tokens: PolicyTokens, clip: Clip) -> TokenLosses:
    """No ratio, no clip: for samples of the current policy, or under importance weights. Ignores `clip`."""
    ratios = bounded_exp(tokens.logprobs.detach() - tokens.old_logprobs.detach())
    none = torch.zeros_like(ratios, dtype=torch.bool)
    return TokenLosses(-tokens.advantages * tokens.logprobs, ratios, none, none)


def _clipped(ratios: Tensor, advantages: Tensor, clip: Clip) -> TokenLosses:
    free = -ratios * advantages
    held = -ratios.clamp(1.0 - clip.low, 1.0 + clip.high) * advantages
    losses = torch.maximum(free, held)
    is_held = (held > free).detach()
    if clip.dual is None:
        return TokenLosses(losses, ratios.detach(), is_held, torch.zeros_like(is_held))
    ceiling = torch.where(advantages < 0, -clip.dual * advantages, torch.inf)
    is_dual = (losses > ceiling).detach()
    return TokenLosses(torch.minimum(losses, ceiling), ratios.detach(), is_held, is_dual)


SURROGATES: Mapping[SurrogateName, Surrogate] = MappingProxyType(
    {"clipped": clipped, "sequence_clipped": sequence_clipped, "cispo": cispo, "reinforce": reinforce}
)


def policy_loss(
    name_or_loss: str | PolicyLoss, tokens: PolicyTokens, weights: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, TokenLosses]:
    """The micro-batch's share of the window's loss [], and its parts.

        L = sum_t weights_t * importance_t * loss_t

    weights [N]: aggregation.py. importance [N], without gradient: importance.py; with it and p_old the policy at the
    start of the step this is decoupled PPO.
    """
    loss = name_or_loss if isinstance(name_or_loss, PolicyLoss) else find(name_or_loss)
    parts = SURROGATES[loss.surrogate](tokens, loss.clip)
    factors = weights if importance is None else weights * importance.detach()
    return (factors * parts.losses).sum(), parts
