"""The consumer of `trajectories`: all partitions, assigned by hand, from offsets that the checkpoint holds.

A record that nobody can decode comes as `Undecodable`: its reader says what becomes of it, `offsets` lie behind it.

No group membership: a rebalance must not take partitions away in the middle of a step. The group's name only carries
the committed offsets, so that lag can be seen with Kafka's own tools.

Partitions that are added meanwhile are taken up from their beginning: nothing in them can have been read. The client's
own look at the topic finds them, every PARTITIONS_SECONDS; who must know for certain asks the broker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.reading import Fetched, Records, fetch
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import KafkaSettings, SourceSettings
from fulgurite.streams.trainer.log import partitions_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

Record = Fetched

POLL_SECONDS = 0.25
"""How long one look for trajectories waits; a deadline is noticed within it."""

PARTITIONS_SECONDS = 10.0
"""How often the client asks which partitions there are: what is written to a new one waits for it."""

POLL_RECORDS = 512
"""Records of one poll: bounds what is in memory beside the open groups."""

FETCH_BYTES = 16 << 20
"""Per partition and fetch; a larger record is still fetched, alone."""

_CLOSE_SECONDS = 2.0


class TrajectoryReader:
    """`offsets` are the next ones to read, by partition: what a checkpoint stores and a transaction commits."""

    def __init__(
        self,
        settings: KafkaSettings,
        topic: str,
        when_gone: str = "Start a new run from the weights of the last version",
    ) -> None:
        """`when_gone`: what to do where Kafka has removed what is to be read next."""
        self._settings = settings
        self._topic = topic
        self._when_gone = when_gone
        self._consumer: AIOKafkaConsumer | None = None
        self.partitions: list[TopicPartition] = []
        self.offsets: dict[int, int] = {}
        self._begins: dict[int, int] = {}

    async def start(self) -> None:
        """Connects and learns the partitions; waits for Kafka for as long as it takes."""
        backoff = Backoff(logger)
        while True:
            consumer = AIOKafkaConsumer(
                **connection_options(self._settings),
                isolation_level="read_committed",
                enable_auto_commit=False,
                auto_offset_reset="none",  # a gap in the input must be an error, not a silent jump
                max_partition_fetch_bytes=FETCH_BYTES,
                metadata_max_age_ms=int(PARTITIONS_SECONDS * 1000),
            )
            try:
                await consumer.start()
                self.partitions = await partitions_of(self._settings, self._topic)
                self._consumer = consumer
                return
            except (KafkaError, TimeoutError) as error:
                await consumer.stop()
                await backoff.wait(f"reading {self._topic}: {error!r}")

    async def seek(self, offsets: Mapping[int, int]) -> None:
        """From these offsets; a partition without one (added since) from its beginning."""
        self._begins = dict(offsets)
        # In one go: a partition assigned without a position makes the client look for one in the background.
        self._client.assign(self.partitions)
        for tp in self.partitions:
            self._client.seek(tp, offsets.get(tp.partition, 0))
            self.offsets[tp.partition] = offsets.get(tp.partition, 0)

    async def seek_to_end(self) -> None:
        """For a new run: nothing that is already there can belong to it."""
        await self.seek({tp.partition: end for tp, end in (await self.ends()).items()})

    async def seek_to_begin(self, source: SourceSettings) -> None:
        """For a new replay: where its settings say. Raises SettingsError for a partition that is not there."""
        if source.begin in ("latest", "sql"):
            await self.seek_to_end()
            return
        wanted = await self.first_offsets()
        if source.begin == "offset":
            wanted |= self._given(source.offsets)
        elif source.begin == "time":
            wanted |= await self._at_time(source.time)
        await self.seek(wanted)

    async def first_offsets(self) -> dict[int, int]:
        """The oldest that Kafka still has, by partition."""
        found = await self._asked(lambda: self._client.beginning_offsets(self.partitions))
        return {tp.partition: offset for tp, offset in found.items()}

    async def read_at(self, partition: int, offsets: Iterable[int]) -> list[Record]:
        """These records of one partition, in the order of their offsets; `offsets` of the reader stay as they are."""
        tp = TopicPartition(self._topic, partition)
        wanted, found = sorted(set(offsets)), list[Record]()
        while wanted:
            self._client.seek(tp, wanted[0])
            try:
                records = await self._fetch(POLL_SECONDS, tp)
            except OffsetOutOfRangeError as error:
                raise self._forgotten(error) from error
            for record in records.get(tp, []):
                while wanted and wanted[0] < record.offset:
                    del wanted[0]  # no such record: the caller misses it
                if wanted and wanted[0] == record.offset:
                    found.append(record)
                    del wanted[0]
        return found

    async def poll(self, timeout_seconds: float) -> list[Record]:
        """The next records, oldest first by the broker's clock; `offsets` then lie behind them."""
        await self._take_up(self._client.partitions_for_topic(self._topic) or ())
        try:
            found = await self._fetch(timeout_seconds)
        except OffsetOutOfRangeError as error:
            raise self._forgotten(error) from error
        for tp in self.partitions:
            self.offsets[tp.partition] = await self._client.position(tp)
        records = [record for part in found.values() for record in part]
        return sorted(records, key=lambda record: (record.timestamp, record.partition, record.offset))

    async def caught_up(self) -> bool:
        """Whether everything committed so far was read, also to partitions that the client has not heard of yet. Waits
        for Kafka: without it nobody knows."""
        ends = await self.ends()
        return all(self.offsets[tp.partition] >= end for tp, end in ends.items()) and not await self.found_added()

    async def found_added(self) -> bool:
        """Asks the broker for partitions added since, and takes them up. Waits for Kafka."""
        found = await self._asked(lambda: partitions_of(self._settings, self._topic))
        return await self._take_up(tp.partition for tp in found)

    async def close(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            try:
                await asyncio.wait_for(consumer.stop(), _CLOSE_SECONDS)
            except (KafkaError, TimeoutError) as error:
                logger.debug("closing the consumer: %r", error)

    async def _take_up(self, numbers: Iterable[int]) -> bool:
        """Reads these partitions too; False where none of them is new."""
        added = sorted(set(numbers) - self.offsets.keys())
        if not added:
            return False
        logger.info("%s has new partitions: %s; they are read from now on", self._topic, ", ".join(map(str, added)))
        known = self.offsets.keys() | set(added)
        self.partitions = [TopicPartition(self._topic, number) for number in sorted(known)]
        await self.seek(self._begins | self.offsets)
        return True

    def _forgotten(self, error: OffsetOutOfRangeError) -> StartError:
        return StartError(
            f"{self._topic} no longer holds what this run has to read next ({error}): its retention is over. "
            f"{self._when_gone}"
        )

    def _given(self, offsets: Mapping[str, int]) -> dict[int, int]:
        known = {str(tp.partition) for tp in self.partitions}
        if unknown := sorted(set(offsets) - known):
            raise SettingsError(
                f"source.offsets: {self._topic} has no partition {', '.join(unknown)}; "
                f"it has {', '.join(sorted(known))}"
            )
        return {int(number): offset for number, offset in offsets.items()}

    async def _at_time(self, time: datetime | None) -> dict[int, int]:
        """The first records written then or later; where there are none, the end."""
        assert time is not None, "make_plan refuses begin = time without one"
        time = time if time.tzinfo else time.replace(tzinfo=UTC)
        milliseconds = int(time.timestamp() * 1000)
        found = await self._asked(lambda: self._client.offsets_for_times(dict.fromkeys(self.partitions, milliseconds)))
        ends = await self.ends()
        return {tp.partition: at.offset if (at := found.get(tp)) else ends[tp] for tp in self.partitions}

    async def _fetch(self, timeout_seconds: float, *partitions: TopicPartition) -> Records:
        timeout_ms = int(timeout_seconds * 1000)
        return await fetch(self._settings, self._client, *partitions, timeout_ms=timeout_ms, max_records=POLL_RECORDS)

    @property
    def _client(self) -> AIOKafkaConsumer:
        assert self._consumer is not None, "start() comes first"
        return self._consumer

    async def ends(self) -> dict[TopicPartition, int]:
        """Of what is committed now. Waits for Kafka."""
        return await self._asked(lambda: self._client.end_offsets(self.partitions))

    async def all_ends(self) -> dict[TopicPartition, int]:
        """As `ends`, of every partition there is, also those not taken up yet. May be asked during a poll."""
        partitions = await self._asked(lambda: partitions_of(self._settings, self._topic))
        return await self._asked(lambda: self._client.end_offsets(partitions))

    async def _asked(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks about offsets until Kafka answers."""
        backoff = Backoff(logger)
        while True:
            try:
                return await ask()
            except (KafkaError, TimeoutError) as error:
                await backoff.wait(f"asking for offsets of {self._topic}: {error!r}")
