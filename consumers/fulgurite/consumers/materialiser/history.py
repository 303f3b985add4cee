"""Whether a partition's log is still the one whose records the tables have. Offsets alone do not say it: a log that
lost its tail, or a topic that was made anew, gives the same ones to other records.

    incarnations   of a partition: its topic's id and its leader's epoch. A log changes under its readers only with one
                   of them, so whoever sees another one looks again
    read           what lies from an offset on
    look           the times of records at those places where another log would differ: before the end of what the
                   tables have, and wherever a leader's epoch begins. A log that was cut grows again in a new epoch

Promises: of a log that was cut and of one that was made anew, what lies at those places is other records; they are told
apart by Kafka's time, in ms. By connections of its own. Raises KafkaError: try again. Knows nothing of ClickHouse.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.api import Request

from fulgurite.consumers.materialiser.requests import EpochsRequest, TopicsRequest
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Read, fetched
from fulgurite.schemas.settings import KafkaSettings

logger = logging.getLogger(__name__)

ASK_SECONDS: Final = 15.0
"""Longest that one look may take."""
NEAR: Final = 50
"""So many offsets before the end of what the tables have are looked at."""
MANY: Final = 16
"""Most epochs that are looked at, the newest ones."""
LOOK_BYTES: Final = 64 * 1024
"""Of one place, unless its first batch alone is larger."""
AT_ONCE: Final = 32
"""Partitions looked at together: one after the other, many of them over a long way would take longer than there is."""
RECORDS: Final = 100
"""Most records of one place."""


@dataclass(frozen=True, slots=True)
class Incarnation:
    """Of a partition's log."""

    topic_id: str
    epoch: int
    leader: int = -1


@dataclass(frozen=True, slots=True)
class Look:
    incarnation: Incarnation
    times: Mapping[int, int]
    """Kafka's time in ms of the records that are there, by offset."""


class History:
    """One for each consumer; `close` at the end."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._client: AIOKafkaClient | None = None
        self._leaders: dict[TopicPartition, int] = {}
        """As far as they were asked for."""
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        client, self._client = self._client, None
        self._leaders.clear()
        if client is not None:
            await client.close()

    async def incarnations(self, topics: Collection[str]) -> dict[TopicPartition, Incarnation]:
        """Of every partition of these topics that is there and has a leader."""
        return await self._asked(self._incarnations(topics))

    async def look(self, places: Mapping[TopicPartition, int]) -> dict[TopicPartition, Look]:
        """At each partition from this offset on, and from where its epochs begin."""
        return await self._asked(self._look(places))

    async def read(self, tp: TopicPartition, at: int) -> Read:
        """What lies from this offset on, a little of it. Raises what codecs raise, too."""
        return await self._asked(self._read(tp, at))

    async def _read(self, tp: TopicPartition, at: int) -> Read:
        leader = self._leaders.get(tp)
        if leader is None:
            known = await self._incarnations([tp.topic])
            if tp not in known:
                raise UnknownTopicOrPartitionError(f"{tp} is not there, or has no leader")
            leader = known[tp].leader
        return await fetched(await self._connected(), leader, tp, at, LOOK_BYTES, wait_ms=0)

    async def _asked(self, asking: Any) -> Any:
        try:
            async with self._asking, asyncio.timeout(ASK_SECONDS):
                return await asking
        except BaseException as error:
            asking.close()  # where its turn did not come
            await self.close()  # what it knows of brokers may be why
            if isinstance(error, TimeoutError):
                raise KafkaTimeoutError(f"no answer for {ASK_SECONDS:.0f} s") from error
            if isinstance(error, OSError):
                raise KafkaConnectionError(str(error)) from error
            raise

    async def _connected(self) -> AIOKafkaClient:
        if self._client is None:
            self._client = AIOKafkaClient(**connection_options(self._settings), client_id="fulgurite-materialiser-log")
            await self._client.bootstrap()
        return self._client

    async def _send(self, node: int, request: Request[Any]) -> Any:
        try:
            return await (await self._connected()).send(node, request)
        except NotImplementedError as error:  # aiokafka's, of a broker without it
            raise IncompatibleBrokerVersion(f"Kafka 2.8 or newer is needed: {error}") from error

    async def _incarnations(self, topics: Collection[str]) -> dict[TopicPartition, Incarnation]:
        client = await self._connected()
        node = client.get_random_node()
        if node is None:
            raise KafkaConnectionError("no broker is known")
        answer = await self._send(node, TopicsRequest(topics))
        found: dict[TopicPartition, Incarnation] = {}
        for code, name, high, low, _, partitions, _, _ in answer.topics:
            for failed, number, leader, epoch, *_ in partitions:
                if not code and not failed and leader >= 0:
                    topic_id = f"{high & 2**64 - 1:016x}{low & 2**64 - 1:016x}"
                    found[TopicPartition(name, number)] = Incarnation(topic_id, epoch, leader)
        self._leaders |= {tp: one.leader for tp, one in found.items()}
        return found

    async def _look(self, places: Mapping[TopicPartition, int]) -> dict[TopicPartition, Look]:
        known = await self._incarnations({tp.topic for tp in places})
        if lacking := [tp for tp in places if tp not in known]:
            raise UnknownTopicOrPartitionError(f"{lacking[0]} is not there, or has no leader")
        begins = await self._begins({tp: known[tp] for tp in places})
        room = asyncio.Semaphore(AT_ONCE)

        async def at(tp: TopicPartition, place: int) -> tuple[TopicPartition, Look]:
            async with room:
                times: dict[int, int] = {}
                for offset in sorted({place, *begins[tp]}):
                    if offset not in times:
                        times |= await self._times(tp, known[tp].leader, offset)
                return tp, Look(known[tp], times)

        asked = [asyncio.create_task(at(tp, place)) for tp, place in places.items()]
        try:
            return dict(await asyncio.gather(*asked))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _begins(self, known: Mapping[TopicPartition, Incarnation]) -> dict[TopicPartition, list[int]]:
        """Where the newest epochs begin that have records."""
        found = {tp: list[int]() for tp in known}
        before = {tp: one.epoch - 1 for tp, one in known.items()}
        for _ in range(MANY):
            asked = {tp: epoch for tp, epoch in before.items() if epoch >= 0}
            before = dict[TopicPartition, int]()
            by_leader: dict[int, dict[TopicPartition, int]] = defaultdict(dict)
            for tp, epoch in asked.items():
                by_leader[known[tp].leader][tp] = epoch
            for leader, epochs in by_leader.items():
                answer = await self._send(leader, EpochsRequest(epochs))
                for name, partitions in answer.topics:
                    for code, number, epoch, end in partitions:
                        if code:
                            raise for_code(code)(f"{name}-{number}")
                        tp = TopicPartition(name, number)
                        if end >= 0 and end not in found[tp]:
                            found[tp].append(end)
                            before[tp] = epoch - 1
        return found

    async def _times(self, tp: TopicPartition, leader: int, at: int) -> dict[int, int]:
        try:
            read = await fetched(await self._connected(), leader, tp, at, LOOK_BYTES, wait_ms=0)
        except KafkaError as error:
            if error.retriable:
                raise
            logger.debug("%s: nothing to be seen at offset %d: %r", tp, at, error)
            return {}  # before its beginning or behind its end, or a batch that cannot be read
        return {record.offset: record.timestamp for record in read.records[:RECORDS]}
