"""The trainer: from finished rollouts to a new policy version, again and again.

    trajectories ─► intake ─► windows ─► samples ─► learner ─► checkpoint ─► ONE transaction ─► resources, training,
                                ▲                                                 │             rollouts, dead_letters
                                └────── pacing: how many groups may be asked for ─┘

Consumes the `trajectories` of its run (`asking.py`), or of another one (`replaying.py`); waits for a window of complete
groups; unblocked by the last member, the deadline, or the other run's ledger.

A version is one transaction. For each step:

1. A window is filled from `trajectories` (read_committed, every partition, assigned by hand), and which groups it has
   is written beside the checkpoints, fsynced.
2. The learner makes one optimizer step.
3. A checkpoint is written under a temporary name, fsynced and renamed: weights, optimizer, random state, next offsets,
   open groups with their trajectories, groups asked for, the ledger not yet published, since which version the weights
   are these, and whether the sampler was last found to disagree.
4. One Kafka transaction gets the version on `resources`, the step on `training`, the next groups' `queued` on
   `rollouts`, dead letters, and the consumed offsets with a marker.
5. It commits.
6. Old versions' files are removed.

What a crash leaves, between
- 1, 2, 3: nothing but the names of the window's groups. The last committed version is loaded, its offsets are read
  again, the same groups are taken; a half-written folder is removed.
- 3 and 5: a checkpoint nobody was told of. It is removed, once an empty transaction has shown that what was found is
  no successor's (`leftovers.py`); the broker aborts the transaction; then as above. A transaction whose answer was
  lost is asked for by its offsets (`streams/transactions.py`) before anything else is done.
- 5 and 6: old files, removed after the next step.

So what a version was made of is read again exactly, and becomes the same bits. A zombie is fenced: the transactional id
names the run. It may learn that no sooner than in 4, behind a checkpoint; whose run it is takes that one's place, once
an empty transaction has shown whose it is (`occupied.py`), and no zombie's can replace a committed one. So of two
starts at a time one goes on, the one that fenced the other. Another writer of the same resource ends the run before
step 3 (`ownership.py`).

Between versions a group dropped as a whole may be replaced: a transaction of `queued` and the marker, offsets
unchanged; and many dropped rollouts may be named, whose groups a restart then passes over (`ledger.py`). The first
transaction of a run publishes the starting weights, `run_started` and the first groups; the last one `run_finished`
with everything that was still on its way. Every rollout asked for is in exactly one of these records.

A replay keeps the same contract: it asks for nothing, and its checkpoint (3) also says how far the source's ledger was
read. Each rollout of the source that it has read is in exactly one of its own records, under its own run_id.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from fulgurite.producers.logs import configure_logging
from fulgurite.producers.service import run_service
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.training import RunFinished
from fulgurite.streams.learners.launch import launched_rank, launched_ranks
from fulgurite.streams.trainer.asking import Asking
from fulgurite.streams.trainer.checkpoints import Checkpoint, Checkpoints, RunState, copy_companions
from fulgurite.streams.trainer.demonstrating import Demonstrating, without_sampler
from fulgurite.streams.trainer.events import started_event
from fulgurite.streams.trainer.intake import Intake
from fulgurite.streams.trainer.metrics import Metrics
from fulgurite.streams.trainer.naming import Naming
from fulgurite.streams.trainer.occupied import Occupied
from fulgurite.streams.trainer.ownership import Ownership
from fulgurite.streams.trainer.plan import Plan, check_source, make_plan
from fulgurite.streams.trainer.progress import Progress
from fulgurite.streams.trainer.publishing import Publishing
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.recovery import Run, recover
from fulgurite.streams.trainer.replaying import Replaying, Selected
from fulgurite.streams.trainer.sample import Sample
from fulgurite.streams.trainer.samples import TrainingSet, of_others, of_same_weights, training_set
from fulgurite.streams.trainer.source import SourceLedger, adopt
from fulgurite.streams.trainer.windows import Window
from fulgurite.streams.transactions import Transactions

if TYPE_CHECKING:
    from fulgurite.streams.learners.learner import StepResult

logger = logging.getLogger(__name__)

Supply = Asking | Replaying | Selected | Demonstrating
"""Where a run's windows come from."""


