"""Reads the topic `rollouts`: every partition from the beginning, committed records only, for ever.

Promises: records of one partition come in order, none is left out, none comes twice in one process. What cannot be an
event comes as a dead letter; a record that another client's partitioner put into the wrong partition is marked, so that
it can be forwarded. Does not know what events mean.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaConnectionError, KafkaError, RequestTimedOutError
from aiokafka.structs import TopicPartition

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.partitions import partition_of
from fulgurite.producers.reading import Fetched, fetch, value_of
from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.rollouts import ROLLOUT_EVENT, RolloutEvent
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import ROLLOUTS

logger = logging.getLogger(__name__)

STAGE = "coordinator"
MAX_BATCH_RECORDS = 2_000
"""Of one read; about 50 ms of work while replaying, so that HTTP and stop are heard in between."""

Offsets = dict[int, int]
"""Partition -> next offset."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record, understood."""

    partition: int
    offset: int
    event: RolloutEvent
    misrouted: bool
    key: bytes | None
    value: bytes | None

    def dead_letter(self, topic: str, reason: str, message: str) -> DeadLetter:
        return DeadLetter(topic, self.partition, self.offset, STAGE, reason, message, self.key, self.value)


@dataclass(frozen=True, slots=True)
class Batch:
    entries: list[Entry]
    invalid: list[DeadLetter]
    next_offsets: Offsets
    """Of every partition, after this batch."""


class RolloutLog:
    """Use: `await open()`, then `read()` again and again; `close()`."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self.topic = kafka.topic(ROLLOUTS)
        self._partitions: list[TopicPartition] = []
        self._tail: AIOKafkaConsumer | None = None
        self._ends: AIOKafkaConsumer | None = None

    async def open(self) -> None:
        """Waits, for ever, until the broker answers and the topic is there."""
        self._partitions = await self._wait_for_topic()
        # A second client reads uncommitted: its end offsets are the real ends, also behind an open transaction.
        self._ends = await self._connect(isolation_level="read_uncommitted")
        self._tail = await self._connect(isolation_level="read_committed")
        starts = await self._tail.beginning_offsets(self._partitions)
        # Explicit seeks, at once: seek_to_beginning may lose against the client's own search for a position.
        self._tail.assign(self._partitions)
        for partition, offset in starts.items():
            self._tail.seek(partition, offset)

    async def close(self) -> None:
        for client in (self._tail, self._ends):
            if client is not None:
                await client.stop()

    @property
    def partitions(self) -> int:
        return len(self._partitions)

    async def end_offsets(self) -> Offsets:
        """The ends of the log now."""
        assert self._ends is not None
        backoff = Backoff(logger)
        while True:
            try:
                ends = await self._ends.end_offsets(self._partitions)
            except (KafkaConnectionError, RequestTimedOutError) as error:
                await backoff.wait(f"cannot ask for the end offsets of {self.topic}: {error!r}")
            else:
                return {tp.partition: offset for tp, offset in ends.items()}

    async def reached(self, ends: Mapping[int, int]) -> bool:
        """Whether everything before `ends` was read."""
        return all(at >= ends[partition] for partition, at in (await self.next_offsets()).items())

    async def read(self, wait_ms: int = 250) -> Batch:
        """What is there, at most MAX_BATCH_RECORDS; waits up to `wait_ms` for the first record."""
        assert self._tail is not None
        found = await fetch(self._kafka, self._tail, timeout_ms=wait_ms, max_records=MAX_BATCH_RECORDS)
        entries: list[Entry] = []
        invalid: list[DeadLetter] = []
        for records in found.values():
            for record in records:
                try:
                    entries.append(self._entry(record))
                except InvalidEvent as error:
                    invalid.append(self._invalid(record, error))
        return Batch(entries, invalid, await self.next_offsets())

    async def next_offsets(self) -> Offsets:
        """Of every partition: what was read lies before it."""
        assert self._tail is not None
        return {tp.partition: await self._tail.position(tp) for tp in self._partitions}

    def _entry(self, record: Fetched) -> Entry:
        event = decode_union(ROLLOUT_EVENT, "RolloutEvent", value_of(record))
        misrouted = partition_of(event.rollout_id.encode(), self.partitions) != record.partition
        return Entry(record.partition, record.offset, event, misrouted, record.key, record.value)

    def _invalid(self, record: Fetched, error: InvalidEvent) -> DeadLetter:
        return DeadLetter(
            topic=self.topic,
            partition=record.partition,
            offset=record.offset,
            stage=STAGE,
            reason=error.reason,
            message=str(error),
            key=record.key,
            value=record.value,
        )

    async def _connect(self, isolation_level: str) -> AIOKafkaConsumer:
        backoff = Backoff(logger)
        while True:
            consumer = AIOKafkaConsumer(
                **connection_options(self._kafka),
                isolation_level=isolation_level,
                enable_auto_commit=False,
                # Falling out of the log (its beginning was deleted while we read) must not skip anything silently: the
                # error ends the process, and the next one rebuilds from what there is.
                auto_offset_reset="none",
                max_partition_fetch_bytes=max(1 << 20, self._kafka.max_record_bytes),
            )
            try:
                await consumer.start()
            except (KafkaError, OSError) as error:
                await consumer.stop()
                await backoff.wait(f"Kafka at {self._kafka.bootstrap_servers} does not answer: {error!r}")
            except BaseException:
                await consumer.stop()
                raise
            else:
                return consumer

    async def _wait_for_topic(self) -> list[TopicPartition]:
        backoff = Backoff(logger)
        while True:
            admin = AIOKafkaAdminClient(**connection_options(self._kafka))
            try:
                await admin.start()
                [found] = await admin.describe_topics([self.topic])
            except (KafkaError, OSError) as error:
                problem = f"cannot ask for topic {self.topic}: {error!r}"
            else:
                if found["partitions"]:
                    numbers = sorted(int(each["partition"]) for each in found["partitions"])
                    return [TopicPartition(self.topic, number) for number in numbers]
                problem = f"the broker does not know topic {self.topic}: create the topics first (fulgurite topics)"
            finally:
                await admin.close()
            await backoff.wait(problem)
