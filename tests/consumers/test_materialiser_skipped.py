"""Offsets without a record are told from lost records, by asking Kafka what lies there."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaConnectionError, OffsetOutOfRangeError

from fulgurite.consumers.materialiser import service
from fulgurite.consumers.materialiser import skipped as skipped_module
from fulgurite.consumers.materialiser.blocks import OffsetRange, Partition
from fulgurite.consumers.materialiser.history import History
from fulgurite.consumers.materialiser.skipped import Skipped
from fulgurite.consumers.materialiser.store import LogEntry, Store
from fulgurite.producers.raw import Read
from fulgurite.schemas import topics
from fulgurite.schemas.settings import Settings
from tests.consumers.materialiser_fakes import FakeRecord, partition
from tests.consumers.otlp_tables import Tables
from tests.infra.dlq_world import World, span

TP = TopicPartition(topics.SPANS.name, 0)


class Log:
    """Answers of at most 4 offsets, with records at some of them."""

    def __init__(self, *offsets: int, end: int = 100) -> None:
        self.offsets, self.end = offsets, end
        self.asked: list[int] = []
        self.errors: dict[int, Exception] = {}

    async def read(self, tp: TopicPartition, at: int) -> Read:
        self.asked.append(at)
        if at in self.errors:
            raise self.errors[at]
        till = min(at + 4, self.end)
        return Read([cast(Any, FakeRecord(offset)) for offset in self.offsets if at <= offset < till], max(at, till))


def entry(lo: int, hi: int, *gaps: OffsetRange) -> LogEntry:
    return LogEntry(partition(0, topics.SPANS), lo, hi, 1, gaps)


class Inserts:
    """The log of inserts."""

    def __init__(self, *entries: LogEntry) -> None:
        self.newest = {entry.partition: entry for entry in entries}
        self.asked = 0

    async def ask(self, partitions: Collection[Partition]) -> dict[Partition, LogEntry]:
        self.asked += 1
        return {part: self.newest[part] for part in partitions if part in self.newest}


def reading(log: Log, *entries: LogEntry) -> Skipped:
    return Skipped(log.read, Inserts(*entries).ask)


async def skipped(found: Skipped, *entries: LogEntry) -> list[OffsetRange]:
    (*others, last), later = await found.known(entries)
    assert not any(other.skipped for other in others)
    assert not later
    return list(last.skipped)


async def test_what_kafka_has_no_record_at_is_skipped_and_what_it_has_is_not(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(0, 2, 5, 8, 9, 20)
    found = await skipped(reading(log), entry(0, 5, (1, 1), (3, 4)), entry(8, 20, (6, 7), (10, 19)))
    assert found == [(1, 1), (3, 4), (6, 7), (10, 13), (14, 17), (18, 19)]
    assert log.asked == [1, 6, 10, 14, 18], "an answer says about all gaps that it reaches"
    assert not caplog.records
    lost = await skipped(reading(log), entry(0, 9, (1, 8)), entry(20, 20, (10, 19)))
    assert lost == [(1, 1), (3, 4), (6, 7), (10, 13), (14, 17), (18, 19)]
    assert [record.getMessage() for record in caplog.records] == [
        "spans-0: 1 records from offset 2 on were not given by Kafka's client",
        "spans-0: 2 records from offset 5 on were not given by Kafka's client",
    ]


async def test_what_cannot_be_asked_now_is_asked_with_the_next_range() -> None:
    log = Log(0, 3, 8)
    log.errors[5] = KafkaConnectionError("gone")
    found = reading(log)
    assert await skipped(found, entry(0, 8, (1, 2), (4, 7))) == [(1, 2), (4, 4)]
    assert not found.asked(TP)
    log.errors = {5: OffsetOutOfRangeError({})}
    assert await skipped(found, entry(9, 9)) == [], "expired before it was asked: never known"
    assert found.asked(TP)
    assert await skipped(found, entry(10, 30, (22, 29))) == [(22, 25), (26, 29)]


async def test_what_could_not_be_asked_is_left_to_whoever_comes_next_and_asked_without_a_new_range() -> None:
    log = Log(0, 3, 8)
    log.errors[5] = KafkaConnectionError("gone")
    ((said,), later) = await reading(log).known([entry(0, 8, (1, 2), (4, 7))])
    assert (said.skipped, said.unasked, later) == ([(1, 2), (4, 4)], [(5, 7)], [])
    inserts = Inserts(said)
    successor = Skipped(log.read, inserts.ask)
    assert not successor.asked(TP), "nobody knows yet"
    assert await successor.known([], [said.partition]) == ([], []), "nothing new"
    log.errors.clear()
    (again,) = (await successor.known([], [said.partition]))[1]
    assert (again.lo, again.hi, again.records) == (0, 8, 0), "it says no more than what is in the log"
    assert (again.skipped, again.unasked) == ([(5, 7)], [])
    assert successor.asked(TP)
    assert await successor.known([], [said.partition]) == ([], [])
    assert inserts.asked == 1


async def test_a_partition_without_a_leader_keeps_no_other_waiting() -> None:
    async def read(tp: TopicPartition, at: int) -> Read:
        if tp.partition == 0:
            raise KafkaConnectionError("gone")
        return Read([], at + 1)

    others = LogEntry(partition(1, topics.SPANS), 0, 2, 1, [(1, 1)])
    said, _ = await Skipped(read, Inserts().ask).known([entry(0, 2, (1, 1)), others])
    assert [(one.skipped, one.unasked) for one in said] == [([], [(1, 1)]), ([(1, 1)], [])]


async def test_what_is_forgotten_while_it_is_asked_is_not_lost() -> None:
    """As when a leader changes meanwhile."""

    async def read(tp: TopicPartition, at: int) -> Read:
        found.forget(tp)
        raise KafkaConnectionError("gone")

    found = Skipped(read, Inserts(LogEntry(partition(0, topics.SPANS), 0, 3, 1, unasked=[(1, 2)])).ask)
    ((said,), _) = await found.known([entry(4, 8, (4, 7))])
    assert said.unasked == [(1, 2), (4, 7)]
    assert not found.asked(TP)


async def test_what_waits_is_bounded_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(skipped_module, "MANY", 2)
    log = Log(end=0)
    log.errors = {3: KafkaConnectionError("gone")}
    ((said,), _) = await reading(log).known([entry(0, 8, (1, 1), (3, 3), (5, 5))])
    assert said.unasked == [(3, 3), (5, 5)]
    assert "those before offset 3 are never asked, and stay gaps" in caplog.text


async def test_the_log_of_inserts_keeps_what_is_left_to_be_asked(tables: Tables) -> None:
    store = Store(tables.settings, 30, "test")
    await store.connect()
    one, other = (Partition(topics.SPANS, "it's", number) for number in (0, 1))
    try:
        await store.log([LogEntry(one, 0, 5, 6), LogEntry(one, 6, 9, 2, skipped=[(7, 7)], unasked=[(3, 4), (8, 8)])])
        newest = await store.newest([one, other])
        assert newest == {one: LogEntry(one, 6, 9, 0, unasked=[(3, 4), (8, 8)])}
        await store.log_again(
            [
                LogEntry(one, 6, 9, 0, skipped=[(3, 4)], unasked=[(8, 8)]),
                LogEntry(one, 6, 10, 0),
                LogEntry(other, 6, 9, 0),
            ]
        )
        assert (await store.newest([one]))[one].unasked == [(8, 8)]
        assert await store.logged([one, other]) == {one: 10, other: 0}, "a range that is not there is not logged"
        found = tables.client.query("SELECT lo, hi, skipped.lo, skipped.hi FROM ingest_log ORDER BY at, lo").result_rows
        assert list(map(tuple, found)) == [(0, 5, [], []), (6, 9, [7], [7]), (6, 9, [3], [4])]
    finally:
        await store.close()
        tables.client.command("TRUNCATE TABLE ingest_log")


async def test_gaps_that_kafka_could_not_explain_are_explained_to_the_next_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is produced meanwhile."""
    monkeypatch.setattr(service, "CHECK_SECONDS", 0.3)
    world = World(settings, tmp_path)

    async def away(self: History, tp: TopicPartition, at: int) -> Read:
        raise KafkaConnectionError("away")

    for number in range(3):
        await world.produce_in_transaction(topics.SPANS, span(span_id=f"{number}"), b"r")
    view = "SELECT rows, highest, skipped, gaps FROM reconciliation"
    with monkeypatch.context() as patched:
        patched.setattr(History, "read", away)
        async with world.materialiser():
            await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(4,)])
            await asyncio.sleep(1)
    assert world.ask(view) == [(3, 4, 0, 2)]
    async with world.materialiser():
        await world.until(view, lambda rows: rows == [(3, 4, 2, 0)], 15)
    assert "nowhere" not in caplog.text


