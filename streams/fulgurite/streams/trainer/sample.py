"""A sample: one sequence of a rollout as the learner reads it, and the calls that sampled its tokens. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """The tokens that one call sampled, and what it earned itself."""

    start: int
    end: int
    """One past its last token."""
    number: int
    """Its place among the rollout's calls, over all its sequences."""
    reward: float
    """The rollout's reward is its last call's."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Lists have the sequence's length T."""

    rollout_id: str
    token_ids: list[int]
    loss_mask: list[int]
    behaviour_logprobs: list[float]
    versions: list[int]
    """[T] the version that sampled the token; UNKNOWN_VERSION where it was given."""
    advantage: float
    """The rollout's."""
    group: int = 0
    """Which of the window's groups it is of."""
    calls: tuple[Call, ...] = ()
    """In the order of their tokens; every sampled token is in one."""
    advantages: tuple[float, ...] = ()
    """One for each call; empty where all have the rollout's."""
    token_advantages: tuple[float, ...] = ()
    """One for each sampled token, where tokens of a call differ."""

    def sampled_advantages(self) -> list[float]:
        """One for each sampled token."""
        if self.token_advantages:
            return list(self.token_advantages)
        if not self.advantages:
            return [self.advantage] * sum(self.loss_mask)
        return [
            advantage
            for call, advantage in zip(self.calls, self.advantages, strict=True)
            for _ in range(call.end - call.start)
        ]

    def by_call(self, values: Sequence[float]) -> list[Sequence[float]]:
        """`values`, one for each sampled token -> those of each call."""
        parts: list[Sequence[float]] = []
        at = 0
        for call in self.calls:
            length = call.end - call.start
            parts.append(values[at : at + length])
            at += length
        return parts
