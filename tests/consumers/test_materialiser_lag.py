"""Lag and silence in outages: neither store's hanging hides what waits, or that nobody answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from fulgurite.consumers.materialiser.lag import SILENT_SECONDS, LagMeter
from fulgurite.consumers.materialiser.metrics import Metrics
from fulgurite.consumers.materialiser.partition import Budget, PartitionBuffer, Room
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas import topics
from fulgurite.schemas.settings import ClickHouseSettings, KafkaSettings, MaterialiserSettings, Settings
from tests.consumers.materialiser_fakes import FakeConsumer, FakeRecord, partition
from tests.consumers.test_materialiser_metrics import free_port, lag_is, ready, running, samples
from tests.consumers.test_materialiser_stop import frozen
from tests.infra.dlq_world import World, span

TP = TopicPartition(partition().name, 0)


@dataclass
class Asked(FakeConsumer):
    done: int | None = None
    polled_ms: int | None = None
    committed_of: list[TopicPartition] = field(default_factory=list[TopicPartition])

    def assignment(self) -> set[TopicPartition]:
        return {TP}

    def last_poll_timestamp(self, partition: TopicPartition) -> int | None:
        return self.polled_ms

    async def committed(self, partition: TopicPartition) -> int | None:
        self.committed_of.append(partition)
        return self.done


class Measured:
    """One partition, a clock, and what is shown."""

    def __init__(self, consumer: Asked) -> None:
        self.consumer = consumer
        self.now_ms = 1_000_000
        self.metrics = Metrics()
        self.metrics.joined()
        self.buffers: dict[TopicPartition, PartitionBuffer] = {}
        self.meter = LagMeter(self.buffers, self.metrics, lambda: self.now_ms)
        self.assign()

    def assign(self) -> PartitionBuffer:
        for buffer in self.buffers.values():
            buffer.close()
            self.metrics.gone(*TP)
        self.buffers[TP] = PartitionBuffer(partition(), self.consumer, Budget(), 1_000, 1 << 20)
        return self.buffers[TP]

    async def after(self, seconds: float) -> tuple[float | None, float | None]:
        """Records and seconds."""
        self.now_ms += int(seconds * 1000)
        await self.meter.ask(self.consumer)
        self.meter.measure(self.consumer)
        labels = {"topic": TP.topic, "partition": "0"}
        name = "fulgurite_materialiser_lag_"
        registry = self.metrics.registry
        return registry.get_sample_value(name + "records", labels), registry.get_sample_value(name + "seconds", labels)


async def test_what_waits_is_shown_before_its_partition_is_settled() -> None:
    measured = Measured(Asked(end=300, done=100))
    assert await measured.after(0) == (200, 0)
    measured.consumer.end = 320
    assert await measured.after(5) == (220, 5)
    assert set(measured.metrics.not_ready(4)) == {str(partition())}


async def test_a_rebalance_hides_nothing_of_what_waits() -> None:
    measured = Measured(Asked(end=10))
    buffer = measured.buffers[TP]
    buffer.settle("fence", 0, {})
    buffer.append(cast(Any, [FakeRecord(at, timestamp=measured.now_ms) for at in range(10)]))
    buffer.take(Room(4), at_least_one=True)
    buffer.done()
    assert await measured.after(3) == (6, 3)
    measured.assign()
    assert await measured.after(2) == (6, 5)
    assert measured.consumer.committed_of == []


async def test_old_times_of_records_that_are_kept_up_with_make_no_lag() -> None:
    """A backfill: what counts is since when they are there, not what its producer says."""
    measured = Measured(Asked(end=1))
    buffer = measured.buffers[TP]
    buffer.settle("fence", 0, {})
    await measured.after(0)
    day_old_ms = measured.now_ms - 86_400_000
    buffer.append(cast(Any, [FakeRecord(0, timestamp=day_old_ms)]))
    assert await measured.after(1) == (1, 86_401), "it was there before"
    buffer.take(Room(4), at_least_one=True)
    buffer.done()
    for offset in range(1, 60):
        measured.consumer.end = offset + 1
        buffer.append(cast(Any, [FakeRecord(offset, timestamp=day_old_ms)]))
        assert await measured.after(1) == (1, 0)
        buffer.take(Room(4), at_least_one=True)
        buffer.done()
    measured.consumer.end = 61
    buffer.append(cast(Any, [FakeRecord(60, timestamp=day_old_ms)]))
    await measured.after(1)
    assert await measured.after(40) == (1, 40)


async def test_a_producers_clock_that_is_ahead_hides_no_lag() -> None:
    """What counts is since when its records are there, or since we came."""
    measured = Measured(Asked(end=1))
    buffer = measured.buffers[TP]
    buffer.settle("fence", 0, {})
    await measured.after(0)
    future_ms = measured.now_ms + 3_000_000
    buffer.append(cast(Any, [FakeRecord(0, timestamp=future_ms)]))
    assert await measured.after(7) == (1, 7)
    buffer.take(Room(4), at_least_one=True)
    buffer.done()
    measured.consumer.end = 2
    buffer.append(cast(Any, [FakeRecord(1, timestamp=future_ms)]))
    assert await measured.after(1) == (1, 0)
    assert await measured.after(30) == (1, 30)
    assert set(measured.metrics.not_ready(20)) == {str(partition())}


async def test_silence_is_told_from_having_nothing_to_say() -> None:
    measured = Measured(Asked(end=0, polled_ms=1_000_000))
    measured.buffers[TP].settle("fence", 0, {})
    await measured.after(0)
    measured.consumer.polled_ms = measured.now_ms
    await measured.after(SILENT_SECONDS - 1)
    assert measured.metrics.not_ready(1) == {}
    await measured.after(2)
    assert "no fetch was answered for" in measured.metrics.not_ready(1)[str(partition())]
    measured.consumer.polled_ms = measured.now_ms
    await measured.after(1)
    assert measured.metrics.not_ready(1) == {}


@pytest.mark.slow
async def test_partitions_that_are_added_are_read_soon(settings: Settings, tmp_path: Path) -> None:
    world = World(settings.model_copy(update={"materialiser": MaterialiserSettings(port=free_port())}), tmp_path)
    async with running(world.settings) as http:
        await ready(http, 200)
        admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
        await admin.start()
        await admin.create_partitions({world.name(topics.SPANS): NewPartitions(3)})
        await admin.close()
        await asyncio.sleep(1)
        await world.produce(topics.SPANS, [span(span_id="added")], partition=2)
        await world.until("SELECT count() FROM spans", lambda rows: rows == [(1,)], 25)


@pytest.mark.slow
@pytest.mark.chaos
async def test_not_ready_while_kafka_does_not_answer(clickhouse_settings: ClickHouseSettings, tmp_path: Path) -> None:
    own = MaterialiserSettings(port=free_port())
    with EmbeddedKafka(tmp_path) as kafka:
        await create_topics(kafka.settings())
        settings = Settings(kafka=kafka.settings(), clickhouse=clickhouse_settings, materialiser=own)
        async with running(settings) as http:
            await ready(http, 200)
            with frozen(kafka.pid):
                await ready(http, 503, SILENT_SECONDS + 10)
            await ready(http, 200)


@pytest.mark.slow
@pytest.mark.chaos
async def test_a_backlog_is_shown_through_a_rebalance_while_clickhouse_hangs(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    own = MaterialiserSettings(port=free_port(), batch_wait_ms=50, insert_seconds=3, session_seconds=6)
    with EmbeddedClickHouse(tmp_path / "clickhouse") as engine:
        settings = Settings(kafka=kafka_settings, clickhouse=engine.settings("lag"), materialiser=own)
        world, name = World(settings, tmp_path), kafka_settings.topic(topics.SPANS)
        async with running(settings) as http:
            await world.produce(topics.SPANS, [span(span_id="first")])
            await ready(http, 200)
            await world.until("SELECT count() FROM ingest_log", lambda rows: rows[0][0] > 0)
            with frozen(engine.pid):
                await world.produce(topics.SPANS, [span(span_id=str(number)) for number in range(300)])
                await lag_is(http, name, 300)
                other: AIOKafkaConsumer = AIOKafkaConsumer(
                    name,
                    bootstrap_servers=kafka_settings.bootstrap_servers,
                    group_id=f"{kafka_settings.topic_prefix}{own.group}",
                    enable_auto_commit=False,
                )
                await other.start()
                await other.stop()
                await lag_is(http, name, 300)
                assert (await samples(http))["fulgurite_materialiser_lag_seconds", name, "0"] > 1
                await ready(http, 503)
            await lag_is(http, name, 0)
