# ruff: noqa: ASYNC110 (the fakes have nothing to wait on)
"""One partition's writer against hand-written fakes: poison is cut out, doubt is resolved, buffers are bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from fulgurite.consumers.materialiser import partition as partition_module
from fulgurite.consumers.materialiser.blocks import OWN_TABLE, Partition, Record, TooManyLines, block, dead_block
from fulgurite.consumers.materialiser.offsets import Intent, Offsets
from fulgurite.consumers.materialiser.partition import PartitionWriter, Parts
from fulgurite.consumers.materialiser.store import LogEntry, Rejected, Store, Unavailable
from fulgurite.schemas import topics
from fulgurite.schemas.settings import MaterialiserSettings

TOPIC = Partition(topics.ROLLOUTS, "rollouts", 0)
TP = TopicPartition("rollouts", 0)


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

    async def insert(
        self, partition: Partition, records: Sequence[Record], token: str, present: Mapping[int, int] | None = None
    ) -> None:
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

    async def present(self, partition: Partition, lo: int) -> dict[int, int]:
        return {offset: OWN_TABLE for offset in self.rows + self.dead if offset >= lo}

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
    read_to: int = 0

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

    async def position(self, partition: TopicPartition) -> int:
        return self.read_to


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
        self.writer = PartitionWriter(TOPIC, parts, buffer_bytes)

    async def feed(self, records: Sequence[FakeRecord], batches: int = 1, seconds: float = 10) -> None:
        task = asyncio.create_task(self.writer.run())
        try:
            async with asyncio.timeout(seconds):
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
    assert rig.store.tokens == ["rollouts-0-0-9"] * 2
    assert rig.offsets.said == [Intent(0, 9)] * 2


async def test_an_interrupted_range_keeps_its_boundaries() -> None:
    rig = Rig(FakeStore(rows=[0, 1, 2, 3, 5], log_end=4), intent=Intent(4, 7))
    await rig.feed([FakeRecord(n) for n in range(10)], batches=2)
    assert rig.consumer.at == 4
    assert sorted(rig.store.rows) == list(range(10))
    assert rig.store.tokens == ["rollouts-0-4-7", "rollouts-0-8-9"]


class Deduplicating(FakeStore):
    """As ClickHouse: a block under a token it knows is silently not inserted."""

    async def insert(
        self, partition: Partition, records: Sequence[Record], token: str, present: Mapping[int, int] | None = None
    ) -> None:
        known = token in self.tokens
        await super().insert(partition, [] if known else records, token, present)


async def test_an_interrupted_range_is_read_whole_though_the_buffer_is_full_and_after_a_second_kill() -> None:
    store, records = Deduplicating(), [FakeRecord(n, b"x" * 1_000) for n in range(12)]
    killed = Rig(store, intent=Intent(0, 9), buffer_bytes=5_000)
    with pytest.raises(TimeoutError):
        await killed.feed(records[:5], seconds=0.2)
    assert not killed.consumer.paused, "a full buffer must not keep the rest of the range away"
    assert not killed.finished, "half a range must not be logged"
    assert not store.rows, "half a range must not use up the token"

    again = Rig(store, intent=Intent(0, 9), buffer_bytes=5_000)
    await again.feed(records, batches=2)
    assert [(entry.lo, entry.hi, entry.records) for entry in again.finished] == [(0, 9, 10), (10, 11, 2)]
    assert store.rows == list(range(12))
    assert store.tokens == ["rollouts-0-0-9", "rollouts-0-10-11"]


async def test_the_end_of_an_interrupted_range_is_given_up_only_when_it_was_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partition_module, "REPLAY_WAIT_SECONDS", 0.02)
    slow = Rig(FakeStore(), intent=Intent(0, 9))
    slow.consumer.read_to = 7
    with pytest.raises(TimeoutError):
        await slow.feed([FakeRecord(n) for n in range(7)], seconds=0.2)
    assert not slow.store.tokens

    compacted = Rig(FakeStore(), intent=Intent(0, 9))
    compacted.consumer.read_to = 10
    await compacted.feed([FakeRecord(n) for n in range(7)])
    assert compacted.store.tokens == ["rollouts-0-0-9"]
    assert compacted.finished[0].hi == 9


@dataclass
class LoadingAdmin:
    """A broker that has just started: its first answers are empty."""

    empty_answers: int

    async def list_consumer_group_offsets(
        self, group_id: str, group_coordinator_id: int | None = None, partitions: list[TopicPartition] | None = None
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        self.empty_answers -= 1
        return {} if self.empty_answers >= 0 else {TP: OffsetAndMetadata(4, "9")}


async def test_the_intent_is_asked_for_until_the_groups_coordinator_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulgurite.consumers.materialiser.offsets.RETRY_SECONDS", 0.001)
    offsets = Offsets(cast(Any, None), cast(Any, LoadingAdmin(2)), "group")
    assert await offsets.intent(TP) == Intent(4, 9)


@dataclass
class Committing:
    """A consumer that keeps what is committed."""

    commits: list[OffsetAndMetadata] = field(default_factory=list[OffsetAndMetadata])

    def assignment(self) -> set[TopicPartition]:
        return {TP}

    async def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        await asyncio.sleep(0.001)
        self.commits.append(offsets[TP])


async def test_what_is_finished_is_never_committed_over_a_later_intent() -> None:
    consumer = Committing()
    offsets = Offsets(cast(Any, consumer), cast(Any, None), "group")
    running = asyncio.create_task(offsets.run())
    async with asyncio.timeout(10):
        await offsets.intend(TP, Intent(3, 5))
        await offsets.finish({TP: 3})  # 0..2, while 3..5 is being inserted
        assert consumer.commits == [OffsetAndMetadata(3, "5")]
        # At the same time, whoever comes first.
        await asyncio.gather(offsets.finish({TP: 6}), offsets.intend(TP, Intent(6, 9)))
        assert consumer.commits[-1] == OffsetAndMetadata(6, "9")
        await offsets.finish({TP: 10})
        assert consumer.commits[-1] == OffsetAndMetadata(10, "")
    running.cancel()


async def test_halves_are_those_of_the_range_whatever_is_missing_of_it() -> None:
    records = [FakeRecord(n, b"poison" if n == 2 else b"{}") for n in range(8)]
    first = Rig(FakeStore())
    await first.feed(records)
    successor = Rig(FakeStore(rows=[0, 1]), intent=Intent(0, 7))
    await successor.feed(records)
    for rig in (first, successor):
        assert rig.store.dead == [2]
        assert sorted(rig.store.rows) == [0, 1, 3, 4, 5, 6, 7]
        assert f"{TOPIC}-4-7-half" in rig.store.tokens  # what the first may still send, the table refuses


async def test_a_batch_is_bounded_by_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_module, "BATCH_LINES", 10)
    monkeypatch.setattr(partition_module, "LINE_TOPICS", {TOPIC.topic})
    rig = Rig(FakeStore())
    await rig.feed([FakeRecord(n, b"{}\n{}\n{}\n{}") for n in range(5)], batches=3)
    assert [(e.lo, e.hi) for e in rig.finished] == [(0, 1), (2, 3), (4, 4)]


def test_a_record_of_too_many_lines_is_not_even_split() -> None:
    with pytest.raises(TooManyLines, match="has 4,000,001 lines, of at most 200,000"):
        block(Partition(topics.SPANS, "spans", 0), cast(Any, [FakeRecord(0, b"x\n" * 4_000_000)]), {})


def test_a_clock_of_any_year_makes_a_dead_letter() -> None:
    late = FakeRecord(0, b"x")
    late.timestamp = 10**15
    row = dead_block(Partition(topics.SPANS, "spans", 0), cast(Any, late), "no")
    assert (row.num_rows, row["_ts"].cast("int64").to_pylist()) == (1, [10**15])


async def test_offsets_that_are_in_the_tables_are_skipped() -> None:
    rig = Rig(FakeStore(rows=[0, 1, 2, 3, 4, 7], log_end=3), intent=None)
    await rig.feed([FakeRecord(n) for n in range(10)], batches=2)
    assert rig.consumer.at == 5
    assert [(e.lo, e.hi, e.records) for e in rig.finished] == [(3, 4, 0), (5, 9, 4)]
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
