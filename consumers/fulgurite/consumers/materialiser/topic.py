"""The partitions of one topic that are ours: settles them with the tables, then inserts what is fetched, of all of them
together.

    settler   0 for all partitions that are new or in doubt, at once
    2 lanes   1 for those that have records: one insert takes of each what has room. Where there is much, each lane
              takes half of the partitions, and both cores of a small machine work. A partition is in one insert at a
              time

The steps of the contract (see the package) carry its numbers here; 2 and 3 are the service's. Bounds: an insert in
records, lines, bytes and partitions, less after one that needed too much memory or time; a pause between tries that
grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from fulgurite.consumers.materialiser.agreement import another, ends_before
from fulgurite.consumers.materialiser.blocks import (
    DEAD_LETTERS_TABLE,
    Partition,
    Slice,
    Unreadable,
    halves,
    parted,
    readable,
)
from fulgurite.consumers.materialiser.errors import NotUnderstood, OtherLog, Rejected, TooLarge, TooSlow, Unavailable
from fulgurite.consumers.materialiser.history import NEAR, Look
from fulgurite.consumers.materialiser.lone import Lone
from fulgurite.consumers.materialiser.metrics import Metrics
from fulgurite.consumers.materialiser.offsets import Lost, Offsets
from fulgurite.consumers.materialiser.partition import BATCH_BYTES, BATCH_LINES, Budget, Consumer, PartitionBuffer, Room
from fulgurite.consumers.materialiser.store import LogEntry, Store
from fulgurite.consumers.materialiser.weight import weight
from fulgurite.schemas.settings import MaterialiserSettings

logger = logging.getLogger(__name__)

LANES = 2
SPLIT_BYTES = 4 * 1024 * 1024
"""So much waits, and each lane takes half of the partitions: an insert costs tens of ms however small it is."""
MOST_PARTITIONS = 1_000
"""Of one insert. Its guard names each partition with its fence and its mark, in up to 180 bytes, and ClickHouse reads
256 KiB of a query (max_query_size): of more than this the insert could never succeed."""
LEAST_BATCH_BYTES = 256 * 1024
"""An insert is not made smaller than this because of memory or time."""
RETRY_SECONDS = (0.2, 5.0)
"""First and longest pause between tries."""
QUIET_SECONDS = 0.05
"""How often the server is asked whether an insert still runs."""
COMPLAIN_SECONDS = 5.0
LIGHT_PART = 20
"""An insert of a twentieth of what a record has as rows is not why that one lacks memory."""
TURN_SECONDS = 1.0
"""How soon it is looked whether the record that goes alone is done, of whatever topic: another waits for its turn."""
LOOK_AGAIN_SECONDS = 5.0
"""How soon it is looked again at a log that is not the one of the tables: somebody may have mended it."""

Checkpoint = Callable[[str, Partition], Awaitable[None]]
"""Awaited after each step with its name: tests crash there."""


class Looking(Protocol):
    """What is needed of History."""

    async def look(self, places: Mapping[TopicPartition, int]) -> dict[TopicPartition, Look]: ...


async def no_checkpoint(step: str, partition: Partition) -> None:
    """Nothing to see."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all topics share."""

    settings: MaterialiserSettings
    consumer: Consumer
    store: Store
    offsets: Offsets
    inserts: asyncio.Semaphore
    """Inserts at once, over all topics."""
    finished: Callable[[LogEntry], None]
    history: Looking
    topic_ids: dict[TopicPartition, str]
    """Kafka's ids of the topics whose partitions this process has settled."""
    checkpoint: Checkpoint = no_checkpoint
    budget: Budget = field(default_factory=Budget)
    metrics: Metrics = field(default_factory=Metrics)
    running: list[int] = field(default_factory=list[int])
    """Of each insert under way, its bytes."""
    suspected: set[Partition] = field(default_factory=set[Partition])
    """Of the record under way, one of all topics, that failed alone before: it may take long, others go on beside."""


