"""Where a run's windows come from when it learns from demonstrations: from the run's own file, and the step.

Promises: which of them are in the window of a step follows from step and seed alone, so a restart goes on with exactly
the next ones: each once in a pass, in an order drawn anew for every pass. Asks for nothing and reads no topic. The log
probabilities that a sampler would have recorded are not there; metrics that compare with them are left out.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.trainer.checkpoints import SourceState
from fulgurite.streams.trainer.demonstrations import Demonstration, prepared
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.recovery import Run
from fulgurite.streams.trainer.windows import Member, Window

if TYPE_CHECKING:
    from fulgurite.streams.learners.learner import StepResult

_OF_A_SAMPLER = ("rollout_corr/", "sampling/", "actor/ppo_kl", "actor/pg_clipfrac")


class Demonstrating:
    """Fills windows from demonstrations; asks for nothing."""

    def __init__(self, plan: Plan, run: Run) -> None:
        self._plan = plan
        self._run = run
        self._demonstrations: list[Demonstration] = []

    async def window(self) -> Window | None:
        """The step's demonstrations."""
        if not self._demonstrations:
            self._demonstrations = list(prepared(self._plan, self._run.kept))
        size, count = self._plan.trainer.groups_per_step, len(self._demonstrations)
        first = self._run.step * size
        members: list[Member] = []
        for number in range(first // count, (first + size - 1) // count + 1):
            wanted = range(max(first, number * count), min(first + size, (number + 1) * count))
            drawn = order(count, self._plan.trainer.seed, number)
            members += [self._member(drawn[position % count], number) for position in wanted]
        return Window(self._run.version, [[member] for member in members], [])

    def ask(self, steps_done: int) -> range:
        return range(0)

    def state(self) -> SourceState | None:
        """The step says where the run stands."""
        return None

    async def drain(self) -> None:
        """Nothing is on its way."""

    async def close(self) -> None:
        """Holds nothing of its own."""

    def _member(self, index: int, number: int) -> Member:
        demonstration = self._demonstrations[index]
        length = len(demonstration.token_ids)
        sequence = TokenSequence(
            token_ids=demonstration.token_ids,
            loss_mask=demonstration.loss_mask,
            logprobs=[0.0] * length,
            # As old as the version that is trained: nothing of it is ever stale.
            weight_versions=[VersionSpan(version=self._run.version, start=0, end=length)],
        )
        rollout_id = f"{self._plan.run_id}-d{index}-p{number}"
        shown = Trajectory(rollout_id=rollout_id, status="succeeded", sequences=[sequence], reward=1.0)
        return Member(shown, "", self._run.version)


def order(count: int, seed: int, number: int) -> list[int]:
    """The order of pass `number` over `count` demonstrations."""
    found = list(range(count))
    random.Random(f"{seed}/{number}").shuffle(found)
    return found


def without_sampler(result: StepResult) -> StepResult:
    """Without what compares with a sampler: there was none."""
    kept = {name: value for name, value in result.metrics.items() if not name.startswith(_OF_A_SAMPLER)}
    return replace(result, metrics=kept)
