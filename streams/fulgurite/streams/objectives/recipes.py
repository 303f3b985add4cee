"""The published objectives by name: which surrogate, advantage, aggregation and clip each paper combines. No torch.

Settings are checked against these before torch is loaded; policy_losses.py holds what the names of surrogates mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fulgurite.streams.objectives.aggregation import Aggregation

SurrogateName = Literal["clipped", "sequence_clipped", "cispo", "reinforce"]


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds of the ratio: [1 - low, 1 + high]; `dual`, above 1, bounds what a negative advantage can cost."""

    low: float
    high: float
    dual: float | None = None

    def __post_init__(self) -> None:
        if not (0.0 <= self.low <= 1.0 and self.high >= 0.0):
            raise ValueError(f"a clip needs 0 <= low <= 1 and high >= 0, not {self.low} and {self.high}")
        if self.dual is not None and self.dual <= 1.0 + self.high:
            raise ValueError(f"a dual clip must lie above 1 + high = {1.0 + self.high}, not at {self.dual}")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A published recipe: the surrogate, with what its paper combines it with. Parts may be replaced one by one."""

    surrogate: SurrogateName
    """A name in policy_losses.SURROGATES."""
    advantage: str
    """A name in advantages.ESTIMATORS."""
    aggregation: Aggregation
    clip: Clip
    source: str

    def with_clip(self, low: float | None, high: float | None, dual: float | None) -> PolicyLoss:
        """The same with some bounds replaced; None keeps the recipe's."""
        return replace(
            self,
            clip=Clip(
                self.clip.low if low is None else low,
                self.clip.high if high is None else high,
                self.clip.dual if dual is None else dual,
            ),
        )


_PPO_CLIP = Clip(0.2, 0.2)

POLICY_LOSSES: Mapping[str, PolicyLoss] = MappingProxyType(
    {
        "grpo": PolicyLoss("clipped", "group_normalised", "sequence_mean", _PPO_CLIP, "arXiv:2402.03300"),
        "dr_grpo": PolicyLoss("clipped", "mean_centred", "sequence_sum", _PPO_CLIP, "arXiv:2503.20783"),
        "dapo": PolicyLoss("clipped", "group_normalised", "token_mean", Clip(0.2, 0.28), "arXiv:2503.14476"),
        "gspo": PolicyLoss(
            "sequence_clipped", "group_normalised", "sequence_mean", Clip(3e-4, 4e-4), "arXiv:2507.18071, section 5.1"
        ),
        # 5 = 1 + high is ScaleRL's bound (arXiv:2510.13786); the paper of CISPO names none.
        "cispo": PolicyLoss("cispo", "group_normalised", "token_mean", Clip(1.0, 4.0), "arXiv:2506.13585"),
        "rloo": PolicyLoss("clipped", "leave_one_out", "token_mean", _PPO_CLIP, "arXiv:2402.14740"),
        "reinforce_plus_plus": PolicyLoss("clipped", "batch_normalised", "token_mean", _PPO_CLIP, "arXiv:2501.03262"),
        "reinforce_plus_plus_baseline": PolicyLoss(
            "clipped", "group_mean_batch_normalised", "token_mean", _PPO_CLIP, "arXiv:2501.03262"
        ),
        "ppo": PolicyLoss("clipped", "group_normalised", "token_mean", _PPO_CLIP, "arXiv:1707.06347"),
        "ppo_dual_clip": PolicyLoss(
            "clipped", "group_normalised", "token_mean", Clip(0.2, 0.2, dual=3.0), "arXiv:1912.09729"
        ),
        "reinforce": PolicyLoss("reinforce", "leave_one_out", "token_mean", _PPO_CLIP, "Williams 1992"),
        # With the advantage 1 it is the negative log likelihood.
        "sft": PolicyLoss("reinforce", "one", "token_mean", _PPO_CLIP, "maximum likelihood"),
    }
)


def find(name: str) -> PolicyLoss:
    """The recipe of this name. Raises ValueError naming those there are."""
    if name not in POLICY_LOSSES:
        raise ValueError(f"no policy loss is named {name!r}; there are {', '.join(POLICY_LOSSES)}")
    return POLICY_LOSSES[name]
