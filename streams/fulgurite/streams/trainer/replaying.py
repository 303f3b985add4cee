"""Where a run's windows come from when it trains on another run's rollouts, as they come or long after.

    source's `training` ─► next step ─► `trajectories` up to its offsets ─► groups the source settled ─► windows

Asks for nothing and cancels nothing. Windows follow from the log alone (`source.py`, `Windows.settle`), so a replay
done twice, or killed and started again, trains on the same rollouts in the same order.

Staleness of a replay is that of the source: versions between a token and the version that the source trained when it
settled the group. `trainer.max_staleness` bounds it as it does there. Within the group it is measured where the ledger
counts versions of another policy than the one that sampled (`source.resource`), and in a selection. How far this run's
own policy is from the one that sampled, versions of another run cannot tell: the recorded logprobs do, in the metrics
`rollout_corr/*` and `sampling/effective_sample_size`, which trainer.max_mismatch_kl and
trainer.min_effective_sample_size bound.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice

from fulgurite.schemas.errors import StartError
from fulgurite.schemas.training import RolloutsDecided, RunFinished, TrainingStep
from fulgurite.streams.trainer.asking import REPORT_SECONDS
from fulgurite.streams.trainer.checkpoints import SourceState
from fulgurite.streams.trainer.intake import Intake
from fulgurite.streams.trainer.ledger import passes_over
from fulgurite.streams.trainer.naming import Naming
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.reader import POLL_SECONDS, TrajectoryReader
from fulgurite.streams.trainer.recovery import Run
from fulgurite.streams.trainer.selection import SelectedGroup, selection
from fulgurite.streams.trainer.source import SourceLedger
from fulgurite.streams.trainer.windows import Window

logger = logging.getLogger(__name__)


class Replaying:
    """Fills `run.windows` with the groups that the source run settled, step by step of its ledger."""

    def __init__(
        self, plan: Plan, run: Run, reader: TrajectoryReader, intake: Intake, naming: Naming, ledger: SourceLedger
    ) -> None:
        self._plan = plan
        self._run = run
        self._reader = reader
        self._intake = intake
        self._naming = naming
        self._ledger = ledger
        self._state = run.source or SourceState()
        self._cut = 0
        self._reported = time.monotonic()

    async def window(self) -> Window | None:
        """The next window; None where the source is over, and nothing more than it is to be waited for."""
        while True:
            # Until there is none: what a window holds must not depend on how far the ledger was read.
            window = self._run.windows.take(self._run.version)
            if window is not None or self._state.over:
                return window
            await self._naming.relieve()
            await self._settle_next()

    def ask(self, steps_done: int) -> range:
        """A replay asks for nothing."""
        return range(0)

    def state(self) -> SourceState | None:
        """For the checkpoint."""
        return self._state.model_copy(update={"offsets": dict(self._ledger.offsets)})

    async def drain(self) -> None:
        """Nothing of a replay is on its way."""

    async def close(self) -> None:
        await self._ledger.close()

    async def _settle_next(self) -> None:
        event = await self._ledger.next(POLL_SECONDS)
        match event:
            case TrainingStep() | RolloutsDecided():
                await self._settle(event)
            case RunFinished():
                logger.info("the source run %s is over: %s", event.run_id, event.reason)
                self._state.over = True
            case None if not self._plan.source.follow and await self._ledger.at_end():
                logger.info("the source run %s has got to step %d", self._plan.source.run_id, self._state.step)
                self._state.over = True
            case None if time.monotonic() - self._reported >= REPORT_SECONDS:
                self._reported = time.monotonic()
                logger.info(
                    "step %d: waiting for the source run %s to make step %d",
                    self._run.step + 1, self._plan.source.run_id, self._state.step + 1,
                )  # fmt: skip
            case _:
                pass

    async def _settle(self, step: TrainingStep | RolloutsDecided) -> None:
        """Everything that the source had read by this record is read; then its groups are ours to use."""
        await self._read_up_to({int(partition): offset for partition, offset in step.offsets.items()})
        decided = dict.fromkeys(step.rollout_ids, "") | {each.rollout_id: each.reason for each in step.dropped}
        version = None if self._plan.is_own_policy else step.version_in
        within_groups = version is not None and step.resource != self._plan.sampling_resource
        cut = self._run.windows.settle(decided, version, within_groups=within_groups)
        if cut and not self._cut:
            # Asked for, unless all of the source's rollouts were.
            logger.log(
                logging.WARNING if self._plan.source.begin == "beginning" else logging.INFO,
                "step %d of the source: %d groups lie before source.begin = %s, or Kafka forgot them; such groups are "
                "left out", step.step, cut, self._plan.source.begin,
            )  # fmt: skip
        self._cut += cut
        if isinstance(step, TrainingStep):
            self._state.step = step.step

    async def _read_up_to(self, offsets: dict[int, int]) -> None:
        have = self._reader.offsets
        if not offsets.keys() <= have.keys():
            await self._reader.found_added()  # the source has found new partitions before us
        while any(have[number] < offset for number, offset in offsets.items() if number in have):
            for record in await self._reader.poll(POLL_SECONDS):
                self._intake.take_in(record, 0)
            await self._naming.bury()


class Selected:
    """Fills `run.windows` with the groups of a selection, in its order."""

    def __init__(self, plan: Plan, run: Run, reader: TrajectoryReader, intake: Intake, naming: Naming) -> None:
        self._plan = plan
        self._run = run
        self._reader = reader
        self._intake = intake
        self._naming = naming
        self._state = run.source or SourceState()
        self._groups: Iterator[SelectedGroup] | None = None

    async def window(self) -> Window | None:
        """The next window; None where the selection is used up."""
        if self._groups is None:
            self._groups = islice(selection(self._plan, self._run.kept), self._state.groups, None)
        while True:
            window = self._run.windows.take(self._run.version)
            if window is not None or self._state.over:
                return window
            await self._naming.relieve()
            group = next(self._groups, None)
            if group is None:
                self._state.over = True
            else:
                await self._put(group)
                self._state.groups += 1

    def ask(self, steps_done: int) -> range:
        """A replay asks for nothing."""
        return range(0)

    def state(self) -> SourceState | None:
        """For the checkpoint."""
        return self._state.model_copy()

    async def drain(self) -> None:
        """Nothing of a replay is on its way."""

    async def close(self) -> None:
        """Holds nothing of its own."""

    async def _put(self, group: SelectedGroup) -> None:
        records = await self._reader.read_at(group.partition, group.offsets)
        members = [member for record in records if (member := self._intake.member(record))]
        for trajectory in (member.trajectory for member in members):
            if group.group_id != (trajectory.group_id or trajectory.rollout_id):
                raise StartError(
                    f"rollout {trajectory.rollout_id} of group {trajectory.group_id} lies where source.sql found group "
                    f"{group.group_id}: {self._plan.topic} was made anew; start another run (trainer.run_id)"
                )
        if passes_over(self._run.windows, self._state.groups, [each.trajectory.rollout_id for each in members]):
            return
        self._run.windows.put(self._state.groups, members)
