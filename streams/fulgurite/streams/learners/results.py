"""What comes of scoring samples, on one rank and on all, and of a whole step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fulgurite.streams.learners.comparison import MISMATCH
from fulgurite.streams.learners.metrics import Seen


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    """Of several updates the mean; so is the norm."""
    grad_norm: float
    tokens: int
    """That the weights were changed by."""
    metrics: dict[str, float]
    skipped: str = ""
    """Why nothing was changed, as `kind:figures` (trainer.on_bad_step = skip); empty where something was."""
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    """Rollouts that no update was made of, and why: all of the window where nothing was changed, or those whose every
    update was refused."""

    @property
    def is_mismatched(self) -> bool:
        """Whether it was skipped as trainer and sampler disagree, or did when they could last be compared."""
        return self.skipped.startswith(MISMATCH)


@dataclass(slots=True)
class Pass:
    """What came of scoring samples: of this rank, then of all."""

    loss: float = 0.0
    seen: list[Seen] = field(default_factory=list[Seen])
    mismatch: str = ""
    """How trainer and sampler disagree, by the first part in which they do; empty where they do not."""
    logprobs: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By sample, of its sampled tokens; of a look alone."""

    def add(self, part: Tensor, seen: Seen, mismatch: str) -> None:
        self.loss += part.item()
        self.seen.append(seen)
        self.mismatch = self.mismatch or mismatch

    @staticmethod
    def of(parts: list[Pass]) -> Pass:
        return Pass(
            sum(part.loss for part in parts),  # fsum refuses inf - inf, which is a fault like others
            [seen for part in parts for seen in part.seen],
            next((part.mismatch for part in parts if part.mismatch), ""),
            {number: tensor for part in parts for number, tensor in part.logprobs.items()},
        )


def skipped(fault: str, loss: float, norm: float, metrics: dict[str, float], left_out: Mapping[str, str]) -> StepResult:
    """Records hold numbers only; what was none is in the reason."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    loss, norm = (value if math.isfinite(value) else 0.0 for value in (loss, norm))
    return StepResult(loss, norm, 0, finite, fault, left_out)
