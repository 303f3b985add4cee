"""What is run: a cell is one way of training, a seed one repetition of it. Pure: names, sizes and settings.

Every cell of a seed begins with the same model and gets the same tasks, so that cells are compared seed by seed. A
group size other than the base's keeps the rollouts of a step: more groups of fewer, or fewer of more. Rollouts of
several problems keep the problems of a step and how often each is tried.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fulgurite.schemas.settings import TrainerSettings

FORMAT = 1
"""Of a finished cell's file: another one makes every cell be run anew."""

RESOURCE = "policy"

Rewarded = Literal["rollout", "expression", "problem"]
"""What has a reward. rollout: it alone; expression: its first call, too, 1 for an expression whose value is the answer;
problem: the rollout's reward is the sum of its calls', each of which has an equal part of what its problem earned."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    seeds: int = 5
    steps: int = 40
    rollouts_per_step: int = 128
    heldout_tasks: int = 256
    evaluate_every: int = 8
    warm_start_steps: int = 350


QUICK = Sizes(seeds=2, steps=12, rollouts_per_step=64, heldout_tasks=128, evaluate_every=6, warm_start_steps=350)


@dataclass(frozen=True)
class Cell:
    """One way of training."""

    name: str
    group_size: int = 8
    lag: int = 0
    """How many versions behind the policy samples, exactly; less only in the first steps, where there is none older."""
    correction: Literal["clip", "truncate", "none"] = "clip"
    credit: Literal["rollout", "call"] = "rollout"
    credit_discount: float = 1.0
    rewarded: Rewarded = "rollout"
    problems: int = 1
    """Of a rollout, one after another; its reward is their mean. More of them: fewer rollouts in a step."""

    def settings(self, seed: int, sizes: Sizes, model: Path, output: Path) -> TrainerSettings:
        """As for `fulgurite train`: what is not said here is the default there."""
        return TrainerSettings(
            run_id=f"{self.name}-{seed}",
            resource=RESOURCE,
            model=model,
            output=output,
            steps=sizes.steps,
            groups_per_step=sizes.rollouts_per_step // (self.group_size * self.problems),
            group_size=self.group_size,
            max_staleness=max(self.lag, 4),
            correction=self.correction,
            credit=self.credit,
            credit_discount=self.credit_discount,
            seed=seed,
        )


BASE = Cell("base")
CELLS: tuple[Cell, ...] = (
    BASE,
    Cell("lag4", lag=4),
    Cell("lag4-uncorrected", lag=4, correction="none"),
    Cell("lag16", lag=16),
    Cell("lag16-truncated", lag=16, correction="truncate"),
    Cell("lag16-uncorrected", lag=16, correction="none"),
    Cell("groups-of-2", group_size=2),
    Cell("groups-of-32", group_size=32),
    Cell("per-call", credit="call"),
    Cell("per-call-rewarded", credit="call", credit_discount=0.0, rewarded="expression"),
    Cell("four-problems", problems=4),
    Cell("four-problems-per-call", credit="call", credit_discount=0.0, rewarded="problem", problems=4),
)


@dataclass(frozen=True)
class Comparison:
    """Two cells that differ in one thing, and what the literature says of it."""

    better: str
    worse: str
    expected: str


COMPARISONS: tuple[Comparison, ...] = (
    Comparison("base", "lag4-uncorrected", "data 4 versions old without correction costs something"),
    Comparison("lag4", "lag4-uncorrected", "correction gives some of it back"),
    Comparison("base", "lag16-uncorrected", "data 16 versions old without correction costs much"),
    Comparison("lag16", "lag16-uncorrected", "the clip of the ratio gives some of it back"),
    Comparison("lag16-truncated", "lag16-uncorrected", "so do truncated importance weights"),
    Comparison("base", "lag16", "corrected, old data still learns more slowly than fresh"),
    Comparison("base", "groups-of-2", "a baseline of one other rollout is noisier than of seven"),
    Comparison("base", "groups-of-32", "as many rollouts of a quarter of the tasks say less"),
    Comparison("base", "per-call", "the final reward alone, seen from each call, has a biased baseline"),
    Comparison("per-call-rewarded", "base", "a reward for the first call says which of the two was at fault"),
    Comparison("base", "four-problems", "one reward for four problems does not say which was solved"),
    Comparison("four-problems-per-call", "four-problems", "each call judged by its own problem says it again"),
)


def key(cell: Cell, seed: int, sizes: Sizes, start: Mapping[str, Any]) -> str:
    """Of everything that a finished cell depends on, so that one of other sizes is not taken for it. `start` is what
    made its start model. Defaults of a cell are left out: a new way of training leaves finished ones valid."""
    default = asdict(Cell(cell.name))
    differs = {name: value for name, value in asdict(cell).items() if value != default[name]}
    what: dict[str, Any] = {
        "format": FORMAT,
        "name": cell.name,
        "cell": differs,
        "seed": seed,
        "start": dict(start),
        **asdict(sizes),
    }
    del what["seeds"]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return f"{cell.name}-{seed}-{digest}"
