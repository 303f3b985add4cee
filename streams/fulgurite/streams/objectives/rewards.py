"""What is done to rewards before they become advantages: DAPO's penalty for length (arXiv:2503.14476), and KL in the
reward, summed over a call (token by token: credit.py). Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence


def overlong_penalty(length: int, *, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """Added to the reward of a response of `length` tokens: 0 up to max_length - buffer, then falling to -factor.

        - factor * min((length - (max_length - buffer))+, buffer) / buffer           equation 13, with factor 1

    verl and AReaL let it fall further past max_length; the paper, OpenRLHF and this do not.

    >>> [overlong_penalty(n, max_length=100, buffer=20) for n in (80, 90, 100, 150)]
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"an overlong buffer of {buffer} tokens does not fit a longest length of {max_length}")
    over = min(max(length - (max_length - buffer), 0), buffer)
    return -factor * (over / buffer) if over else 0.0


def penalised_rewards(rewards: Sequence[float], kl: Sequence[float], coefficient: float) -> list[float]:
    """KL in the reward: of calls, their rewards and the sums of KL estimates over their tokens -> what is left.

        r_k - coefficient * sum over its tokens of kl_t         the estimates are the sampling policy's (kl.py)

    For baselines over a group: they compare outcomes, so that the tokens of a call answer for all of it together, as
    they do for its reward.

    Where libraries differ. verl and this compare with their group what is left after the penalty; OpenRLHF compares
    rewards first and takes the penalty of a token and those after it from what comes of it.

    >>> penalised_rewards([0.0, 1.0], [2.0, 1.0], 0.5)
    [-1.0, 0.5]
    """
    return [reward - coefficient * value for reward, value in zip(rewards, kl, strict=True)]
