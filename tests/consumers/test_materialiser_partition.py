# ruff: noqa: ASYNC110 (the fakes have nothing to wait on)
"""One partition's writer against hand-written fakes: poison is cut out, doubt is resolved, buffers are bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from aiokafka import TopicPartition

from fulgurite.consumers.materialiser.offsets import Intent, Offsets
from fulgurite.consumers.materialiser.partition import PartitionWriter, Parts
from fulgurite.consumers.materialiser.store import LogEntry, Partition, Record, Rejected, Store, Unavailable
from fulgurite.schemas import topics
from fulgurite.schemas.settings import MaterialiserSettings

SPANS = Partition(topics.SPANS, "spans", 0)
TP = TopicPartition("spans", 0)


@dataclass
class FakeRecord:
    offset: int
    value: bytes | None = b"{}"
    key: bytes | None = None
    timestamp: int = 0
    headers: Sequence[tuple[str, bytes]] = ()


@dataclass
class FakeStore:
    """Remembers what it was given; refuses blocks with a `poison` in them; fails the first `failures` inserts."""

    rows: list[int] = field(default_factory=list[int])
    dead: list[int] = field(default_factory=list[int])
    tokens: list[str] = field(default_factory=list[str])
    log_end: int = 0
    failures: int = 0
    inserted_before_failing: int = 0

    async def insert(self, partition: Partition, records: Sequence[Record], token: str) -> None:
        self.tokens.append(token)
        if any(record.value == b"poison" for record in records):
            raise Rejected("code 407")
        if self.failures:
            self.failures -= 1
            self.rows += [record.offset for record in records[: self.inserted_before_failing]]
            raise Unavailable("no answer")
        self.rows += [record.offset for record in records]

    async def insert_dead(self, partition: Partition, record: Record, message: str) -> None:
        self.dead.append(record.offset)

    async def logged(self, partition: Partition) -> int:
        return self.log_end

    async def present(self, partition: Partition, lo: int) -> set[int]:
        return {offset for offset in self.rows + self.dead if offset >= lo}

    async def inserting(self, partition: Partition) -> bool:
        return False


@dataclass
class FakeOffsets:
    found: Intent | None = None
    said: list[Intent] = field(default_factory=list[Intent])

    async def intent(self, partition: TopicPartition) -> Intent | None:
        return self.found

    async def intend(self, partition: TopicPartition, intent: Intent) -> None:
        self.said.append(intent)


@dataclass
class FakeConsumer:
    at: int = -1
    paused: bool = True

    def pause(self, *partitions: TopicPartition) -> None:
        self.paused = True

    def resume(self, *partitions: TopicPartition) -> None:
        self.paused = False

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.at = offset

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return {TP: 0}

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return {TP: 1_000}


class Rig:
    def __init__(self, store: FakeStore, intent: Intent | None = None, buffer_bytes: int = 1 << 20) -> None:
        self.store, self.offsets, self.consumer = store, FakeOffsets(intent), FakeConsumer()
        self.finished: list[LogEntry] = []
        parts = Parts(
            settings=MaterialiserSettings(batch_records=100, batch_wait_ms=10),
            consumer=self.consumer,
            store=cast(Store, store),
            offsets=cast(Offsets, self.offsets),
            inserts=asyncio.Semaphore(1),
            finished=self.finished.append,
        )
        self.writer = PartitionWriter(SPANS, parts, buffer_bytes)

    async def feed(self, records: Sequence[FakeRecord], batches: int = 1) -> None:
        task = asyncio.create_task(self.writer.run())
        try:
            async with asyncio.timeout(10):
                while self.consumer.at < 0:
                    await asyncio.sleep(0.001)
                self.writer.append(cast(Any, [r for r in records if r.offset >= self.consumer.at]))
                while len(self.finished) < batches:
                    await asyncio.sleep(0.001)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_what_clickhouse_rejects_is_cut_out() -> None:
    rig = Rig(FakeStore())
    await rig.feed([FakeRecord(n, b"poison" if n in (3, 17) else b"{}") for n in range(20)])
    assert sorted(rig.store.rows) == [n for n in range(20) if n not in (3, 17)]
    assert sorted(rig.store.dead) == [3, 17]
    assert rig.finished[0].hi == 19


async def test_after_doubt_only_what_is_missing_is_inserted_under_the_same_token() -> None:
    rig = Rig(FakeStore(failures=1, inserted_before_failing=4))
    await rig.feed([FakeRecord(n) for n in range(10)])
    assert sorted(rig.store.rows) == list(range(10))
    assert rig.store.tokens == ["spans-0-0-9"] * 2
    assert rig.offsets.said == [Intent(0, 9)] * 2


async def test_an_interrupted_range_keeps_its_boundaries() -> None:
    rig = Rig(FakeStore(rows=[0, 1, 2, 3, 5], log_end=4), intent=Intent(4, 7))
    await rig.feed([FakeRecord(n) for n in range(10)], batches=2)
    assert rig.consumer.at == 4
    assert sorted(rig.store.rows) == list(range(10))
    assert rig.store.tokens == ["spans-0-4-7", "spans-0-8-9"]


async def test_offsets_that_are_in_the_tables_are_skipped() -> None:
    rig = Rig(FakeStore(rows=[0, 1, 2, 3, 4, 7], log_end=3), intent=None)
    await rig.feed([FakeRecord(n) for n in range(10)])
    assert rig.consumer.at == 5
    assert sorted(rig.store.rows) == list(range(10))


async def test_a_full_buffer_pauses_the_partition_until_it_is_drained() -> None:
    rig = Rig(FakeStore(), buffer_bytes=2_000)
    task = asyncio.create_task(rig.writer.run())
    while rig.consumer.at < 0:
        await asyncio.sleep(0.001)
    rig.writer.append(cast(Any, [FakeRecord(n, b"x" * 1_000) for n in range(3)]))
    assert rig.consumer.paused
    async with asyncio.timeout(10):
        while rig.consumer.paused:
            await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert rig.store.rows == [0, 1, 2]