class TopicWriter:
    """Run it with `run`, cancel that to stop; `wake` it when a buffer got records."""

    def __init__(self, name: str, buffers: Sequence[PartitionBuffer], shared: Shared) -> None:
        self._name = name
        self._buffers = {buffer.partition: buffer for buffer in buffers}
        self._shared = shared
        self._changed = asyncio.Event()
        """A buffer has records, or is ready."""
        self._doubt = asyncio.Event()
        """A partition is to be settled."""
        self._inserting = 0
        self._limit_bytes = BATCH_BYTES
        self._lone = Lone(time.monotonic)
        self._pause_seconds = 0.0
        self._complained = 0.0

    def wake(self) -> None:
        self._changed.set()

    def doubt(self, tp: TopicPartition, why: str) -> None:
        """Its log may be another one than the tables know: what was read of it and not taken is forgotten."""
        for buffer in self._buffers.values():
            if buffer.tp == tp and buffer.reading:
                logger.warning("%s: settled again: %s", buffer.partition, why, extra=_place(buffer.partition))
                buffer.forget()
                self._shared.metrics.retried(*_labels(buffer.partition), why)
                self._doubt.set()

    def unsettle(self, partition: Partition) -> None:
        """What the tables have of it is to be asked again."""
        if (buffer := self._buffers.get(partition)) is not None:
            buffer.settled = False
            self._doubt.set()

    async def run(self) -> None:
        """Until cancelled."""
        for buffer in self._buffers.values():
            self._shared.metrics.resuming(*_labels(buffer.partition))
        tasks = [asyncio.create_task(work()) for work in (self._settle_always, *[self._insert_always] * LANES)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:  # only an error ends one
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._give_up(list(self._buffers.values()))

    async def _settle_always(self) -> None:
        while True:
            self._doubt.clear()
            unsettled = [buffer for buffer in self._buffers.values() if not buffer.settled and not buffer.busy]
            open_ones = [buffer for buffer in unsettled if buffer.try_at <= time.monotonic()]
            if not open_ones:
                first = min((buffer.try_at for buffer in unsettled), default=None)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if first is None else first - time.monotonic()):
                        await self._doubt.wait()
                continue
            await asyncio.sleep(self._pause_seconds)
            try:
                await self._settle(open_ones)
            except (Lost, IllegalStateError):  # the latter from seek and resume, of partitions just revoked
                logger.info("%s: %d partitions belong to another consumer now", self._name, len(open_ones))
                self._give_up(open_ones)
            except (Unavailable, KafkaError) as error:
                self._failed("resume", open_ones, error)

    async def _settle(self, buffers: Sequence[PartitionBuffer]) -> None:
        """0: from the tables, whatever Kafka says was committed."""
        store = self._shared.store
        # 0.1
        logged = await store.logged([buffer.partition for buffer in buffers])
        buffers = await self._of_the_same_log(buffers, logged)
        if not buffers:
            return
        ours = [buffer.partition for buffer in buffers]
        # Whatever we have inserted since: the database may be an older copy of what it was.
        since = {partition: logged[partition] for partition in ours}
        # 0.2
        await self._shared.offsets.claim({buffer.tp: since[buffer.partition] for buffer in buffers})
        await self._at_checkpoint("claimed", ours)
        # 0.3
        fence = await store.fence(ours)
        await self._at_checkpoint("fenced", ours)
        # 0.4
        while await store.running(ours):  # noqa: ASYNC110 (the server has nothing to wait on)
            await asyncio.sleep(QUIET_SECONDS)
        # 0.5
        present = await store.present(since)
        marks = await store.marks(ours)
        begins, ends = await self._ends(buffers)
        for buffer in buffers:
            part = buffer.partition
            known = max(since[part], max(present[part], default=-1) + 1)
            if known > ends[buffer]:
                self._stand_still(buffer, ends_before(part, known, ends[buffer]))
                continue
            if begins[buffer] > since[part] > 0:
                expired = (part, begins[buffer] - since[part])
                logger.error("%s: %d offsets expired before they were read", *expired, extra=_place(part, since[part]))
            was = max(since[part], begins[buffer])
            went_back = buffer.first - was if buffer.reading else 0
            buffer.mark = marks.get(part)
            buffer.settle(fence, was, present[part])
            if went_back > 0 and buffer.first == was:
                what = "%s: the log of inserts ends %d offsets before what was inserted; read again from %d on"
                logger.warning(what, part, went_back, was, extra=_place(part, was))
            if buffer.first > was:
                # 2 and 3 of what was inserted: lag monitors would else see it until the next record.
                self._shared.finished(LogEntry(part, was, buffer.first - 1, 0))
            self._shared.metrics.resumed(*_labels(part))
            found = (part, buffer.first, len(present[part]))
            logger.info("%s: goes on at offset %d, %d later ones are there", *found, extra=_place(part, buffer.first))
        self._changed.set()
        await self._at_checkpoint("settled", ours)

    async def _of_the_same_log(
        self, buffers: Sequence[PartitionBuffer], logged: Mapping[Partition, int]
    ) -> list[PartitionBuffer]:
        """0.1: those whose log is the one that the tables have records of. The others stand still, and say so."""
        begins, ends = await self._ends(buffers)
        places = {buffer.tp: max(begins[buffer], logged[buffer.partition] - NEAR) for buffer in buffers}
        looks = await self._shared.history.look(places)
        times = await self._shared.store.times({b.partition: list(looks[b.tp].times) for b in buffers})
        found: list[PartitionBuffer] = []
        for buffer in buffers:
            part, look = buffer.partition, looks[buffer.tp]
            was = self._shared.topic_ids.get(buffer.tp, look.incarnation.topic_id)
            why = another(part, logged[part], ends[buffer], look, times[part], was)
            if why is not None:
                self._stand_still(buffer, why)
            else:
                buffer.incarnation = look.incarnation
                self._shared.topic_ids[buffer.tp] = look.incarnation.topic_id
                found.append(buffer)
        return found

    def _stand_still(self, buffer: PartitionBuffer, why: OtherLog) -> None:
        """Nothing of it is read or inserted until its log and its tables agree."""
        buffer.forget()
        buffer.try_at = time.monotonic() + LOOK_AGAIN_SECONDS
        self._shared.metrics.retried(*_labels(buffer.partition), str(why))
        logger.error("%s", why, extra=_place(buffer.partition))

    async def _ends(
        self, buffers: Sequence[PartitionBuffer]
    ) -> tuple[dict[PartitionBuffer, int], dict[PartitionBuffer, int]]:
        """First offset that is there, and one more than the last that may be read."""
        tps = [buffer.tp for buffer in buffers]
        begin = await self._shared.consumer.beginning_offsets(tps)
        end = await self._shared.consumer.end_offsets(tps)
        return {buffer: begin[buffer.tp] for buffer in buffers}, {buffer: end[buffer.tp] for buffer in buffers}

    async def _insert_always(self) -> None:
        while True:
            await self._due()
            async with self._shared.inserts:
                slices = self._cut()
                if slices:
                    await self._write(slices)

    async def _due(self) -> None:
        """Returns when an insert is worth its cost: records have waited long enough, or are as many as it takes."""
        while True:
            self._changed.clear()
            seconds = self._due_in()
            if seconds is not None and seconds <= 0:
                return
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _due_in(self) -> float | None:
        ready = self._ready()
        if not ready:
            return TURN_SECONDS if any(buffer.ready for buffer in self._buffers.values()) else None
        if sum(buffer.bytes for buffer in ready) >= self._limit_bytes:
            return 0.0
        return ready[0].waiting_since + self._shared.settings.batch_wait_ms / 1000 - time.monotonic()

    def _ready(self) -> list[PartitionBuffer]:
        """Those whose records may be taken, the longest waiting one first."""
        ready = [buffer for buffer in self._buffers.values() if buffer.ready]
        if self._shared.suspected:
            ready = [buffer for buffer in ready if not self._suspected(buffer)]
        return sorted(ready, key=lambda buffer: buffer.waiting_since)

    def _suspected(self, buffer: PartitionBuffer) -> bool:
        """Whether what it has next goes alone, because it failed alone before."""
        return self._lone.suspects(buffer.partition, buffer.oldest)

    def _cut(self) -> list[Slice]:
        """What the next insert takes: of every partition its share of the room that is left."""
        ready = self._ready()
        if suspected := [buffer for buffer in ready if self._suspected(buffer)]:
            found = suspected[0].take(Room(1), at_least_one=True)
            return [found] if found is not None else []
        if not self._inserting and sum(buffer.bytes for buffer in ready) > SPLIT_BYTES:
            ready = ready[::2]  # the other lane takes the others
        if len(ready) > MOST_PARTITIONS:
            # One of which much is left stays the longest waiting one: those that it kept waiting come first.
            ready = sorted(ready, key=lambda buffer: buffer.taken_at)[:MOST_PARTITIONS]
        records, size, lines = self._shared.settings.batch_records, self._limit_bytes, BATCH_LINES
        if self._lone.singly:
            records, ready = 1, ready[:1]
        slices: list[Slice] = []
        for number, buffer in enumerate(ready):
            left = len(ready) - number
            found = buffer.take(Room(-(-records // left), size // left, lines // left), at_least_one=not slices)
            if found is not None:
                slices.append(found)
                records -= len(found.records)
                size -= buffer.taken_bytes
                lines -= buffer.taken_lines
        return slices

    async def _write(self, slices: Sequence[Slice]) -> None:
        """1, and what becomes of it."""
        buffers = [self._buffers[part.partition] for part in slices]
        ours = [part.partition for part in slices]
        started = time.monotonic()
        self._inserting += 1
        size, others = sum(buffer.taken_bytes for buffer in buffers), sum(self._shared.running)
        self._shared.running.append(size)
        if suspected := self._lone.tries(slices) > 0:
            self._shared.suspected.add(ours[0])
        try:
            await self._at_checkpoint("cut", ours)
            await self._insert(slices)
            await self._at_checkpoint("inserted", ours)
        except Unavailable as error:
            if isinstance(error, TooLarge | TooSlow):
                await self._too_much(slices, buffers, error, max(others, sum(self._shared.running) - size))
            for buffer in buffers:
                buffer.give_back()
            self._failed("insert", buffers, error)
        else:
            self._done(slices, buffers, time.monotonic() - started)
        finally:
            self._inserting -= 1
            self._shared.running.remove(size)
            if suspected:
                self._shared.suspected.discard(ours[0])
            self._changed.set()
            if not all(buffer.settled for buffer in buffers):
                self._doubt.set()  # also of one that was doubted meanwhile: while it was busy, nobody settled it

    async def _too_much(
        self, slices: Sequence[Slice], buffers: Sequence[PartitionBuffer], error: Unavailable, others: int
    ) -> None:
        """It needed too much memory or time. `others`: bytes of ours that were inserted at the same time."""
        if sum(len(part.records) for part in slices) > 1:
            self._lone.failed_together(slices, least=self._limit_bytes <= LEAST_BATCH_BYTES)
            taken = min(self._limit_bytes, sum(buffer.taken_bytes for buffer in buffers))
            self._limit_bytes = max(LEAST_BATCH_BYTES, taken // 2)
            return
        (part,), (buffer,) = slices, buffers
        rows_bytes = await asyncio.to_thread(weight, part.partition.topic, part.records[0])
        self._lone.failed(slices, error, rows_bytes, alone=LIGHT_PART * others <= rows_bytes)
        first, longest = RETRY_SECONDS
        if tries := self._lone.tries(slices):  # others that succeed meanwhile do not shorten its pause
            buffer.try_at = time.monotonic() + min(first * 2 ** min(tries, 10), longest)

    def _done(self, slices: Sequence[Slice], buffers: Sequence[PartitionBuffer], seconds: float) -> None:
        self._pause_seconds = 0.0
        self._lone.done(slices)
        if 3 * seconds < self._shared.settings.insert_seconds:  # twice as much will hardly take too long
            self._limit_bytes = min(2 * self._limit_bytes, BATCH_BYTES)
        sizes = [(*_labels(buffer.partition), len(buffer.taken), buffer.taken_bytes) for buffer in buffers]
        self._shared.metrics.inserted(self._name, sizes, seconds)
        for part, buffer in zip(slices, buffers, strict=True):
            first, last = buffer.done()
            gaps = buffer.gaps(last)
            self._shared.finished(LogEntry(part.partition, first, last, len(part.records), gaps))

    async def _insert(self, slices: Sequence[Slice]) -> None:
        store = self._shared.store
        good, undecodable = parted(slices)
        for part in undecodable:
            await store.insert_undecodable(part, store.guard([part]))
            offset, count = part.records[0].offset, len(part.records)
            what = "%s: %d records from offset %d on cannot be decoded and are dead letters"
            logger.warning(what, part.partition, count, offset, extra=_place(part.partition, offset))
            self._shared.metrics.undecodable(*_labels(part.partition), count)
        if not good:
            return
        if hopeless := self._lone.hopeless(good):
            reason, why = hopeless
            await self._refuse(good[0], why, reason)
            return
        try:
            await store.insert(good, store.guard(good), self._lone.times(good))
        except Unreadable as error:
            await self._insert_apart(good, error)
        except Rejected as error:
            await self._bisect(good, error)

    async def _insert_apart(self, slices: Sequence[Slice], error: Unreadable) -> None:
        """What is not readable becomes dead letters, all with one insert: a stream of it must not take as many as it
        has records. Then come the others."""
        store = self._shared.store
        others, dead = readable(slices, error)
        if dead:
            await store.insert_unreadable(dead, error, store.guard(dead))
        for part in dead:
            offset, count = part.records[0].offset, len(part.records)
            what = "%s: %d records from offset %d on become dead letters; that one: %s"
            why = error.why[part.partition, offset]
            logger.warning(what, part.partition, count, offset, why, extra=_place(part.partition, offset))
            self._shared.metrics.rejected(*_labels(part.partition), count)
        if others:
            await self._insert(others)

    async def _bisect(self, slices: Sequence[Slice], error: Rejected) -> None:
        """Halves until the record that ClickHouse will not take stands alone; that one becomes a dead letter."""
        if sum(len(part.records) for part in slices) > 1:
            for half in halves(slices):
                await self._insert(half)
            return
        await self._refuse(slices[0], str(error))

    async def _refuse(self, one: Slice, why: str, reason: str = "rejected") -> None:
        """The one record becomes a dead letter."""
        store = self._shared.store
        offset = one.records[0].offset
        if one.present.get(offset, 0) & DEAD_LETTERS_TABLE:
            return  # it was refused before, and is one; a crash came before the range was logged
        what = "%s: offset %d becomes a dead letter: %s"
        logger.warning(what, one.partition, offset, why, extra=_place(one.partition, offset))
        await store.insert_dead(one, why, store.guard([one]), reason)
        self._shared.metrics.rejected(*_labels(one.partition))

    def _failed(self, what: str, buffers: Sequence[PartitionBuffer], error: Exception) -> None:
        """The next try comes after a pause; says so, at most once in some seconds."""
        first, longest = RETRY_SECONDS
        # Also after a fence of somebody else: two groups that both think it theirs must not take it back at once.
        self._pause_seconds = min(max(2 * self._pause_seconds, first), longest)
        for buffer in buffers:
            self._shared.metrics.retried(*_labels(buffer.partition), f"cannot {what}: {error}")
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            part = buffers[0].partition
            where = f"{part}" if len(buffers) == 1 else f"{part} and {len(buffers) - 1} more"
            level = logging.ERROR if isinstance(error, NotUnderstood) else logging.WARNING
            logger.log(level, "%s: cannot %s, trying again: %s", where, what, error, extra=_place(part))

    def _give_up(self, buffers: Sequence[PartitionBuffer]) -> None:
        for buffer in buffers:
            self._buffers.pop(buffer.partition, None)
            buffer.close()
            self._shared.metrics.gone(*_labels(buffer.partition))

    async def _at_checkpoint(self, step: str, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            await self._shared.checkpoint(step, partition)


def _labels(partition: Partition) -> tuple[str, int]:
    return partition.name, partition.number


def _place(partition: Partition, offset: int | None = None) -> dict[str, str | int]:
    """Fields of a line of the log, for whoever collects it."""
    place: dict[str, str | int] = {"topic": partition.name, "partition": partition.number}
    return place if offset is None else place | {"offset": offset}
