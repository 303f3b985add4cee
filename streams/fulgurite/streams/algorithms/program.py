"""The inputs of an algorithm between what was read and what is committed: steps 3 to 5 of the contract (service.py).

    read ─► buffer ─► window: [done, done, at work, done, at work …] ─► the done ones at its beginning are committed

Promises: an input is committed after all before it, of every partition in the order of its log; its events, what its
groups then are, and the offset behind it go into one transaction. Bounds: WINDOW inputs, algorithm.concurrency of them
at work, COMMIT_BYTES in a transaction. Does not know what the function does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka.structs import TopicPartition

from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import DEAD_LETTERS
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.commits import Commits
from fulgurite.streams.algorithms.definition import Algorithm
from fulgurite.streams.algorithms.events import is_own
from fulgurite.streams.algorithms.groups import Change, Group, Groups, GroupState, Record
from fulgurite.streams.algorithms.memory import remembering
from fulgurite.streams.algorithms.work import Worker
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.transactions import Hook, Outgoing, Transactions

logger = logging.getLogger(__name__)

WINDOW = 2_000
"""Inputs read but not committed: done ones wait in it for the oldest."""
COMMIT_BYTES = 16 << 20
"""Of events in one transaction; the first input's go in whatever their size."""
COMMIT_SECONDS = 0.05
"""Least time between two transactions: they cost the broker as much as thousands of records."""

_POLL_SECONDS = 0.25
_REFRESH_SECONDS = 3_600.0
"""How often unchanged offsets are committed, too: Kafka forgets an offset that nobody commits for a week."""
_REPORT_SECONDS = 10.0


@dataclass(slots=True)
class Input:
    """A record, or a group that waited long enough, on its way."""

    record: Record | None
    task: asyncio.Task[list[Outgoing]] | None
    """None where there is nothing to do."""
    remember: Mapping[str, GroupState | None]

    @property
    def done(self) -> bool:
        return self.task is None or self.task.done()