async def test_behind_the_end_nothing_is_known() -> None:
    assert await skipped(reading(Log(end=3)), entry(0, 9, (1, 8))) == [(1, 2)]


async def test_a_transactional_producer_leaves_no_gaps_and_a_lost_record_does(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "CHECK_SECONDS", 0.5)
    world = World(settings, tmp_path)
    name = world.name(topics.SPANS)
    async with AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, transactional_id=f"{name}-test"
    ) as client:
        for number in range(5):
            await client.begin_transaction()
            for copy in range(2):
                value = span(span_id=f"{number}-{copy}") + b" " * 40_000
                await client.send_and_wait(name, value, key=b"r", partition=0)
            await (client.abort_transaction() if number % 2 else client.commit_transaction())
    await world.produce(topics.SPANS, [span(span_id="last")])
    view = "SELECT rows, highest, skipped, gaps FROM reconciliation"
    async with world.materialiser():
        await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(15,)])
        assert world.ask(view) == [(7, 15, 9, 0)]
        await asyncio.sleep(1.7)  # the log of inserts is compared with the tables every half second
        assert "nowhere" not in caplog.text
    # Again from the beginning, as after a crash before step 2: the same ranges are logged once more.
    world.ask("TRUNCATE TABLE ingest_log")
    world.ask("DELETE FROM spans WHERE span_id = '4-1'")
    world.ask(
        f"INSERT INTO ingest_log (_topic, _partition, lo, hi, skipped) VALUES ('{name}', 0, 0, 0, [(2, 4), (4, 5)])"
    )
    assert world.ask(view) == [(6, 15, 4, 6)]
    world.ask("TRUNCATE TABLE ingest_log")
    async with world.materialiser():
        await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(15,)])
        assert world.ask(view) == [(7, 15, 9, 0)]
        world.ask("DELETE FROM spans WHERE span_id = '4-1'")
        assert world.ask(view) == [(6, 15, 9, 1)], "a record that is nowhere is no marker"
