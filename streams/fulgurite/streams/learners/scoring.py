"""log p and entropy of chosen tokens from hidden states, a chunk of positions at a time.

    hidden [N, H] ─► chunk [C, H] ─► logits [C, V] ─► log p [C], entropy [C]        backward: each chunk's logits again

The logits of all positions would be N * V float32, the largest tensor of a step: 40 GB for 64k tokens of a vocabulary
of 152k. Promises: never more than one chunk's logits exist, forward or backward; the same numbers as without chunks, up
to the order of float32 additions in the gradient of the head. In float32 whatever the model's dtype: half precision
alone makes trainer and sampler disagree. Knows neither models nor losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LEAST_LOG_P: Final = -1e4
"""exp of it is 0."""

Head = Callable[[Tensor], Tensor]
"""[C, H] hidden states -> [C, V] logits."""


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

    The entropy carries a gradient only if asked to: it costs a pass over the logits.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(states).float() / temperature, dim=-1)
        chosen = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            # A ruled out token adds nothing, and has no gradient: without the bound both would be NaN. A NaN stays one.
            bounded = log_p.clamp(min=_LEAST_LOG_P)
            entropy = -(bounded.exp() * bounded).sum(dim=-1)
        return chosen, entropy

    parts: list[tuple[Tensor, Tensor]] = []
    for states, targets in zip(hidden.split(chunk_tokens), token_ids.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            found = checkpoint(score, states, targets, use_reentrant=False, preserve_rng_state=False)
            parts.append((found[0], found[1]))
        else:
            parts.append(score(states, targets))
    if not parts:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
