"""One assigned partition: resumes where the tables end, then inserts its records in batches, one batch at a time.

The steps of the contract (see the package) are in this file, by number: `_resume` is 0, `_write` is 1 and 2; 3 and 4
are left to the service, which does them for all partitions at once. Bounds: the batch and the buffer, in records and
bytes; an interrupted range is read to its end beyond them, since it was one batch once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from fulgurite.consumers.materialiser.blocks import LINE_TOPICS, MAX_LINES, Partition, Record, halves, missing
from fulgurite.consumers.materialiser.metrics import Lag, Metrics
from fulgurite.consumers.materialiser.offsets import Intent, Lost, Offsets
from fulgurite.consumers.materialiser.store import LogEntry, Rejected, Store, Unavailable
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import MaterialiserSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_BYTES = 64 * 1024 * 1024
"""Most bytes of one insert, unless its first record alone is larger: ClickHouse parses a block in one piece, and holds
about six times as much meanwhile. An insert costs some 70 ms of CPU whatever its size, and every part is merged later:
large ones are cheaper."""
BATCH_LINES = MAX_LINES
"""Most lines of one insert: a row needs memory however short its line is."""
LINGER_RATIO = 12
"""A partition waits this many times as long as its last insert took: an insert costs the server tens of milliseconds of
CPU however few records it has, and on a busy machine many small ones would slow down what they observe."""
RETRY_SECONDS = (0.2, 5.0)
"""First and longest pause between tries."""
REPLAY_WAIT_SECONDS = 10.0
"""So long without a record, and the end of an interrupted range is looked for: compaction may have removed it."""
QUIET_SECONDS = 0.1
"""How often the server is asked whether an insert still runs."""

Checkpoint = Callable[[str, Partition], Awaitable[None]]
"""Awaited after each step with its name: tests crash there."""


async def no_checkpoint(step: str, partition: Partition) -> None:
    """Nothing to see."""


class Consumer(Protocol):
    """What is needed of aiokafka's consumer."""

    def pause(self, *partitions: TopicPartition) -> None: ...
    def resume(self, *partitions: TopicPartition) -> None: ...
    def seek(self, partition: TopicPartition, offset: int) -> None: ...
    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]: ...
    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]: ...
    async def position(self, partition: TopicPartition) -> int: ...


@dataclass(slots=True)
class Budget:
    """Bytes that all partitions hold together, in buffers and in inserts. A few busy partitions may use most of it."""

    bytes: int = 0
    """Up to this nobody is limited to its share."""
    used: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """What all partitions share."""

    settings: MaterialiserSettings
    consumer: Consumer
    store: Store
    offsets: Offsets
    inserts: asyncio.Semaphore
    """Inserts at once, over all partitions."""
    finished: Callable[[LogEntry], None]
    checkpoint: Checkpoint = no_checkpoint
    budget: Budget = field(default_factory=Budget)
    metrics: Metrics = field(default_factory=Metrics)


@dataclass(frozen=True, slots=True)
class Batch:
    lo: int
    hi: int
    records: Sequence[Record]
    doubtful: bool = False
    """Whether some of it may be in the tables, or may still arrive there."""


