"""Which tokens of a rollout get the credit for its reward: all the same, later ones more, or each call its own.

Where libraries differ.
- *Tokens between turns* (answers of tools, further user messages): discounting steps over them in verl, counts them in
  OpenRLHF, and SkyRL starts anew after each. Here only sampled tokens are packed, so they are stepped over.
- *Per call*: AReaL adds a turn's discounted successor to its reward (`turn_discount`) and takes each turn as a sample
  of its own; verl and TRL give all turns the rollout's advantage. Both are here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.streams.objectives.advantages import group_advantages
from fulgurite.streams.objectives.packing import Sequences


def rollout_level(advantages: Tensor, rollout_of_sequence: Tensor, sequences: Sequences) -> Tensor:
    """advantages [R] of rollouts, rollout_of_sequence [S] -> [N]: every token gets its rollout's advantage."""
    return sequences.spread(advantages[rollout_of_sequence])


def discounted_returns(rewards: Tensor, sequences: Sequences, discount: float) -> Tensor:
    """rewards [N] of tokens -> returns [N]: R_t = r_t + discount * R_(t+1) to the end of the token's sequence.

    Tokens of a sequence lie together, so the sum over 2^k following tokens comes from two sums over 2^(k-1): as many
    steps as the longest sequence's length has binary digits.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"a discount lies between 0 and 1, not at {discount}")
    returns, index, reach = rewards, sequences.index, 1
    longest = int(sequences.lengths.max()) if len(sequences.lengths) else 0
    while reach < longest:
        same = index[reach:] == index[:-reach]
        further = torch.where(same, returns[reach:], 0.0) * discount**reach
        returns = torch.cat([returns[:-reach] + further, returns[-reach:]])
        reach *= 2
    return returns


def span_returns(rewards: Sequence[float], discount: float) -> list[float]:
    """Rewards of a rollout's calls, in their order -> what each call led to: R_k = r_k + discount * R_(k+1).

    >>> span_returns([0.0, 0.0, 1.0], 0.5)
    [0.25, 0.5, 1.0]
    """
    returns: list[float] = []
    following = 0.0
    for reward in reversed(rewards):
        following = reward + discount * following
        returns.append(following)
    return returns[::-1]


def span_advantages(returns: Sequence[Sequence[float]]) -> list[list[float]]:
    """[rollouts][calls] returns of one group -> the same shape: each call normalised over all calls of the group.

    With one call a rollout it is `group_advantages`. A baseline over calls at different places of their rollouts is
    biased where returns depend on the place: it is for rewards of calls, not for a rollout's reward seen from each.
    """
    flat = iter(group_advantages([value for rollout in returns for value in rollout]))
    return [[next(flat) for _ in rollout] for rollout in returns]


def span_level(advantages: Tensor, span_lengths: Tensor) -> Tensor:
    """advantages [K] of calls, span_lengths [K] their numbers of sampled tokens, as packed -> [N]."""
    return torch.repeat_interleave(advantages, span_lengths)
