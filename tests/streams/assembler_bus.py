"""A producer and readers of the real broker, for the assembler's tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.structs import ConsumerRecord, TopicPartition
from pydantic import BaseModel

from fulgurite.consumers.translator import serve as translate
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import AssemblerSettings, KafkaSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import Topic
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.assembler.service import serve
from tests.consumers.otlp_encoding import record, span
from tests.streams.assembler_records import finished, llm_call, queued, reward, started, value

Record = ConsumerRecord[bytes, bytes]


class Bus:
    """Writes events as their producers do; reads outputs as their consumers do (read_committed)."""

    def __init__(self, settings: KafkaSettings, producer: AIOKafkaProducer) -> None:
        self.settings = settings
        self.producer = producer

    async def send(self, *events: BaseModel, partition: int | None = None) -> None:
        """Acknowledged before it returns, each before the next of another topic is sent."""
        for event in events:
            topic = topics.SPANS if isinstance(event, Span) else topics.ROLLOUTS
            topic = topics.REWARDS if isinstance(event, Reward) else topic
            key = str(event.rollout_id).encode()  # type: ignore[attr-defined]
            await self.producer.send_and_wait(self.settings.topic(topic), value(event), key, partition)

    async def rollout(self, rollout_id: str, *, group_id: str = "") -> None:
        """A whole life: two calls that continue each other, and a reward."""
        await self.send(
            queued(rollout_id, group_id),
            started(rollout_id),
            llm_call(rollout_id, 1, [1, 2], [3]),
            llm_call(rollout_id, 2, [1, 2, 3, 4], [5]),
            reward(rollout_id, 1.0),
            finished(rollout_id, group_id=group_id),
        )

    async def reward_as_otlp(self, rollout_id: str, amount: float) -> None:
        """As a Collector writes one that is made in the first attempt of a rollout."""
        span_of = record(
            span({"agentlightning.reward.0.value": amount}),
            resource={"fulgurite.rollout_id": rollout_id, "fulgurite.attempt_id": f"{rollout_id}-1"},
        )
        await self.producer.send_and_wait(self.settings.topic(topics.OTLP_SPANS), span_of)

    async def in_transaction(self, topic: Topic, data: bytes, *, partition: int) -> None:
        """One record, and behind it the marker of the commit."""
        name = self.settings.topic(topic)
        servers = self.settings.bootstrap_servers
        writer = AIOKafkaProducer(bootstrap_servers=servers, transactional_id=f"{name}-test")
        async with writer, writer.transaction():
            await writer.send_and_wait(name, data, partition=partition)

    async def ends_without(self, rollout_id: str) -> None:
        """A whole life but for its reward."""
        await self.send(started(rollout_id), llm_call(rollout_id, 1, [1], [2]), finished(rollout_id))

    async def read(self, topic: Topic) -> list[Record]:
        """All committed records there are now, partition after partition."""
        name = self.settings.topic(topic)
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.settings.bootstrap_servers,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        await consumer.start()
        try:
            partitions = [TopicPartition(name, p) for p in range(topic.partitions or self.settings.partitions)]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            found: list[Record] = []
            while any([await consumer.position(tp) < end for tp, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=100)).values():
                    found += records
            return found
        finally:
            await consumer.stop()

    async def trajectories(self) -> list[Trajectory]:
        return [decode(Trajectory, record.value) for record in await self.read(topics.TRAJECTORIES)]

    async def until(self, topic: Topic, count: int, seconds: float = 60.0) -> list[Record]:
        """The topic's records, once there are so many."""
        deadline = time.monotonic() + seconds
        while len(found := await self.read(topic)) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} records in {topic.name}"
            await asyncio.sleep(0.1)
        return found


@asynccontextmanager
async def connected(settings: KafkaSettings) -> AsyncGenerator[Bus]:
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        yield Bus(settings, producer)
    finally:
        await producer.stop()


@asynccontextmanager
async def assembling(
    kafka: KafkaSettings, *, hook: Callable[[str], None] = lambda _: None, **own: Any
) -> AsyncGenerator[asyncio.Task[None]]:
    """The assembler at work in this process, with these settings of its own."""
    settings = Settings(kafka=kafka, assembler=AssemblerSettings(**own))
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop, hook))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


@asynccontextmanager
async def translating(kafka: KafkaSettings) -> AsyncGenerator[None]:
    """The translator at work in this process."""
    stop = asyncio.Event()
    task = asyncio.create_task(translate(Settings(kafka=kafka), stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def translated(kafka: KafkaSettings) -> dict[int, int]:
    """What the translator's group has committed of otlp_spans, by partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(f"{kafka.topic_prefix}{topics.TRANSLATOR_GROUP}")
        return {tp.partition: at.offset for tp, at in found.items()}
    finally:
        await admin.close()


async def add_partition(kafka: KafkaSettings, topic: Topic) -> None:
    """One more than kafka.partitions."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        await admin.create_partitions({kafka.topic(topic): NewPartitions(total_count=kafka.partitions + 1)})
    finally:
        await admin.close()


async def known_translator(kafka: KafkaSettings) -> None:
    """There has been one, which is away now."""
    async with translating(kafka):
        async with asyncio.timeout(30):
            while len(await translated(kafka)) < kafka.partitions:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


class Mortal:
    """A broker that is killed when its hook reaches certain steps, and comes back."""

    def __init__(self, server: EmbeddedKafka, kills: dict[str, int]) -> None:
        self.kills = kills
        """How often it is to be killed at each step."""
        self._server = server
        self._starting = False

    def hook(self, reached: str) -> None:
        # Not while start() still tries it out: its own clients would be cut off.
        if self.kills.get(reached, 0) and not self._starting:
            self.kills[reached] -= 1
            self._starting = True
            self._server.kill()

    async def revive(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if not self._server.running:
                await asyncio.to_thread(self._server.start)
                self._starting = False


def ids(trajectories: Sequence[Trajectory]) -> list[str]:
    return sorted(trajectory.rollout_id for trajectory in trajectories)