def main(settings: Settings) -> int:
    """`fulgurite train`: exit code 0 when the run is over, or was asked to stop. Under torchrun one process of many."""
    if launched_rank() == 0:
        return run_service("trainer", settings.log, lambda stop: serve(settings, stop))
    from fulgurite.streams.learners.ranks import follow

    configure_logging(f"trainer-{launched_rank()}", settings.log)
    follow()
    return 0


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Trains until the run is over or `stop` is set. A stop leaves what a crash leaves: nothing half done."""
    over = asyncio.Event()
    metrics = Metrics(settings.trainer)
    serving = asyncio.create_task(metrics.serve(settings.trainer, over))
    training = asyncio.create_task(_begin(settings, metrics))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({training, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and not training.done():
            logger.info("stopping; started again with the same trainer.run_id, the run goes on from its last version")
            if launched_ranks() > 1:
                os._exit(128 + signal.SIGTERM)  # a collective that waits for another rank cannot be interrupted
    finally:
        stopping.cancel()
        training.cancel()
        over.set()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await training
        finally:
            await serving  # raises why it ended before: its port is taken


async def _begin(settings: Settings, metrics: Metrics) -> None:
    check_source(settings)
    await _train(make_plan(await adopt(settings)), metrics)


async def _train(plan: Plan, metrics: Metrics) -> None:
    kafka = plan.settings.kafka
    # A restart or a second trainer of the same run fences this one: see the contract.
    transactions = Transactions(kafka, transactional_id=plan.name, group=plan.name)
    reader = TrajectoryReader(kafka, plan.topic)
    checkpoints = Checkpoints(plan.trainer.output, plan.run_id, plan.config())
    supply: Supply | None = None
    try:
        await transactions.start()
        await reader.start()
        ownership = Ownership(kafka, plan.trainer.resource, plan.run_id)
        run = await recover(plan, transactions, reader, checkpoints, ownership)
        if run is not None:
            publishing = Publishing(plan, transactions, reader.partitions)
            intake = Intake(plan, run.limits, run.windows, run.buried)
            naming = Naming(plan, run, publishing, reader, intake, metrics)
            supply = await _supply(plan, run, reader, intake, naming)
            await Trainer(plan, run, publishing, reader, checkpoints, ownership, intake, supply, metrics).train()
        await _release_ranks(run)
    finally:
        if supply is not None:
            await supply.close()
        await reader.close()
        await transactions.close()


async def _supply(plan: Plan, run: Run, reader: TrajectoryReader, intake: Intake, naming: Naming) -> Supply:
    """Where the windows come from."""
    if plan.trainer.demonstrations is not None:
        return Demonstrating(plan, run)
    if plan.source.begin == "sql":
        return Selected(plan, run, reader, intake, naming)
    if not plan.source.run_id:
        return Asking(plan, run, reader, intake, naming)
    ledger = SourceLedger(plan.settings.kafka, plan.source)
    await ledger.start(run.source.offsets if run.source else {})
    return Replaying(plan, run, reader, intake, naming, ledger)


async def _release_ranks(run: Run | None) -> None:
    """The other processes of torchrun end too; after an error torchrun ends them."""
    if run is not None:
        await asyncio.to_thread(run.learner.close)
    elif launched_ranks() > 1:
        from fulgurite.streams.learners.ranks import dismiss

        await asyncio.to_thread(dismiss)


class Trainer:
    """One run, from where `run` stands to its end. Each numbered step of the contract is a method."""

    def __init__(
        self,
        plan: Plan,
        run: Run,
        publishing: Publishing,
        reader: TrajectoryReader,
        checkpoints: Checkpoints,
        ownership: Ownership,
        intake: Intake,
        supply: Supply,
        metrics: Metrics,
    ) -> None:
        self._plan = plan
        self._run = run
        self._publishing = publishing
        self._reader = reader
        self._checkpoints = checkpoints
        self._ownership = ownership
        self._intake = intake
        self._supply = supply
        self._bad_steps = 0
        self._progress = Progress(plan.trainer.steps, run.step, metrics)

    async def train(self) -> None:
        logger.info("settings other than by default: %s", ", ".join(self._plan.changed()))
        await self._start()
        self._progress.ready(self._run.version)
        logger.info("ready: run %s, version %d", self._plan.run_id, self._run.version)
        while self._run.step < self._plan.trainer.steps:
            if not await self.make_version():
                await self._finish(f"its source is over; {self._run.step} steps done")
                return
        await self._finish(f"{self._run.step} steps done")

    async def make_version(self) -> bool:
        """Steps 1 to 6 of the contract, once; False where there is nothing more to train on."""
        run = self._run
        self._progress.begin()
        window = await self.fill()  # 1
        if window is None:
            return False
        self._progress.filled()
        training, result = await self._optimize_and_check(window)  # 2
        self._count_bad_step(result)
        if result and not result.skipped:
            run.windows.remember(window.version_in, result.left_out)
        self._progress.optimized()
        groups = self._supply.ask(steps_done=run.step + 1)
        checkpoint = await self.write_checkpoint(run.version + 1, run.step + 1)  # 3
        event = self._progress.event(self._plan, checkpoint, window, training, result, run.windows)
        dead_letters = self._intake.take_dead_letters()
        await self._publishing.version(checkpoint, event, groups, dead_letters)  # 4 and 5
        run.stands_at(checkpoint)
        await self.remove_old()  # 6
        self._progress.report(event)
        return True

    def _count_bad_step(self, result: StepResult | None) -> None:
        """Raises BadStep, or LogprobMismatch where the last one was one, at one too many in a row: what is wrong then
        is not a window. A restart counts anew."""
        if result is None:
            return  # a window without a signal says nothing of what is wrong, nor whether the sampler still disagrees
        self._run.is_mismatched = result.is_mismatched
        self._bad_steps = self._bad_steps + 1 if result.skipped else 0
        if self._bad_steps >= self._plan.trainer.max_bad_steps:
            from fulgurite.streams.learners.learner import too_many_bad_steps  # not at the top: it brings torch

            raise too_many_bad_steps(self._run.version, self._bad_steps, result.skipped)

    async def fill(self) -> Window | None:
        """1. Waits for a window for the current version; None where there will be none any more."""
        window = await self._supply.window()
        if window and window.choice:
            await asyncio.to_thread(self._checkpoints.choose, window.choice)
        return window

    async def optimize(self, window: Window) -> tuple[TrainingSet, StepResult | None]:
        """2. One optimizer step; None where no group of the window has a signal: then the weights stay as they are, and
        so they do where the learner skips a bad step. Rollouts that it made no update of are dropped, with its reason.

        Such a window still makes a version (of the same weights), so that versions, steps and pacing stay in step.
        """
        training = training_set(window, self._plan.trainer, self._plan.sampling_resource).apart(window.again)
        if not training.samples:
            logger.warning("step %d: no group's rewards differ; the weights stay as they are", self._run.step + 1)
            return training, None
        samples = [self._by_weights(sample, window.version_in) for sample in training.samples]
        step, is_mismatched = self._run.learner.step, self._run.is_mismatched
        result = await asyncio.to_thread(step, samples, window.version_in, training.compared, is_mismatched)
        if self._plan.trainer.demonstrations is not None:
            result = without_sampler(result)
        return training.without(result.left_out), result

    def _by_weights(self, sample: Sample, version_in: int) -> Sample:
        """Whose tokens are of `version_in` where its very weights sampled them: these are compared."""
        if not self._plan.is_own_policy:
            return of_others(sample)
        return of_same_weights(sample, self._run.weights_since, version_in)

    async def _optimize_and_check(self, window: Window) -> tuple[TrainingSet, StepResult | None]:
        """2, and meanwhile the look for another writer: a round trip or two that cost the step no time."""
        checking = asyncio.create_task(self._ownership.check())
        try:
            optimized = await self.optimize(window)
            await checking
            return optimized
        finally:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)

    async def write_checkpoint(self, version: int, step: int) -> Checkpoint:
        """3. Complete on disk, or not there."""
        run = self._run
        state = RunState(
            run_id=self._plan.run_id,
            resource=self._plan.trainer.resource,
            version=version,
            step=step,
            sha256=run.weights_sha256,
            weights_since=run.weights_since,
            is_mismatched=run.is_mismatched,
            reference_sha256=run.reference_sha256,
            lineage=self._publishing.lineage,
            offsets=dict(self._reader.offsets),
            asked=run.windows.asked,
            source=self._supply.state(),
            kept=run.kept,
        )

        def save_weights(folder: Path) -> None:
            run.learner.save_weights(folder)
            copy_companions(run.companions, folder)

        write = functools.partial(self._checkpoints.write, state, run.windows, save_weights, run.learner.save_state)
        while True:
            try:
                return await asyncio.to_thread(write)
            except Occupied as other:
                occupied = other
            try:
                await self._publishing.confirm()
            except BaseException:
                occupied.close()
                raise
            logger.warning("%s: a predecessor wrote it and will not commit it", occupied.folder)
            write = functools.partial(self._checkpoints.replace, occupied)

    async def remove_old(self) -> None:
        """6. What no server needs any more."""
        await asyncio.to_thread(self._checkpoints.prune, self._run.version, self._plan.trainer.keep_versions)

    async def _start(self) -> None:
        """The first transaction of a run, or word that it goes on."""
        run = self._run
        event = started_event(self._plan, run.step, run.version, self._publishing.lineage)
        if run.is_new:
            groups = self._supply.ask(steps_done=0)
            checkpoint = await self.write_checkpoint(run.version, 0)
            await self._publishing.version(checkpoint, event, groups, [])
            run.stands_at(checkpoint)
        else:
            groups = self._supply.ask(steps_done=run.step)
            await self._publishing.more(run.marker(), run.committed_offsets, groups, [], run.buried, event)

    async def _finish(self, reason: str) -> None:
        """The last transaction: everything that is still on its way is dropped as `run_ended`, by name."""
        run = self._run
        await self._supply.drain()
        event = RunFinished(
            event_id=f"{self._plan.run_id}-finished",
            run_id=self._plan.run_id,
            step=run.step,
            resource=self._plan.trainer.resource,
            version=run.version,
            dropped=run.windows.end(),
            reason=reason,
        )
        dead_letters = self._intake.take_dead_letters()
        await self._publishing.finished(event, run.marker(), self._reader.offsets, dead_letters)
        self._progress.finished(event)
        logger.info("run %s finished: %d steps, version %d", self._plan.run_id, run.step, run.version)
