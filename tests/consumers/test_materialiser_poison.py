"""Records that cannot be decoded and batches that cannot be read, under load: what Kafka acknowledged is in the tables,
offset by offset, once; the poison is a dead letter; what cannot be read at all is waited for, and said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics, delete_topics
from fulgurite.schemas import topics
from fulgurite.schemas.settings import ClickHouseSettings, KafkaSettings, MaterialiserSettings, Settings
from fulgurite.schemas.topics import Topic
from tests.consumers.poison import plain_builder, rotten, send_poison
from tests.consumers.test_materialiser_metrics import free_port, ready, running, samples
from tests.infra.dlq_world import World, span

PARTITIONS = 4
TABLES = ("spans", "rollout_events", "dead_letters")
PLACES = f"SELECT count() FROM ({' UNION ALL '.join(f'SELECT _offset FROM {t}' for t in TABLES)})"
"""All that is in the tables."""
Place = tuple[str, int, int]


@pytest.fixture
async def wide(
    kafka_server: EmbeddedKafka, clickhouse_settings: ClickHouseSettings, tmp_path: Path
) -> AsyncGenerator[World]:
    """The session's broker, with more partitions."""
    prefix = f"test{secrets.token_hex(4)}."
    kafka = KafkaSettings(
        bootstrap_servers=kafka_server.bootstrap_servers,
        topic_prefix=prefix,
        otlp_topic=f"{prefix}otlp_spans",
        partitions=PARTITIONS,
    )
    await create_topics(kafka)
    own = MaterialiserSettings(batch_wait_ms=50, insert_seconds=4, session_seconds=6, port=free_port())
    yield World(Settings(kafka=kafka, clickhouse=clickhouse_settings, materialiser=own), tmp_path)
    await delete_topics(kafka)


@dataclass
class Load:
    """What was acknowledged, by place."""

    world: World
    good: Counter[Place] = field(default_factory=Counter[Place])
    poison: dict[Place, bytes] = field(default_factory=dict[Place, bytes])

    async def healthy(self, producer: AIOKafkaProducer, topic: Topic, partition: int, count: int) -> None:
        name = self.world.name(topic)
        values = [_value(topic, f"{partition}-{secrets.token_hex(6)}") for _ in range(count)]
        sent = [await producer.send(name, value, key=b"r", partition=partition) for value in values]
        self.good.update([(name, partition, (await one).offset) for one in sent])

    async def bad(self, producer: AIOKafkaProducer, topic: Topic, partition: int) -> None:
        name, value = self.world.name(topic), _value(topic, secrets.token_hex(6))
        self.poison[name, partition, await send_poison(producer, name, partition, value, b"r")] = value

    async def in_one_batch(self, producer: AIOKafkaProducer, topic: Topic, partition: int) -> None:
        """Healthy ones before and behind a poison."""
        await asyncio.gather(
            self.healthy(producer, topic, partition, 3),
            self.bad(producer, topic, partition),
            self.healthy(producer, topic, partition, 3),
        )

    async def go_on(self, producer: AIOKafkaProducer, rounds: int) -> None:
        for _ in range(rounds):
            for topic in (topics.SPANS, topics.ROLLOUTS):
                for partition in range(PARTITIONS):
                    await self.healthy(producer, topic, partition, 5)
            await asyncio.sleep(0.02)

    def found(self) -> tuple[Counter[Place], dict[Place, bytes]]:
        """What the tables have."""
        rows = self.world.ask(
            "SELECT _topic, _partition, _offset FROM spans UNION ALL SELECT _topic, _partition, _offset "
            "FROM rollout_events UNION ALL SELECT _topic, _partition, _offset FROM dead_letters WHERE reason != "
            "'undecodable'"
        )
        dead = self.world.ask(
            "SELECT _topic, _partition, _offset, hex(value), topic, partition, offset, key FROM dead_letters "
            "WHERE reason = 'undecodable'"
        )
        assert all(row[:3] == row[4:7] and row[7] == "r" for row in dead)
        assert len(dead) == len({row[:3] for row in dead})
        return Counter((str(t), int(p), int(o)) for t, p, o in rows), {
            (str(row[0]), int(row[1]), int(row[2])): bytes.fromhex(row[3]) for row in dead
        }

    async def arrived(self, seconds: float = 60) -> None:
        for _ in range(int(seconds / 0.5)):
            good, poison = await asyncio.to_thread(self.found)
            if good.total() + len(poison) >= self.good.total() + len(self.poison):
                break
            await asyncio.sleep(0.5)
        good, poison = await asyncio.to_thread(self.found)
        assert (self.good - good, good - self.good) == (Counter(), Counter())
        assert poison == self.poison


