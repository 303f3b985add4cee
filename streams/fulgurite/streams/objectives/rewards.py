"""What is done to rewards before they become advantages, by DAPO (arXiv:2503.14476). Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.streams.objectives.advantages import has_signal


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


def keep_group(rewards: Sequence[float], correct: Sequence[bool] | None = None) -> bool:
    """Dynamic sampling: whether a group can teach anything.

    The paper keeps groups with some, but not all, answers correct (`correct`); verl and OpenRLHF filter by a metric or
    the mean reward. Without `correct` the rewards themselves must differ, which says the same of rewards of 0 and 1.
    With it and shaped rewards it keeps out groups that differ only in the penalty for length.
    """
    if correct is not None:
        return any(correct) and not all(correct)
    return has_signal(rewards)