class PartitionWriter:
    """Give it records with `append`, run it with `run`; cancel that to stop."""

    def __init__(self, partition: Partition, parts: Parts, buffer_bytes: int) -> None:
        self.partition = partition
        self._tp = TopicPartition(partition.name, partition.number)
        self._parts = parts
        self._buffer_bytes = buffer_bytes
        self._buffer: deque[Record] = deque()
        self._bytes = 0
        self._inserting_bytes = 0
        self._inserting: Sequence[Record] = ()
        self._seen_ms = 0
        """Kafka's time of the newest record read."""
        self._arrived = asyncio.Event()
        self._waiting_since = 0.0
        """When the buffer was last empty and got a record."""
        self._paused = True
        self._resumed = False
        self._next = 0
        """Lowest offset that is still of interest."""
        self._skip: set[int] = set()
        """Offsets from _next on that are in the tables."""
        self._replay: Intent | None = None
        self._linger_seconds = parts.settings.batch_wait_ms / 1000
        self._last_complaint = 0.0

    def append(self, records: Sequence[Record]) -> None:
        """Takes records in the order of the log. Never waits: beyond its bounds the partition is not fetched from."""
        if not self._resumed:
            return  # fetched before `seek`, which makes them come again
        if not self._buffer:
            self._waiting_since = time.monotonic()
        for record in records:
            if record.offset >= self._next:
                self._next = record.offset + 1
                self._seen_ms = record.timestamp
                if record.offset not in self._skip:
                    self._buffer.append(record)
                    self._hold(_size(record))
        self._arrived.set()
        if self._full() and not self._paused and not self._inside_replay():
            self._paused = True
            self._parts.consumer.pause(self._tp)

    def _hold(self, size: int) -> None:
        self._bytes += size
        self._parts.budget.used += size

    def _full(self) -> bool:
        """A whole batch waits while another is inserted; or less, where all together hold more than they may."""
        budget = self._parts.budget
        return (
            len(self._buffer) >= 2 * self._parts.settings.batch_records
            or self._bytes >= max(BATCH_BYTES, self._buffer_bytes)
            or (self._bytes >= self._buffer_bytes and budget.used >= budget.bytes)
        )

    async def run(self) -> None:
        """Until cancelled, or until the partition is Lost. Raises StartError when the topic is another one than
        before."""
        metrics = self._parts.metrics
        try:
            metrics.resuming(*self._labels)
            await self._resume()
            metrics.resumed(*self._labels)
            while True:
                batch = await self._next_batch()
                self._inserting = batch.records
                started = time.monotonic()
                await self._write(batch)
                seconds = time.monotonic() - started
                metrics.inserted(*self._labels, len(batch.records), self._inserting_bytes, seconds)
                self._release(self._inserting_bytes)
                self._inserting, self._inserting_bytes = (), 0
                self._parts.finished(LogEntry(self.partition, batch.lo, batch.hi, len(batch.records)))
        except (Lost, IllegalStateError):  # the latter from seek and resume, of a partition that was just revoked
            logger.info("%s: belongs to another consumer now", self.partition)
        finally:
            metrics.gone(*self._labels)
            self._release(self._inserting_bytes + self._bytes)

    @property
    def _labels(self) -> tuple[str, int]:
        return self.partition.name, self.partition.number

    def lag(self, end: int | None, now_ms: int) -> Lag:
        """`end`: one more than the last offset that may be read, where it is known."""
        waiting = self._inserting or self._buffer
        unread = max(0, (end or 0) - self._next) if self._resumed else 0
        records = len(self._inserting) + len(self._buffer) + unread
        oldest_ms = waiting[0].timestamp if waiting else self._seen_ms
        # Offsets that only hold a transaction's marker are unread for ever; they come after everything seen.
        behind = bool(waiting) or (unread > 0 and self._paused)
        return Lag(records, max(0.0, (now_ms - oldest_ms) / 1000) if behind else 0.0)

    def _release(self, size: int) -> None:
        self._parts.budget.used -= size

    async def _resume(self) -> None:
        """0: from the tables, whatever Kafka says was committed."""
        store = self._parts.store
        logged = await self._patiently("resume", lambda: store.logged(self.partition))
        intent = await self._parts.offsets.intent(self._tp)
        present = await self._patiently("resume", lambda: self._present_when_quiet(logged))
        begin, end = await self._patiently("resume", self._ends)
        known = max(logged, max(present, default=-1) + 1)
        if known > end:
            raise StartError(
                f"{self.partition} ends at offset {end}, but ClickHouse has its records up to {known - 1}: the topic "
                "was deleted and created again, or this database belongs to another cluster. Use another "
                "kafka.topic_prefix or clickhouse.database, or delete this topic's rows, also those of ingest_log"
            )
        if begin > logged > 0:
            expired = (self.partition, begin - logged)
            logger.error("%s: %d offsets expired before they were read", *expired, extra=self._place(logged))
        # Whatever lies before the intent was done when it was said; within it a table may still lack its part.
        done = {
            offset
            for offset, tables in present.items()
            if intent is None or not intent.lo <= offset <= intent.hi or not missing(self.partition.topic, tables)
        }
        self._next = max(logged, begin)
        while self._next in done:
            done.discard(self._next)
            self._next += 1
        self._skip = done
        if intent is not None and intent.hi >= self._next:
            self._replay = intent
        elif self._next > begin and self._next > logged:
            # 3 and 4 of what the predecessor had inserted: lag monitors would else see it until the next record.
            self._parts.finished(LogEntry(self.partition, max(logged, begin), self._next - 1, 0))
        found = (self.partition, self._next, len(present))
        logger.info("%s: resumes at offset %d, %d later ones are there", *found, extra=self._place(self._next))
        self._parts.consumer.seek(self._tp, self._next)
        self._resumed = True
        self._unpause()
        await self._parts.checkpoint("resumed", self.partition)

    async def _ends(self) -> tuple[int, int]:
        """First offset that is there, and one more than the last that may be read."""
        consumer = self._parts.consumer
        begin, end = await consumer.beginning_offsets([self._tp]), await consumer.end_offsets([self._tp])
        return begin[self._tp], end[self._tp]

    async def _present_when_quiet(self, lo: int) -> dict[int, int]:
        """Offsets in the tables, and in which, once no insert for this partition runs: what is not there then was not
        and will not be inserted, but by somebody who holds the token of the same intent."""
        while await self._parts.store.inserting(self.partition):  # noqa: ASYNC110 (the server has nothing to wait on)
            await asyncio.sleep(QUIET_SECONDS)
        return await self._parts.store.present(self.partition, lo)

    async def _next_batch(self) -> Batch:
        settings = self._parts.settings
        while not self._buffer:
            self._arrived.clear()
            await self._arrived.wait()
        if self._replay is not None and self._buffer[0].offset <= self._replay.hi:
            return await self._replayed(self._replay)
        # What came during the last insert has waited since then: the next one may be due already.
        deadline = self._waiting_since + max(settings.batch_wait_ms / 1000, self._linger_seconds)
        while len(self._buffer) < settings.batch_records and self._bytes < BATCH_BYTES:
            if not await self._more(deadline):
                break
        return self._cut(settings.batch_records)

    async def _replayed(self, intent: Intent) -> Batch:
        """The interrupted range once more, whole: with its own boundaries and therefore its own token."""
        if self._buffer[0].offset < intent.lo:
            # Only after ClickHouse went back to an older copy of itself: records below the intent are gone from it.
            below = sum(1 for record in self._buffer if record.offset < intent.lo)
            return self._cut(min(below, self._parts.settings.batch_records))
        if self._paused and self._inside_replay():
            self._unpause()
        passed = False
        while self._next <= intent.hi:
            if await self._more(time.monotonic() + REPLAY_WAIT_SECONDS):
                continue
            if passed:  # and nothing has come since: the offsets up to hi do not exist any more
                break
            passed = await self._parts.consumer.position(self._tp) > intent.hi
            if not passed:
                lacking = (self.partition, self._next, intent.hi)
                what = "%s: waiting for offsets %d..%d of an interrupted insert"
                logger.warning(what, *lacking, extra=self._place(self._next))
        self._replay = None
        records = self._take(sum(1 for record in self._buffer if record.offset <= intent.hi))
        return Batch(intent.lo, intent.hi, records, doubtful=True)

    def _inside_replay(self) -> bool:
        """Whether what is missing of the interrupted range is all that is fetched now."""
        intent = self._replay
        if intent is None or self._next > intent.hi:
            return False
        return not self._buffer or self._buffer[0].offset >= intent.lo

    async def _more(self, deadline: float) -> bool:
        """Waits for further records until the deadline; False when it passed."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    def _cut(self, limit: int) -> Batch:
        size, lines, count = 0, 0, 0
        for record in self._buffer:
            size += _size(record)
            lines += self._lines(record)
            if count and (count >= limit or size > BATCH_BYTES or lines > BATCH_LINES):
                break
            count += 1
        records = self._take(count)
        return Batch(records[0].offset, records[-1].offset, records)

    def _lines(self, record: Record) -> int:
        # A line feed is a frequent byte of protobuf, and says nothing there.
        return (record.value or b"").count(b"\n") + 1 if self.partition.topic in LINE_TOPICS else 1

    def _take(self, count: int) -> list[Record]:
        records = [self._buffer.popleft() for _ in range(count)]
        taken = sum(_size(record) for record in records)
        self._bytes -= taken
        self._inserting_bytes += taken
        self._skip = {offset for offset in self._skip if offset >= self._next} if self._skip else self._skip
        if self._paused and not self._full():
            self._unpause()
        return records

    def _unpause(self) -> None:
        self._paused = False
        self._parts.consumer.resume(self._tp)

    async def _write(self, batch: Batch) -> None:
        """1 and 2, until the batch is in."""
        doubtful, pause = batch.doubtful, RETRY_SECONDS[0]
        while True:
            # 1: whoever is not of the group any more gets no further. Said again before every try.
            await self._parts.offsets.intend(self._tp, Intent(batch.lo, batch.hi))
            await self._parts.checkpoint("intended", self.partition)
            records, present = batch.records, {}
            try:
                if doubtful:
                    present = await self._present_when_quiet(batch.lo)
                    topic = self.partition.topic
                    records = [record for record in records if missing(topic, present.get(record.offset, 0))]
                # 2: one block, one token.
                if records:
                    await self._insert(records, batch, present)
                await self._parts.checkpoint("inserted", self.partition)
                return
            except Unavailable as error:
                doubtful = True
                self._parts.metrics.retried(*self._labels, f"cannot insert: {error}")
                self._complain("insert", error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])

    async def _insert(self, records: Sequence[Record], batch: Batch, present: Mapping[int, int]) -> None:
        async with self._parts.inserts:
            started = time.monotonic()
            try:
                token = self.partition.token(batch.lo, batch.hi)
                await self._parts.store.insert(self.partition, records, token, present)
            except Rejected as error:
                await self._bisect(records, batch.lo, batch.hi, present, error)
            # But not longer than the setting: that bounds how late what is produced can be asked for.
            longest_seconds = self._parts.settings.max_batch_wait_ms / 1000
            self._linger_seconds = min(LINGER_RATIO * (time.monotonic() - started), longest_seconds)

    async def _bisect(
        self, records: Sequence[Record], lo: int, hi: int, present: Mapping[int, int], error: Rejected
    ) -> None:
        """Halves until the record that ClickHouse will not take stands alone; that one becomes a dead letter."""
        if len(records) == 1:
            offset = records[0].offset
            what = "%s: offset %d becomes a dead letter: %s"
            logger.warning(what, self.partition, offset, error, extra=self._place(offset))
            self._parts.metrics.rejected(*self._labels)
            await self._parts.store.insert_dead(self.partition, records[0], str(error))
            return
        for first, last, half in halves(records, lo, hi):
            try:
                token = self.partition.token(first, last) + "-half"
                await self._parts.store.insert(self.partition, half, token, present)
            except Rejected as worse:
                await self._bisect(half, first, last, present, worse)

    async def _patiently(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        pause = RETRY_SECONDS[0]
        while True:
            try:
                return await ask()
            except (Unavailable, KafkaError) as error:
                self._parts.metrics.retried(*self._labels, f"cannot {what}: {error}")
                self._complain(what, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])

    def _place(self, offset: int | None = None) -> dict[str, str | int]:
        """Fields of a line of the log, for whoever collects it."""
        place: dict[str, str | int] = {"topic": self.partition.name, "partition": self.partition.number}
        return place if offset is None else place | {"offset": offset}

    def _complain(self, what: str, error: Exception) -> None:
        """At most once in five seconds."""
        now = time.monotonic()
        if now - self._last_complaint >= 5:
            self._last_complaint = now
            logger.warning("%s: cannot %s, trying again: %s", self.partition, what, error, extra=self._place())


def _size(record: Record) -> int:
    # 64: the columns beside key and value.
    return len(record.value or b"") + len(record.key or b"") + 64
