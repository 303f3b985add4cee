"""The trainer: from finished rollouts to a new policy version, again and again.

    trajectories ─► intake ─► windows ─► samples ─► learner ─► checkpoint ─► ONE transaction ─► resources, training,
                                ▲                                                 │             rollouts, dead_letters
                                └────── pacing: how many groups may be asked for ─┘

Consumes the `trajectories` of its run; waits for a window of complete groups; unblocked by the last member, or the
deadline.

A version is one transaction. For each step:

1. A window is filled from `trajectories` (read_committed, every partition, assigned by hand).
2. The learner makes one optimizer step.
3. A checkpoint is written under a temporary name, fsynced and renamed: weights, optimizer, random state, next offsets,
   open groups with their trajectories, groups asked for, the ledger not yet published.
4. One Kafka transaction gets the version on `resources`, the step on `training`, the next groups' `queued` on
   `rollouts`, dead letters, and the consumed offsets with a marker.
5. It commits.
6. Old versions' files are removed.

What a crash leaves, between
- 1, 2, 3: nothing. The last committed version is loaded, its offsets are read again; a half-written folder is removed.
- 3 and 5: a checkpoint nobody was told of. It is removed; the broker aborts the transaction; then as above. A
  transaction whose answer was lost is asked for by its offsets (`streams/transactions.py`) before anything else is
  done.
- 5 and 6: old files, removed after the next step.

So what a version was made of is read again exactly, and given the same windows it becomes the same bits. A zombie is
fenced: the transactional id names the run, and its checkpoint cannot replace a committed one. Another writer of the
same resource ends the run before step 3 (`ownership.py`).

Between versions a group dropped as a whole may be replaced: a transaction of `queued` and the marker, offsets
unchanged. The first transaction of a run publishes the starting weights, `run_started` and the first groups; the last
one `run_finished` with everything that was still on its way. Every rollout asked for is in exactly one of these
records.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fulgurite.producers.logs import configure_logging
from fulgurite.producers.service import run_service
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import TRAINING
from fulgurite.schemas.training import RunFinished
from fulgurite.streams.learners.launch import launched_rank, launched_ranks
from fulgurite.streams.trainer.checkpoints import Checkpoint, Checkpoints, RunState, copy_companions
from fulgurite.streams.trainer.ending import cancel_outstanding
from fulgurite.streams.trainer.events import Marker, outgoing, started_event
from fulgurite.streams.trainer.intake import Intake
from fulgurite.streams.trainer.ownership import Ownership
from fulgurite.streams.trainer.pacing import groups_allowed
from fulgurite.streams.trainer.plan import Plan, make_plan
from fulgurite.streams.trainer.progress import Progress, waiting_for
from fulgurite.streams.trainer.publishing import Publishing
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.recovery import Run, recover
from fulgurite.streams.trainer.samples import TrainingSet, read_limits, training_set
from fulgurite.streams.trainer.windows import Window
from fulgurite.streams.transactions import Transactions

if TYPE_CHECKING:
    from fulgurite.streams.learners.learner import StepResult

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""How long one look for trajectories waits; a deadline is noticed within it."""

REPLACE_SECONDS = 1.0
"""Least time between two askings for replacements: if everything fails at once, runners are not flooded."""

REPORT_SECONDS = 10.0
"""How often a long wait says what it waits for."""

DRAIN_SECONDS = 60.0
"""Longest that the end of a run waits for cancelled rollouts to end."""