def _value(topic: Topic, name: str) -> bytes:
    if topic is topics.SPANS:
        return span(span_id=name)
    return json.dumps({"event": "heartbeat", "rollout_id": "r", "attempt_id": "a", "worker_id": name}).encode()


@pytest.mark.slow
@pytest.mark.chaos
async def test_nothing_is_lost_before_beside_and_behind_what_cannot_be_decoded(wide: World) -> None:
    load = Load(wide)
    with plain_builder():
        async with (
            AIOKafkaProducer(
                bootstrap_servers=wide.settings.kafka.bootstrap_servers, acks="all", linger_ms=5
            ) as producer,
            running(wide.settings) as http,
        ):
            await load.go_on(producer, 1)
            await load.in_one_batch(producer, topics.SPANS, 1)
            await ready(http, 200)
            loading = asyncio.create_task(load.go_on(producer, 150))
            for topic, partition in ((topics.SPANS, 0), (topics.ROLLOUTS, 2), (topics.SPANS, 0), (topics.SPANS, 3)):
                await asyncio.sleep(0.5)
                await load.in_one_batch(producer, topic, partition)
            await wide.produce_in_transaction(topics.SPANS, span(span_id="committed"), b"r")
            await asyncio.sleep(0.5)
            await load.bad(producer, topics.SPANS, 0)
            await loading
            marked = await wide.until(
                "SELECT _offset FROM spans WHERE span_id = 'committed'", lambda rows: len(rows) == 1
            )
            load.good[wide.name(topics.SPANS), 0, marked[0][0]] += 1
            await load.arrived()
            await ready(http, 200)
            found = await samples(http)
    metric, name = "fulgurite_materialiser_undecodable_records_total", wide.name(topics.SPANS)
    assert [found[metric, name, str(partition)] for partition in (0, 1, 3)] == [3, 1, 1]
    # Read again from where the log of inserts ends, with nothing logged: no dead letter twice.
    wide.ask("TRUNCATE TABLE ingest_log")
    async with running(wide.settings) as http:
        await ready(http, 200)
        await wide.until("SELECT count() > 0 FROM ingest_log", lambda rows: rows == [(1,)])
        await load.arrived()


def rotten_second(folder: Path, topic: str) -> contextlib.AbstractContextManager[None]:
    """The second span of partition 0."""
    (segment,) = folder.glob(f"**/{topic}-0/*.log")
    return rotten(segment, segment.read_bytes().split(b'"span_id": "')[2].split(b'"')[0])


@pytest.mark.slow
@pytest.mark.chaos
async def test_what_the_disk_gives_back_wrong_is_waited_for_and_said(
    clickhouse_settings: ClickHouseSettings, tmp_path: Path
) -> None:
    own = MaterialiserSettings(batch_wait_ms=50, insert_seconds=4, session_seconds=6, port=free_port())
    with EmbeddedKafka(tmp_path / "kafka") as kafka, contextlib.ExitStack() as disk:
        settings = kafka.settings(KafkaSettings(partitions=PARTITIONS))
        await create_topics(settings)
        world = World(Settings(kafka=settings, clickhouse=clickhouse_settings, materialiser=own), tmp_path)
        load, name = Load(world), world.name(topics.SPANS)
        async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all") as producer:
            for _ in range(3):
                await load.healthy(producer, topics.SPANS, 0, 1)
            disk.enter_context(rotten_second(tmp_path / "kafka", name))
            async with running(world.settings) as http:
                reasons: dict[str, str] = {}
                while "offset 1 cannot be read" not in reasons.get(f"{name}-0", ""):
                    reasons = await ready(http, 503)
                    await asyncio.sleep(0.1)
                await load.go_on(producer, 3)
                await world.until(PLACES, lambda rows: rows == [(load.good.total() - 2 - 3 * 5,)])
                assert set(await ready(http, 503)) == {f"{name}-0"}
                assert (await samples(http))["fulgurite_materialiser_unreadable_total", name, "0"] >= 1
                disk.close()
                await ready(http, 200)
                await load.arrived()
    assert load.found()[1] == {}
