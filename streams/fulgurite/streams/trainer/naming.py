"""What is written between versions, once too much of it waits for the next step: dropped rollouts by name (see
`ledger.py`), and dead letters."""

from __future__ import annotations

import logging

from fulgurite.schemas.training import RolloutsDecided
from fulgurite.streams.trainer.intake import Intake
from fulgurite.streams.trainer.ledger import is_full, take_over
from fulgurite.streams.trainer.metrics import Metrics
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.publishing import Publishing
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.recovery import Run

logger = logging.getLogger(__name__)


class Naming:
    """For whoever fills a run's windows, to be asked after each `take` that gave none."""

    def __init__(
        self,
        plan: Plan,
        run: Run,
        publishing: Publishing,
        reader: TrajectoryReader,
        intake: Intake,
        metrics: Metrics,
    ) -> None:
        self._plan = plan
        self._run = run
        self._publishing = publishing
        self._reader = reader
        self._intake = intake
        self._metrics = metrics

    async def relieve(self) -> None:
        """In a transaction of its own, if need be. Offsets stay those of the last version."""
        run = self._run
        if not is_full(run.windows) or not (dropped := take_over(run.windows)):
            return
        event = RolloutsDecided(
            run_id=self._plan.run_id,
            step=run.step + 1,
            resource=self._plan.trainer.resource,
            version_in=run.version,
            version_out=run.version,
            dropped=dropped,
            offsets={str(partition): offset for partition, offset in self._reader.offsets.items()},
        )
        await self._publishing.more(run.marker(), run.committed_offsets, range(0), [], run.buried, event)
        self._metrics.dropped(dropped)
        logger.info("step %d: named %d dropped rollouts before it", event.step, len(dropped))

    async def bury(self, groups: range = range(0)) -> None:
        """Dead letters, where they fill up; else they wait for the transaction that moves the offsets. The marker says
        which have gone, so they are not written again: for who reads in the order of the log. With `groups`, which are
        asked for, if there are any."""
        run = self._run
        letters = self._intake.take_dead_letters() if self._intake.is_full else []
        if letters:
            run.buried = dict(self._reader.offsets)
        if letters or groups:
            await self._publishing.more(run.marker(), run.committed_offsets, groups, letters, run.buried)
