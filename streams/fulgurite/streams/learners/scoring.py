"""log p and entropy of chosen tokens from hidden states, a chunk of positions at a time.

    hidden [N, H] ─► chunk [C, H] ─► logits [C, V] ─► log p [C], entropy [C]        backward: each chunk's logits again

The logits of all positions would be N * V float32, the largest tensor of a step: 40 GB for 64k tokens of a vocabulary
of 152k. Promises: never more than a few chunks' logits exist, forward or backward; the same numbers as without chunks,
up to the order of float32 additions in the gradient of the head. In float32 whatever the model's dtype: half precision
alone makes trainer and sampler disagree. Knows neither models nor losses.

The output layer is called as a module, forward and again for the backward pass, and its gradient reaches it once:
DeepSpeed partitions weights by module calls, and reduces a gradient when it comes. What lies between logits and log p
is differentiated by hand: a pass over [C, V] is what it costs, and the obvious formula makes a dozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LEAST_LOG_P: Final = -1e4
"""exp of it is 0."""

Head = Callable[[Tensor], Tensor]
"""[C, H] hidden states -> [C, V] logits, in memory of their own, which is written over: a linear layer, not more."""


def token_scores(
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """hidden [N, H] at the positions that predict token_ids [N] -> log p [N], entropy in nats [N]; float32.

    The entropy carries a gradient only if asked to.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    parts: list[tuple[Tensor, Tensor]] = []
    chunks = list(zip(hidden.split(chunk_tokens), token_ids.split(chunk_tokens), strict=True))
    for number, (states, targets) in enumerate(chunks, 1):
        known = _Known()

        def score(states: Tensor, targets: Tensor, known: _Known = known) -> tuple[Tensor, Tensor]:
            logits = head(states).float()
            scaled = logits if temperature == 1.0 else logits / temperature
            return _Chosen.apply(scaled, targets, known, entropy_gradient)  # pyright: ignore[reportReturnType]

        # The backward pass begins with the last chunk: kept until then it is no more memory than computed again.
        if torch.is_grad_enabled() and number < len(chunks):
            found = checkpoint(score, states, targets, use_reentrant=False, preserve_rng_state=False)
            parts.append((found[0], found[1]))
        else:
            parts.append(score(states, targets))
    if not len(token_ids):
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


@dataclass(slots=True)
class _Known:
    """What the first of a chunk's two forward passes found, so that the second need not."""

    normalizer: Tensor | None = None
    """[C, 1] log of the sum of e^logit."""
    chosen: Tensor | None = None
    entropy: Tensor | None = None


class _Chosen(torch.autograd.Function):
    """logits [C, V], targets [C] -> log p [C] of the targets, entropy [C].

    d log p / d logit_v = [v is the target] - p_v          d H / d logit_v = -p_v (log p_v + H)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, known: _Known, entropy_gradient: bool) -> Any:
        # An output layer keeps no logits, so their memory is used again: a new [C, V] costs its first touch, too.
        mine = logits.detach()
        if known.normalizer is None or known.chosen is None or known.entropy is None:
            log_p = torch.log_softmax(mine, dim=-1)
            known.normalizer = mine.amax(1, keepdim=True) - log_p.amax(1, keepdim=True)
            known.chosen = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
            probabilities = torch.exp(log_p, out=mine)
            # A ruled out token adds nothing: without the bound it would be NaN. A NaN stays one.
            known.entropy = -torch.linalg.vecdot(probabilities, log_p.clamp_(min=_LEAST_LOG_P))
        else:
            log_p = mine.sub_(known.normalizer)
        ctx.save_for_backward(log_p, targets, known.entropy)
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(known.entropy)
        return known.chosen, known.entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        for_chosen, for_entropy = gradients
        log_p, targets, entropy = ctx.saved_tensors
        factors = -for_chosen.unsqueeze(1)
        if ctx.entropy_gradient:
            # One more pass over the logits; a ruled out token has no gradient.
            bounded = log_p.clamp(min=_LEAST_LOG_P).add_(entropy.unsqueeze(1))
            factors = bounded.mul_(-for_entropy.unsqueeze(1)).add_(factors)
        gradient = log_p.exp_().mul_(factors)  # nobody comes back for it
        gradient.scatter_add_(1, targets.unsqueeze(1), for_chosen.unsqueeze(1))
        return gradient, None, None, None
