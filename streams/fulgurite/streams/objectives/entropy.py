"""The entropy bonus: a term of the loss that keeps a policy from collapsing onto few tokens.

    L = - coefficient * sum_t weight_t H_t,      H_t = - sum_v p(v) log p(v)      over the whole vocabulary

Where libraries differ: TRL takes the mean over the tokens of a micro-batch whatever the loss's aggregation is; verl
and OpenRLHF aggregate it like the loss. Here the weights (aggregation.py) are the caller's, usually the loss's own.
"""

from __future__ import annotations

from torch import Tensor


def entropy_loss(entropies: Tensor, weights: Tensor, coefficient: float) -> Tensor:
    """entropies [N], with a gradient (learners/scoring.py: `entropy_gradient`), weights [N] -> []."""
    return -coefficient * (weights * entropies).sum()
