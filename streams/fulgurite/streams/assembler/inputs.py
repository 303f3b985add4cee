"""The assembler's readers: three topics, their end offsets, and single records read a second time.

Four clients, because a broker answers the requests of one connection in turn: a fetch that waits for data (up to 0.5 s)
would hold up a question for end offsets on the same connection.

- `rollouts`, and `spans` with `rewards`: read_committed, assigned by hand; offsets are kept by the transactions.
- end offsets: read_uncommitted, so that they are the log's true ends. With an open transaction in a partition of spans
  the read_committed end lies before records that were acknowledged after it began.
- reading again: only when memory was short.

Does not know what the records mean.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from fulgurite.producers.kafka import connection_options
from fulgurite.producers.reading import fetch
from fulgurite.schemas import topics
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.streams.assembler.join import EXPIRED
from fulgurite.streams.assembler.rollouts import Held
from fulgurite.streams.transactions import patiently

logger = logging.getLogger(__name__)

POLL_MS = 100
"""A poll returns at once when there is a record. A transaction's marker is none: it is noticed after this."""
POLL_RECORDS = 2_000
"""Bounds how long one poll's records keep the event loop."""

_TOPICS_SECONDS = 1.0
_WARN_SECONDS = 5.0
_SKIP_RECORDS = 2_000
"""Records that are cheaper to read than to seek over, when reading again."""


class Inputs:
    """Connected from start() to close()."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._clients: list[AIOKafkaConsumer] = []
        self.rollouts_topic = settings.topic(topics.ROLLOUTS)
        self.spans_topic = settings.topic(topics.SPANS)
        self.rewards_topic = settings.topic(topics.REWARDS)

    async def start(self) -> None:
        """Waits for the broker."""
        self.rollouts = await self._client("read_committed")
        self.data = await self._client("read_committed")
        self._again = await self._client("read_committed")
        self._ends = await self._client("read_uncommitted")

    async def partitions(self) -> tuple[list[TopicPartition], list[TopicPartition], list[TopicPartition]]:
        """Of rollouts, spans, rewards; waits until they exist. Raises SettingsError if they are not co-partitioned."""
        names = (self.rollouts_topic, self.spans_topic, self.rewards_topic)
        warned = -_WARN_SECONDS
        while True:
            counts = await patiently("topics", self._partition_counts)
            found = [range(counts.get(name, 0)) for name in names]
            missing = [name for name, partitions in zip(names, found, strict=True) if not partitions]
            if not missing:
                break
            if time.monotonic() - warned > _WARN_SECONDS:
                warned = time.monotonic()
                logger.warning("waiting for topics to be created: %s", ", ".join(missing))
            await asyncio.sleep(_TOPICS_SECONDS)
        if len(set(found)) > 1:
            said = ", ".join(f"{name} has {len(p)}" for name, p in zip(names, found, strict=True))
            raise SettingsError(f"rollouts, spans and rewards need the same number of partitions, but {said}")
        rollouts, spans, rewards = (
            [TopicPartition(name, p) for p in partitions] for name, partitions in zip(names, found, strict=True)
        )
        return rollouts, spans, rewards

    async def _partition_counts(self) -> dict[str, int]:
        admin = AIOKafkaAdminClient(**connection_options(self._settings))
        try:
            await admin.start()
            found = await admin.describe_topics([self.rollouts_topic, self.spans_topic, self.rewards_topic])
            return {topic["topic"]: len(topic["partitions"]) for topic in found}
        finally:
            await admin.close()

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """The ends of the logs now: everything acknowledged before this call lies before them. One request."""
        wanted = list(partitions)
        return await patiently("end offsets", lambda: self._ends.end_offsets(wanted))

    async def begin_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        wanted = list(partitions)
        return await patiently("begin offsets", lambda: self._ends.beginning_offsets(wanted))

    async def read_again(self, held: Sequence[Held]) -> dict[tuple[TopicPartition, int], bytes]:
        """The values of records by their coordinates; EXPIRED for those that retention has deleted meanwhile."""
        wanted: dict[TopicPartition, set[int]] = defaultdict(set)
        for record in held:
            wanted[record.tp].add(record.offset)
        values: dict[tuple[TopicPartition, int], bytes] = {}
        for tp, offsets in wanted.items():
            self._again.assign([tp])
            for offset in sorted(offsets):
                if (tp, offset) not in values:
                    await self._read_from(tp, offset, offsets, values)
        self._again.assign([])
        return values

    async def _read_from(
        self, tp: TopicPartition, offset: int, wanted: set[int], values: dict[tuple[TopicPartition, int], bytes]
    ) -> None:
        """Reads on from a wanted record until the next wanted one is too far away."""
        self._again.seek(tp, offset)
        while True:
            found = await fetch(self._settings, self._again, tp, timeout_ms=POLL_MS, max_records=POLL_RECORDS)
            for record in found.get(tp, ()):
                if record.offset in wanted:
                    values[tp, record.offset] = record.value or EXPIRED
            position = await self._again.position(tp)
            for gone in [at for at in wanted if at < position and (tp, at) not in values]:
                values[tp, gone] = EXPIRED
            following = min((at for at in wanted if at >= position), default=None)
            if following is None or (following - position > _SKIP_RECORDS and position > offset):
                return

    async def close(self) -> None:
        for client in self._clients:
            try:
                await client.stop()
            except KafkaError as error:
                logger.debug("closing a consumer: %r", error)
        self._clients.clear()

    async def _client(self, isolation: Literal["read_committed", "read_uncommitted"]) -> AIOKafkaConsumer:
        async def connect() -> AIOKafkaConsumer:
            client = AIOKafkaConsumer(
                **connection_options(self._settings),
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                isolation_level=isolation,
            )
            try:
                await client.start()
            except BaseException:
                await client.stop()
                raise
            return client

        client = await patiently("readers", connect)
        self._clients.append(client)
        return client
