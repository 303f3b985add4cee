"""What each call of a rollout led to: its reward and, discounted, those of the calls after it. Pure, no torch.

    R_k = r_k + discount * R_(k+1)

Of an advantage that stands at the last call alone it is what `trainer.credit = discounted` gives each call. With KL in
the reward, where every token has its own (REINFORCE++, arXiv:2501.03262, equation 7; PPO), a token led to

    R_kt = r_k + discount * R_(k+1) - coefficient * sum over the call's tokens s >= t of kl_ks

with R_(k+1) that of the next call's first token: it answers for itself and those after it, not for those before.

Where libraries differ.
- *Step*: verl and OpenRLHF discount from token to token, so that a long last answer leaves nothing for the calls before
  it; AReaL from turn to turn (`turn_discount`). Here from call to call.
- *Between turns* (answers of tools, further user messages): discounting over tokens steps over them in verl, counts
  them in OpenRLHF, and SkyRL starts anew after each. Between calls there is nothing to step over.
- *Per call*: AReaL takes each turn as a sample of its own; verl and TRL give all turns the rollout's advantage. Both
  are there (trainer/credit.py).
"""

from __future__ import annotations

from collections.abc import Sequence


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


def token_returns(
    rewards: Sequence[float], kl: Sequence[Sequence[float]], coefficient: float, discount: float
) -> list[list[float]]:
    """Rewards of a rollout's calls, in their order, and the KL estimates of their tokens [calls][tokens] -> what each
    token led to, of the same shape.

    >>> token_returns([0.0, 1.0], [[2.0, 1.0], [1.0]], 0.5, 1.0)
    [[-1.0, 0.0], [0.5]]
    """
    returns: list[list[float]] = []
    following = 0.0
    for reward, penalties in zip(reversed(rewards), reversed(kl), strict=True):
        following = reward + discount * following
        of_call: list[float] = []
        for penalty in reversed(penalties):
            following -= coefficient * penalty
            of_call.append(following)
        returns.append(of_call[::-1])
    return returns[::-1]