class Program:
    """The window of inputs between what was read and what is committed."""

    def __init__(
        self,
        settings: Settings,
        algorithm: Algorithm,
        groups: Groups,
        reader: TrajectoryReader,
        transactions: Transactions,
        hook: Hook,
    ) -> None:
        self._kafka = settings.kafka
        self._concurrency = settings.algorithm.concurrency
        self._algorithm = algorithm
        self._topic = settings.kafka.topic(algorithm.topic)
        self._groups = groups
        self._reader = reader
        self._commits = Commits(transactions, reader.partitions)
        self._hook = hook
        self._worker = Worker(settings, algorithm)
        self._buffer: deque[Record] = deque()
        self._window: deque[Input] = deque()
        self._read_to = dict(reader.offsets)
        """Behind what the last finished poll gave. `reader.offsets` may be further: a poll may be under way."""
        self._working = 0
        self._changed = asyncio.Event()
        self._polling: asyncio.Task[list[Record]] | None = None
        self._committing: asyncio.Task[None] | None = None
        self._due: list[str] = []
        """Groups found to have waited long enough, and the ends of the log at that time."""
        self._due_ends: dict[TopicPartition, int] = {}
        self._counts: Counter[str] = Counter()
        self._reported = self._refreshed = time.monotonic()
        self._committed_at = 0.0

    async def run(self) -> None:
        """3. to 5., for ever."""
        while True:
            self._start_work()
            if self._algorithm.reads == "groups":
                await self._close_groups()
            if self._committing is not None and self._committing.done():
                self._committing.result()
                self._committing = None
            if self._committing is None and self._pause() == 0.0:
                # Beside what goes on: reading and the function do not wait for the broker's transaction.
                self._committing = asyncio.create_task(self._commit())
            elif self._committing is None and time.monotonic() - self._refreshed > _REFRESH_SECONDS:
                await self._publish([], {})
            self._report()
            await self._wait()

    async def close(self) -> None:
        """Ends what is under way; nothing of it was published."""
        tasks = {item.task for item in self._window if item.task is not None}
        waits: set[asyncio.Task[Any]] = {*tasks, *(one for one in (self._polling, self._committing) if one is not None)}
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _wait(self) -> None:
        """Until there is something to read or to commit, or the function is done with something."""
        pause = None if self._committing is not None else self._pause()
        if pause == 0.0 or (self._buffer and self._room()):
            return
        if self._polling is None and not self._buffer:
            self._polling = asyncio.create_task(self._reader.poll(_POLL_SECONDS))
        changed = asyncio.create_task(self._changed.wait())
        others = (self._polling, self._committing)
        waits: set[asyncio.Task[Any]] = {changed, *(one for one in others if one is not None)}
        try:
            await asyncio.wait(waits, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        self._changed.clear()
        if self._polling is not None and self._polling.done():
            found, self._polling = self._polling.result(), None
            self._buffer.extend(sorted(found, key=lambda record: (record.partition, record.offset)))
            self._read_to = dict(self._reader.offsets)
            if found:
                self._hook("read")

    def _pause(self) -> float | None:
        """Seconds until what is done may be committed; None where the oldest input is not done."""
        if not self._window or not self._window[0].done:
            return None
        full = len(self._window) >= WINDOW
        return 0.0 if full else max(0.0, self._committed_at + COMMIT_SECONDS - time.monotonic())

    def _room(self) -> bool:
        return self._working < self._concurrency and len(self._window) < WINDOW

    def _start_work(self) -> None:
        """3. As many of the records read as there is room for."""
        while self._buffer and self._room():
            record = self._buffer.popleft()
            if is_own(record.headers, self._algorithm.name):
                self._window.append(Input(record, None, {}))
                continue
            events, dead = self._worker.events_of(record)
            if self._algorithm.reads == "groups":
                self._join_groups(record, [event for _, event in events])
                continue
            self._counts["inputs"] += len(events)
            task = asyncio.create_task(self._worker.on_events(record, events)) if events else None
            self._append(record, task, {})
            if dead:
                self._append(record, asyncio.create_task(_given(dead)), {})

    def _join_groups(self, record: Record, events: list[object]) -> None:
        for event in events:
            assert isinstance(event, Trajectory)
            self._apply(record, self._groups.add(record, event, time.monotonic()))
            if (overfull := self._groups.overfull()) is not None:
                self._apply(record, self._groups.close(overfull, time.monotonic()))
        if not events:
            self._append(record, None, {})

    def _apply(self, record: Record | None, change: Change) -> None:
        self._append(record, self._on_group(change.group), change.remember)

    def _on_group(self, group: Group | None) -> asyncio.Task[list[Outgoing]] | None:
        if group is None:
            return None
        self._counts["groups"] += 1
        return asyncio.create_task(self._worker.on_group(group.trajectories(), group.records()))

    def _append(
        self,
        record: Record | None,
        task: asyncio.Task[list[Outgoing]] | None,
        remember: Mapping[str, GroupState | None],
    ) -> None:
        self._window.append(Input(record, task, remember))
        if task is not None:
            self._working += 1
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[list[Outgoing]]) -> None:
        self._working -= 1
        self._changed.set()

    async def _close_groups(self) -> None:
        """Closes groups that waited long enough, once all that was in the log by then has been taken in: also of
        partitions that the reader has not heard of yet."""
        if not self._due:
            self._due = self._groups.due(time.monotonic())
            self._due_ends = await self._reader.all_ends() if self._due else {}
        taken = self._points(self._buffer)
        if self._due and all(taken.get(tp.partition, 0) >= end for tp, end in self._due_ends.items()):
            due_then = set(self._due)
            for group_id in self._groups.due(time.monotonic()):
                if group_id in due_then:
                    self._apply(None, self._groups.close(group_id, time.monotonic()))
            self._due = []

    async def _commit(self) -> None:
        """4. What is done, from the oldest on; 5. in one transaction."""
        records: list[Outgoing] = []
        remember: dict[str, GroupState | None] = {}
        size, taken = 0, False
        while self._window and self._window[0].done and size < COMMIT_BYTES:
            if taken and _failed(self._window[0]):
                break  # what comes before it is committed first, or a restart would do all of it again, for ever
            item, taken = self._window.popleft(), True
            # A record that makes two inputs ends with the second: neither is committed without the other.
            made = item.task.result() if item.task is not None else []
            size += sum(len(record.value or b"") for record in made)
            records += made
            remember.update(item.remember)
            while self._window and item.record is not None and self._window[0].record is item.record:
                second = self._window[0]
                if second.task is not None:
                    await asyncio.wait({second.task})
                    records += second.task.result()
                remember.update(second.remember)
                self._window.popleft()
        self._hook("taken")
        await self._publish(records, remember)
        self._hook("done")

    async def _publish(self, records: list[Outgoing], remember: Mapping[str, GroupState | None]) -> None:
        """5."""
        letters = sum(record.topic == self._kafka.topic(DEAD_LETTERS) for record in records)
        self._counts["dead letters"] += letters
        self._counts["events"] += len(records) - letters
        states = [
            remembering(self._kafka, self._algorithm.name, name, None if state is None else state.model_dump())
            for name, state in remember.items()
        ]
        await self._commits.commit([*records, *states], self._offsets())
        self._committed_at = self._refreshed = time.monotonic()

    def _offsets(self) -> dict[TopicPartition, int]:
        """Behind what is done: the oldest record of each partition that is not, or as far as was read. A partition of
        which no poll has come back yet has none."""
        waiting = [*(item.record for item in self._window if item.record is not None), *self._buffer]
        return {TopicPartition(self._topic, number): at for number, at in self._points(waiting).items()}

    def _points(self, waiting: Iterable[Record]) -> dict[int, int]:
        points = dict(self._read_to)
        for record in waiting:
            points[record.partition] = min(points[record.partition], record.offset)
        return points

    def _report(self) -> None:
        """One line of what happened since the last one."""
        counts = self._counts + self._groups.counts
        if counts and time.monotonic() - self._reported > _REPORT_SECONDS:
            self._reported = time.monotonic()
            said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            logger.info("%s; %d inputs at work, %d groups open", said, self._working, len(self._groups))
            self._counts.clear()
            self._groups.counts.clear()


def _failed(item: Input) -> bool:
    return item.task is not None and not item.task.cancelled() and item.task.exception() is not None


async def _given(records: list[Outgoing]) -> list[Outgoing]:
    return records
