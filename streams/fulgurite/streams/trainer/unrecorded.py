"""Groups of which no record has come: whether agents still work on them, by what the coordinator says of their ends.

A group's deadline counts from its first record. None ever comes where Kafka's retention took a rollout's records before
the assembler or an aggregator had read them, and to the trainer such a group looks like one of which they are behind.

Promises: what has ended without a record is said while a window waits for it. With `trainer.lost_after_seconds`, and
only then, a group's deadline counts as from a record so long after the last of its rollouts ended. That time is the
log's: a restart does not set it back. Nobody waits for the coordinator; while it is away nothing is known anew.
Does not close groups: windows do, once the log is read to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping

from fulgurite.producers.coordinator_client import CoordinatorClient
from fulgurite.schemas.errors import CoordinatorError
from fulgurite.streams.trainer.windows import Windows

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 256
"""Rollouts in one request: the answer has their inputs."""

TELL_SECONDS = 60.0
"""What ended longer ago than this is told: assemblers and aggregators need some time."""


class Unrecorded:
    """`look` begins to ask, at most one question at a time; what came of it is there at the next one."""

    def __init__(self, url: str, windows: Windows, lost_after_seconds: float | None) -> None:
        self._url = url
        self._windows = windows
        self._lost_after = lost_after_seconds
        self._asking: asyncio.Task[None] | None = None
        self._ended_ns: dict[str, int] = {}

    def look(self) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(self._windows.unrecorded()))

    def give_up(self, now: int) -> None:
        """Groups that ended long enough ago: their deadline counts."""
        if self._lost_after is None:
            return
        for index in self._windows.unrecorded():
            rollout_ids = self._windows.shape.rollout_ids(index)
            seconds = _seconds_over(self._ended_ns, rollout_ids, now)
            if seconds >= self._lost_after:
                group_id = self._windows.shape.group_id(index)
                logger.warning(
                    "group %s: the last of its rollouts ended %.0f s ago and no record of them has come: its deadline "
                    "counts from now on (trainer.lost_after_seconds)", group_id, seconds,
                )  # fmt: skip
                self._windows.expect(group_id, now)

    def told(self, now: int) -> str:
        """What a waiting run says of it; empty where there is nothing to say."""
        waits = [
            seconds
            for index in self._windows.unrecorded()
            if (seconds := _seconds_over(self._ended_ns, self._windows.shape.rollout_ids(index), now)) >= TELL_SECONDS
        ]
        if not waits:
            return ""
        text = f"; {len(waits)} groups have ended up to {max(waits):.0f} s ago and no record of them has come: do the "
        text += "assembler and, with assembler.output = attempts, the aggregator run, and how far behind are they?"
        if self._lost_after is None:
            text += " If Kafka's retention took what they had not read, restart with trainer.lost_after_seconds"
        return text

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._asking

    async def _ask(self, groups: list[int]) -> None:
        rollout_ids = [rollout_id for index in groups for rollout_id in self._windows.shape.rollout_ids(index)]
        found: dict[str, int] = {}
        try:
            async with CoordinatorClient(self._url) as client:
                for at in range(0, len(rollout_ids), MOST_AT_ONCE):
                    for ended in await client.wait(rollout_ids[at : at + MOST_AT_ONCE], 0.0):
                        found[ended.rollout_id] = int((ended.end_time or 0.0) * 1e9)
        except CoordinatorError as error:
            logger.warning("which rollouts have ended the coordinator did not say: %s", error)
            return
        self._ended_ns = found


def _seconds_over(ended_ns: Mapping[str, int], rollout_ids: list[str], now: int) -> float:
    """Since the last of them ended; negative where one has not."""
    if any(not ended_ns.get(rollout_id) for rollout_id in rollout_ids):
        return -1.0
    return (now - max(ended_ns[rollout_id] for rollout_id in rollout_ids)) / 1e9