def main(settings: Settings) -> int:
    """`fulgurite train`: exit code 0 when the run is over, or was asked to stop. Under torchrun one process of many."""
    if launched_rank() == 0:
        return run_service("trainer", settings.log, lambda stop: serve(settings, stop))
    from fulgurite.streams.learners.ranks import follow

    configure_logging(f"trainer-{launched_rank()}", settings.log)
    follow(settings.trainer)
    return 0


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Trains until the run is over or `stop` is set. A stop leaves what a crash leaves: nothing half done."""
    training = asyncio.create_task(_train(make_plan(settings)))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({training, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not training.done():
            logger.info("stopping; started again with the same trainer.run_id, the run goes on from its last version")
            if launched_ranks() > 1:
                os._exit(128 + signal.SIGTERM)  # a collective that waits for another rank cannot be interrupted
    finally:
        stopping.cancel()
        training.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await training


async def _train(plan: Plan) -> None:
    kafka = plan.settings.kafka
    # A restart or a second trainer of the same run fences this one: see the contract.
    transactions = Transactions(kafka, transactional_id=plan.name, group=plan.name)
    reader = TrajectoryReader(kafka, plan.topic)
    checkpoints = Checkpoints(plan.trainer.output, plan.run_id)
    try:
        await transactions.start()
        await reader.start()
        ownership = Ownership(kafka, plan.trainer.resource, plan.run_id)
        run = await recover(plan, transactions, reader, checkpoints, ownership)
        if run is not None:
            trainer = Trainer(plan, run, Publishing(plan, transactions), reader, checkpoints, ownership)
            await trainer.train()
        await _release_ranks(run)
    finally:
        await reader.close()
        await transactions.close()


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
    ) -> None:
        self._plan = plan
        self._run = run
        self._publishing = publishing
        self._reader = reader
        self._checkpoints = checkpoints
        self._ownership = ownership
        limits = read_limits(run.companions)
        self._intake = Intake(plan.settings.kafka, plan.run_id, plan.trainer.resource, limits, run.windows)
        self._progress = Progress(plan.trainer.steps, run.step)

    async def train(self) -> None:
        await self._start()
        logger.info("ready: run %s, version %d", self._plan.run_id, self._run.version)
        while self._run.step < self._plan.trainer.steps:
            await self.make_version()
        await self._finish()

    async def make_version(self) -> None:
        """Steps 1 to 6 of the contract, once."""
        run = self._run
        self._progress.begin()
        window = await self.fill()  # 1
        self._progress.filled()
        training, result = await self._optimize_and_check(window)  # 2
        self._progress.optimized()
        groups = self._ask(steps_done=run.step + 1)
        checkpoint = await self.write_checkpoint(run.version + 1, run.step + 1)  # 3
        event = self._progress.event(self._plan, checkpoint, window, training, result, run.windows)
        dead_letters = self._intake.take_dead_letters()
        await self._publishing.version(checkpoint, event, groups, dead_letters)  # 4 and 5
        run.version, run.step = checkpoint.state.version, checkpoint.state.step
        run.committed_offsets = dict(checkpoint.state.offsets)
        run.companions = checkpoint.weights
        await self.remove_old()  # 6
        self._progress.report(event)

    async def fill(self) -> Window:
        """1. Reads until there is a window for the current version."""
        reported = time.monotonic()
        asked = 0.0
        while True:
            window = self._run.windows.take(self._run.version)
            if window is not None:
                return window
            now = time.monotonic()
            if self._intake.is_full or (self._missing_groups() and now - asked >= REPLACE_SECONDS):
                asked = now
                await self._ask_between_versions()
            await self._read()
            if now - reported >= REPORT_SECONDS:
                reported = now
                logger.info("step %d: %s", self._run.step + 1, waiting_for(self._run.windows))

    async def optimize(self, window: Window) -> tuple[TrainingSet, StepResult | None]:
        """2. One optimizer step; None where no group of the window has a signal: then the weights stay as they are, and
        so they do where the learner skips a bad step.

        Such a window still makes a version (of the same weights), so that versions, steps and pacing stay in step.
        """
        training = training_set(window, self._plan.trainer)
        if not training.samples:
            logger.warning("step %d: no group's rewards differ; the weights stay as they are", self._run.step + 1)
            return training, None
        result = await asyncio.to_thread(self._run.learner.step, training.samples, window.version_in)
        return (training.skipped(result.skipped) if result.skipped else training), result

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
            offsets=dict(self._reader.offsets),
            asked=run.windows.asked,
        )

        def save_weights(folder: Path) -> None:
            run.learner.save_weights(folder)
            copy_companions(run.companions, folder)

        return await asyncio.to_thread(
            self._checkpoints.write, state, run.windows, save_weights, run.learner.save_state
        )

    async def remove_old(self) -> None:
        """6. What no server needs any more."""
        await asyncio.to_thread(self._checkpoints.prune, self._plan.trainer.keep_versions)

    async def _start(self) -> None:
        """The first transaction of a run, or word that it goes on."""
        run = self._run
        event = started_event(self._plan.trainer, self._plan.run_id, run.step, run.version)
        if run.is_new:
            groups = self._ask(steps_done=0)
            checkpoint = await self.write_checkpoint(run.version, 0)
            await self._publishing.version(checkpoint, event, groups, [])
            run.companions = checkpoint.weights
        else:
            record = outgoing(self._plan.settings.kafka, TRAINING, event.run_id, event)
            groups = self._ask(steps_done=run.step)
            await self._publishing.more(self._marker(), run.committed_offsets, groups, [record])

    async def _finish(self) -> None:
        """The last transaction: everything that is still on its way is dropped as `run_ended`, by name."""
        run = self._run
        outstanding = run.windows.outstanding()
        if outstanding:
            logger.info("the run is over: cancelling %d rollouts and waiting for their ends", len(outstanding))
            await self._drain()
        event = RunFinished(
            event_id=f"{self._plan.run_id}-finished",
            run_id=self._plan.run_id,
            step=run.step,
            resource=self._plan.trainer.resource,
            version=run.version,
            dropped=run.windows.end(),
            reason=f"{run.step} steps done",
        )
        dead_letters = self._intake.take_dead_letters()
        await self._publishing.finished(event, self._marker(), self._reader.offsets, dead_letters)
        logger.info("run %s finished: %d steps, version %d", self._plan.run_id, run.step, run.version)

    async def _drain(self) -> None:
        """Until every rollout of the run has ended, or for DRAIN_SECONDS."""
        windows = self._run.windows
        url, reason = self._plan.settings.coordinator.url, f"run {self._plan.run_id} is over"
        cancelling = asyncio.create_task(cancel_outstanding(url, windows.outstanding, reason))
        deadline = time.monotonic() + DRAIN_SECONDS
        try:
            while windows.outstanding() and time.monotonic() < deadline:
                await self._read()
        finally:
            cancelling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cancelling

    async def _read(self) -> None:
        """Takes in what has come; closes groups that waited long enough, once nothing of them can lie unread."""
        now = now_ns()
        for record in await self._reader.poll(POLL_SECONDS):
            self._intake.take_in(record, now)
        if self._run.windows.deadline_due(now) and await self._reader.caught_up():
            self._run.windows.close(self._run.windows.deadline_due(now))

    async def _ask_between_versions(self) -> None:
        groups = self._ask(steps_done=self._run.step)
        letters = self._intake.take_dead_letters()
        if groups:
            logger.info("asking for %d groups in place of dropped ones", len(groups))
        await self._publishing.more(self._marker(), self._run.committed_offsets, groups, letters)

    def _missing_groups(self) -> int:
        return max(0, self._allowed(self._run.step) - self._run.windows.asked)

    def _ask(self, steps_done: int) -> range:
        """The groups that may be asked for now; they count as asked from here on, also in the checkpoint."""
        windows = self._run.windows
        first = windows.asked
        windows.asked = max(first, self._allowed(steps_done))
        return range(first, windows.asked)

    def _allowed(self, steps_done: int) -> int:
        return groups_allowed(
            steps_done=steps_done,
            steps=self._plan.trainer.steps,
            groups_per_step=self._plan.trainer.groups_per_step,
            pacing_staleness=self._plan.trainer.pacing_staleness,
            groups_dropped=self._run.windows.groups_dropped,
        )

    def _marker(self) -> Marker:
        return Marker(version=self._run.version, step=self._run.step, asked=self._run.windows.asked)
