"""Where a run's windows come from when it asks for its rollouts itself: asks, reads, waits, drains. Live training.

Unblocked by the last member of a group, or its deadline, which counts from its first record; `unrecorded.py` says what
becomes of a group of which none comes. Asks for no more groups than pacing allows (`pacing.py`); a group dropped as a
whole may be replaced between versions, in a transaction of its own (`service.py`): where group after group fails, ever
more slowly, and a warning says why. Groups that agents did answer, but that teach nothing or are incomplete, are what
dynamic sampling goes through: their replacements wait for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from fulgurite.schemas.ids import now_ns
from fulgurite.streams.trainer.checkpoints import SourceState
from fulgurite.streams.trainer.ending import cancel_outstanding
from fulgurite.streams.trainer.intake import Intake
from fulgurite.streams.trainer.naming import Naming
from fulgurite.streams.trainer.pacing import groups_allowed
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.progress import waiting_for, why_dropped
from fulgurite.streams.trainer.reader import POLL_SECONDS, TrajectoryReader
from fulgurite.streams.trainer.recovery import Run
from fulgurite.streams.trainer.unrecorded import Unrecorded
from fulgurite.streams.trainer.windows import Window

logger = logging.getLogger(__name__)

REPLACE_SECONDS = (1.0, 60.0)
"""Least time between two askings for replacements of groups that failed, first and in the end: if everything fails,
runners are not flooded. Of other groups: always the first."""

REPORT_SECONDS = 10.0
"""How often a long wait says what it waits for."""

DRAIN_SECONDS = 60.0
"""Longest that the end of a run waits for cancelled rollouts to end."""


class Pauses:
    """Between askings for replacements, while one window fills."""

    def __init__(self) -> None:
        self._asked = self._asked_for_failed = float("-inf")
        self.for_failed = REPLACE_SECONDS[0]
        """Until failed groups are replaced again."""

    def replaceable(self, now: float, missing: int, failed: int) -> int:
        """How many groups may be asked for now, of so many that are missing, so many of them because they failed."""
        if not missing or now - self._asked < REPLACE_SECONDS[0]:
            return 0
        failed = min(failed, missing)
        if failed and now - self._asked_for_failed >= self.for_failed:
            self._asked_for_failed, self.for_failed = now, min(2 * self.for_failed, REPLACE_SECONDS[1])
            failed = 0
        if missing > failed:
            self._asked = now
        return missing - failed


class Asking:
    """Fills `run.windows` from trajectories that it has asked for."""

    def __init__(self, plan: Plan, run: Run, reader: TrajectoryReader, intake: Intake, naming: Naming) -> None:
        self._plan = plan
        self._naming = naming
        self._run = run
        self._reader = reader
        self._intake = intake
        self._failed_before = run.windows.groups_failed
        """Failed groups in place of which others have been asked for."""
        url, lost_after = plan.settings.coordinator.url, plan.trainer.lost_after_seconds
        self._unrecorded = Unrecorded(url, run.windows, lost_after)
        self._waits_since: dict[int, float] = {}
        """Complete groups, and when that was seen."""

    async def window(self) -> Window | None:
        """Reads until there is a window for the current version."""
        reported = time.monotonic()
        pauses = Pauses()
        limit = self._plan.trainer.window_seconds
        while True:
            now = time.monotonic()
            due = limit is not None and now - min(self._waits_since.values(), default=now) >= limit
            window = self._run.windows.take(self._run.version)
            if window is None and due and await self._reader.caught_up():
                # What lies in Kafka is there, too: the time may have passed while a step was trained.
                window = self._run.windows.take(self._run.version, least=1)
            self._waits_since = {index: self._waits_since.get(index, now) for index in self._run.windows.waiting}
            if window is not None:
                return window
            await self._naming.relieve()
            await self._naming.bury()
            failed = self._run.windows.groups_failed - self._failed_before
            if count := pauses.replaceable(now, self._missing_groups(), failed):
                await self._replace_groups(count, pauses.for_failed)
            await self._read()
            if now - reported >= REPORT_SECONDS:
                reported = now
                self._unrecorded.give_up(now_ns())
                told = self._unrecorded.told(now_ns())
                logger.info("step %d: %s%s", self._run.step + 1, waiting_for(self._run.windows), told)
                self._unrecorded.look()

    def ask(self, steps_done: int) -> range:
        """The groups that may be asked for now; they count as asked from here on, also in the checkpoint."""
        windows = self._run.windows
        first = windows.asked
        windows.asked = max(first, self._allowed(steps_done))
        self._failed_before = windows.groups_failed
        return range(first, windows.asked)

    def state(self) -> SourceState | None:
        """A run of its own has no source."""
        return None

    async def drain(self) -> None:
        """At the end: until every rollout of the run has ended, or for DRAIN_SECONDS."""
        windows = self._run.windows
        outstanding = windows.outstanding()
        if not outstanding:
            return
        logger.info("the run is over: cancelling %d rollouts and waiting for their ends", len(outstanding))
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

    async def close(self) -> None:
        await self._unrecorded.close()

    async def _read(self) -> None:
        """Takes in what has come; closes groups that waited long enough, once nothing of them can lie unread."""
        now = now_ns()
        for record in await self._reader.poll(POLL_SECONDS):
            self._intake.take_in(record, now)
        if self._run.windows.deadline_due(now) and await self._reader.caught_up():
            self._run.windows.close(self._run.windows.deadline_due(now))

    async def _replace_groups(self, count: int, pause_seconds: float) -> None:
        windows = self._run.windows
        held = self._missing_groups() - count
        groups = range(windows.asked, windows.asked + count)
        windows.asked += count
        self._failed_before = windows.groups_failed - held
        reasons = why_dropped(self._run.windows)
        level = logging.WARNING if pause_seconds == REPLACE_SECONDS[1] else logging.INFO
        message = "asking for %d groups in place of dropped ones; rollouts dropped since the last step: %s"
        logger.log(level, message, len(groups), reasons or "none")
        await self._naming.bury(groups)

    def _missing_groups(self) -> int:
        return max(0, self._allowed(self._run.step) - self._run.windows.asked)

    def _allowed(self, steps_done: int) -> int:
        trainer = self._plan.trainer
        return groups_allowed(
            groups_settled=self._run.windows.groups_settled,
            steps_left=trainer.steps - steps_done,
            groups_per_step=trainer.groups_per_step,
            pacing_staleness=trainer.pacing_staleness,
        )
