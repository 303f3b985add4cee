"""A ClickHouse, a consumer and a group written by hand, for tests of one topic's writer: what a server may do at its
worst, in an order that a seed decides.

Server    has one table and dead_letters, fences and running inserts. An insert is entered, then evaluates its guard,
          then gives each table its part, and last is taken out; between any two of these others may act. It may lose
          its answer, or go on by itself when its client is gone.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from aiokafka import TopicPartition

from fulgurite.consumers.materialiser.blocks import (
    BOTH_TABLES,
    DEAD_LETTERS_TABLE,
    OWN_TABLE,
    Partition,
    Record,
    Slice,
    Unreadable,
    missing,
)
from fulgurite.consumers.materialiser.errors import Fenced, Rejected, TooLarge, TooSlow, Unavailable
from fulgurite.consumers.materialiser.fences import greater_fence
from fulgurite.consumers.materialiser.history import Incarnation, Look
from fulgurite.consumers.materialiser.metrics import Metrics
from fulgurite.consumers.materialiser.offsets import Lost, Offsets
from fulgurite.consumers.materialiser.partition import Budget, PartitionBuffer
from fulgurite.consumers.materialiser.store import LogEntry, Store
from fulgurite.consumers.materialiser.topic import Shared, TopicWriter
from fulgurite.schemas import topics
from fulgurite.schemas.settings import MaterialiserSettings
from fulgurite.schemas.topics import Topic


@dataclass
class FakeRecord:
    offset: int
    value: bytes | None = b"{}"
    key: bytes | None = None
    timestamp: int = 0
    headers: Sequence[tuple[str, bytes]] = ()


def partition(number: int = 0, topic: Topic = topics.ROLLOUTS) -> Partition:
    return Partition(topic, topic.name, number)


@dataclass
class Server:
    """Rows are (partition, offset); of a record of lines each table has one of its own."""

    rand: random.Random = field(default_factory=lambda: random.Random(0))
    rows: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])
    dead: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])
    fences: dict[int, str] = field(default_factory=dict[int, str])
    times: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """Of rows; 1 where it is not said."""
    log: dict[int, int] = field(default_factory=dict[int, int])
    running: list[set[int]] = field(default_factory=list[set[int]])
    inserts: list[list[tuple[int, list[int]]]] = field(default_factory=list[list[tuple[int, list[int]]]])
    """Of each that was tried, partitions and offsets."""
    cut_short: int = -1
    """So many records of the next insert are taken; then the engine falls over."""
    most_records: int = 1_000_000
    """More need too much memory."""
    times_out: bool = False
    """Or too much time."""
    no_memory: str = "code 241, Query memory limit exceeded"
    enough_times: int = 1_000
    """With so much more time a huge record goes in."""
    trouble: float = 0.0
    """How likely it is, at each step of an insert, that its answer is lost."""
    slow: int = 0
    """Longest that each step takes, in turns of the event loop."""
    left_behind: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    async def turns(self) -> None:
        for _ in range(self.rand.randint(0, self.slow) if self.slow else 0):
            await asyncio.sleep(0)

    async def insert(self, slices: Sequence[Slice], times: int = 1) -> None:
        """Goes on by itself when its client is cancelled or gets no answer."""
        task = asyncio.create_task(self._insert(slices, times))
        self.left_behind.add(task)
        task.add_done_callback(self.left_behind.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self.rand.random() < self.trouble:
            await self.turns()
            raise Unavailable("no answer")
        await asyncio.shield(task)

    async def _insert(self, slices: Sequence[Slice], times: int) -> None:
        await self.turns()  # on the wire
        numbers = {part.partition.number for part in slices}
        self.inserts.append([(part.partition.number, [r.offset for r in part.records]) for part in slices])
        self.running.append(numbers)
        try:
            await self.turns()
            if any(self.fences.get(part.partition.number) != part.fence for part in slices):
                raise Fenced("fenced by another owner")
            await self.turns()
            records = [(part, record) for part in slices for record in part.records]
            if any(record.value == b"refused" for _, record in records):
                raise Rejected("code 6")
            huge = any(record.value == b"huge" for _, record in records)
            if len(records) > self.most_records or (huge and (len(records) > 1 or times < self.enough_times)):
                raise (TooSlow("code 159") if self.times_out else TooLarge(self.no_memory))
            if self.cut_short >= 0:
                self.rows.update((part.partition.number, r.offset) for part, r in records[: self.cut_short])
                self.cut_short = -1
                raise Unavailable("the engine fell over")
            for table, bit in self.rand.sample([(self.rows, OWN_TABLE), (self.dead, DEAD_LETTERS_TABLE)], 2):
                for part, record in records:
                    wanted = _belongs(part.partition.topic, record)
                    lacking = missing(part.partition.topic, part.present.get(record.offset, 0))
                    if wanted & lacking & bit:
                        table[part.partition.number, record.offset] += 1
                await self.turns()
                if self.rand.random() < self.trouble / 4:
                    raise Unavailable("the engine fell over between two tables")
        finally:
            self.running.remove(numbers)


def _belongs(topic: Topic, record: Record) -> int:
    """Tables: of a record of lines both, where it says so."""
    return {b"poison": DEAD_LETTERS_TABLE, b"both": BOTH_TABLES}.get(record.value or b"", OWN_TABLE)


@dataclass
class FakeStore:
    """One materialiser's connection."""

    server: Server
    name: str = "a"
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """An insert is at the gate."""
    gate: asyncio.Event | None = None
    """The next insert waits for it."""
    fails: bool = False
    """Then, having done nothing."""

    def guard(self, slices: Sequence[Slice]) -> None:
        return None

    async def insert(self, slices: Sequence[Slice], guard: None, times: int = 1) -> None:
        gate, self.gate = self.gate, None
        if gate is not None:
            self.begun.set()
            await gate.wait()
            if self.fails:
                raise Unavailable("a reset connection")
        unreadable = [(p.partition, r.offset) for p in slices for r in p.records if r.value == b"unreadable"]
        if unreadable:
            raise Unreadable(dict.fromkeys(unreadable, "no rows"))
        await self.server.insert(slices, times)

    async def insert_unreadable(self, dead: Sequence[Slice], error: Unreadable, guard: None) -> None:
        records = [[cast(Record, FakeRecord(record.offset, b"poison")) for record in part.records] for part in dead]
        await self.server.insert(
            [replace(part, records=some, present={}) for part, some in zip(dead, records, strict=True)]
        )

    async def insert_dead(self, one: Slice, message: str, guard: None, reason: str = "rejected") -> None:
        record = FakeRecord(one.records[0].offset, b"poison")
        await self.server.insert([Slice(one.partition, [cast(Any, record)], {}, one.fence)])  # whatever is present

    async def logged(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        await self.server.turns()
        return {part: self.server.log.get(part.number, 0) for part in partitions}

    async def fence(self, partitions: Collection[Partition]) -> str:
        greatest = max((self.server.fences.get(part.number, "") for part in partitions), default="")
        await self.server.turns()
        fence = greater_fence(greatest, self.name)
        for part in partitions:
            self.server.fences[part.number] = max(fence, self.server.fences.get(part.number, ""))
        await self.server.turns()
        return fence

    async def marks(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        return {}

    async def times(self, offsets: Mapping[Partition, Collection[int]]) -> dict[Partition, dict[int, int]]:
        return {
            part: {at: self.server.times.get((part.number, at), 1) for at in some if (part.number, at) in known}
            for known in [set(self.server.rows) | set(self.server.dead)]
            for part, some in offsets.items()
        }

    async def running(self, partitions: Sequence[Partition]) -> bool:
        await self.server.turns()
        numbers = {part.number for part in partitions}
        return any(numbers & running for running in self.server.running)

    async def present(self, since: Mapping[Partition, int]) -> dict[Partition, dict[int, int]]:
        found: dict[Partition, dict[int, int]] = {}
        for part, lo in since.items():
            tables = found.setdefault(part, {})
            for table, bit in ((self.server.rows, OWN_TABLE), (self.server.dead, DEAD_LETTERS_TABLE)):
                for number, offset in table:
                    if number == part.number and offset >= lo:
                        tables[offset] = tables.get(offset, 0) | bit
        await self.server.turns()
        return found


@dataclass
class FakeGroup:
    """Kafka's: whether it takes our commits."""

    ours: bool = True
    claimed: list[dict[TopicPartition, int]] = field(default_factory=list[dict[TopicPartition, int]])

    async def claim(self, offsets: dict[TopicPartition, int]) -> None:
        if not self.ours:
            raise Lost
        self.claimed.append(offsets)


@dataclass
class FakeConsumer:
    at: dict[int, int] = field(default_factory=dict[int, int])
    paused: set[int] = field(default_factory=set[int])
    end: int = 1_000

    def pause(self, *partitions: TopicPartition) -> None:
        self.paused |= {tp.partition for tp in partitions}

    def resume(self, *partitions: TopicPartition) -> None:
        self.paused -= {tp.partition for tp in partitions}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.at[partition.partition] = offset

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, self.end)


@dataclass
class FakeHistory:
    """Of a log whose records all have one time."""

    consumer: FakeConsumer
    incarnation: Incarnation = field(default_factory=lambda: Incarnation("t", 0))
    time_ms: int = 1

    async def look(self, places: Mapping[TopicPartition, int]) -> dict[TopicPartition, Look]:
        times = dict.fromkeys(range(self.consumer.end), self.time_ms)
        return {tp: Look(self.incarnation, {at: ms for at, ms in times.items() if at >= places[tp]}) for tp in places}


class Member:
    """One materialiser's writer of one topic."""

    def __init__(
        self,
        server: Server,
        numbers: Sequence[int] = (0,),
        topic: Topic = topics.ROLLOUTS,
        batch_records: int = 100,
        share_bytes: int = 1 << 20,
        name: str = "a",
    ) -> None:
        self.server, self.consumer, self.group = server, FakeConsumer(), FakeGroup()
        self.history, self.metrics = FakeHistory(self.consumer), Metrics()
        self.store = FakeStore(server, name)
        self.finished: list[LogEntry] = []
        self.budget = Budget()
        shared = Shared(
            settings=MaterialiserSettings(batch_records=batch_records, batch_wait_ms=5),
            consumer=self.consumer,
            store=cast(Store, self.store),
            offsets=cast(Offsets, self.group),
            inserts=asyncio.Semaphore(2),
            history=self.history,
            topic_ids={},
            metrics=self.metrics,
            finished=self._finish,
        )
        self.buffers = {
            number: PartitionBuffer(partition(number, topic), self.consumer, self.budget, batch_records, share_bytes)
            for number in numbers
        }
        self.writer = TopicWriter(topic.name, list(self.buffers.values()), shared)
        self.task: asyncio.Task[None] | None = None

    def _finish(self, entry: LogEntry) -> None:
        self.finished.append(entry)
        number = entry.partition.number
        self.server.log[number] = max(self.server.log.get(number, 0), entry.hi + 1)

    async def start(self) -> None:
        """Returns when every partition is settled."""
        self.task = asyncio.create_task(self.writer.run())
        await self.until(lambda: all(buffer.settled for buffer in self.buffers.values()))

    def append(self, number: int, records: Sequence[FakeRecord]) -> None:
        self.buffers[number].append(cast(Any, records))
        self.writer.wake()

    async def until(self, true: Any, seconds: float = 10) -> None:
        async with asyncio.timeout(seconds):
            while not true():
                assert self.task is not None
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
