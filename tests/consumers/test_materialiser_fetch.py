"""The fetch loop on a consumer that drains and then raises: nothing is lost, and only what cannot be read stands
still."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CorruptRecordException, KafkaConnectionError

from fulgurite.consumers.materialiser import fetch as fetch_module
from fulgurite.consumers.materialiser.fetch import Fetching
from fulgurite.consumers.materialiser.metrics import Metrics
from fulgurite.consumers.materialiser.partition import Budget, PartitionBuffer, Room
from fulgurite.producers.raw import Read, Undecodable
from tests.consumers.materialiser_fakes import FakeConsumer, FakeRecord, partition

RECORDS = 20


@dataclass
class Log(FakeConsumer):
    """Partitions of records, of which some cannot be decoded by `getmany`: it raises, and forgets what it drained."""

    poison: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    unreadable: set[int] = field(default_factory=set[int])
    away: int = 0
    """So many calls find no broker, when they have drained."""

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> Mapping[TopicPartition, Sequence[Any]]:
        found: dict[TopicPartition, list[FakeRecord]] = {}
        for number in [tp.partition for tp in partitions] or sorted(self.at):
            begin = self.at[number]
            if number in self.paused or begin == RECORDS:
                continue
            records = found[partition_of(number)] = []
            for at in range(begin, min(RECORDS, begin + 3)):
                if (number, at) in self.poison:
                    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
                records.append(FakeRecord(at))
            self.at[number] = begin + len(records)
        if self.away:
            self.away -= 1
            raise KafkaConnectionError
        return found

    async def read(self, tp: TopicPartition, offset: int) -> Read:
        if tp.partition in self.unreadable:
            raise CorruptRecordException("Invalid CRC")
        record: Any = FakeRecord(offset)
        if (tp.partition, offset) in self.poison:
            record = Undecodable("t", 0, offset, 0, None, b"{}", "why")
        return Read([record], offset + 1)


def partition_of(number: int) -> TopicPartition:
    return TopicPartition(partition().name, number)


def fetching(log: Log, monkeypatch: pytest.MonkeyPatch) -> tuple[Fetching, list[PartitionBuffer], Metrics]:
    monkeypatch.setattr(fetch_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(fetch_module, "APART_SECONDS", 0.1)
    monkeypatch.setattr(fetch_module, "POLL_MS", 1)
    buffers = {partition_of(n): PartitionBuffer(partition(n), log, Budget(), 1_000, 1 << 20) for n in range(3)}
    for buffer in buffers.values():
        buffer.settle("fence", 0, {})
    metrics = Metrics()
    metrics.joined()
    return (
        Fetching(buffers, lambda topic: None, log.read, lambda tp, why: None, 100, metrics),
        list(buffers.values()),
        metrics,
    )


def offsets(buffer: PartitionBuffer) -> list[int]:
    found = buffer.take(Room(1_000), at_least_one=True)
    return [record.offset for record in found.records] if found else []


async def until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 (a fake has nothing to wait on)
            await asyncio.sleep(0.001)


async def run_until(loop: Fetching, log: Log, true: Any) -> None:
    task = asyncio.create_task(loop.run(log))
    await until(true)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("poison", [{(1, 0)}, {(2, 7)}, {(1, 5), (2, 6), (2, 7), (0, 19)}])
async def test_what_was_drained_when_a_fetch_raised_comes_again(
    poison: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(poison=poison, away=3)
    loop, buffers, metrics = fetching(log, monkeypatch)
    await run_until(loop, log, lambda: all(buffer.next == RECORDS for buffer in buffers))
    assert [offsets(buffer) for buffer in buffers] == [list(range(RECORDS))] * 3
    lost = {(b.partition.number, r.offset) for b in buffers for r in b.taken if isinstance(r, Undecodable)}
    assert lost == poison
    assert metrics.not_ready(1) == {}


async def test_what_cannot_be_read_stands_still_alone_and_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(poison={(1, 5)}, unreadable={1})
    loop, buffers, metrics = fetching(log, monkeypatch)
    task = asyncio.create_task(loop.run(log))
    await until(lambda: buffers[0].next == buffers[2].next == RECORDS)
    await until(lambda: "cannot be read" in metrics.not_ready(1).get(str(buffers[1].partition), ""))
    assert buffers[1].next < 6
    log.unreadable.clear()
    await until(lambda: buffers[1].next == RECORDS)
    assert metrics.not_ready(1) == {}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert offsets(buffers[1]) == list(range(RECORDS))
