"""A coordinator's term of office: the proof that no other has taken over, and the dead letters of the log.

Both are one Kafka transaction, at most every TERM_SECONDS, under a transactional.id that names the topic prefix:

1. the dead letters collected so far are sent to `dead_letters`
2. the offsets up to which the log has been handled are added, for the group "<prefix>coordinator"
3. the transaction is committed

A crash before 3 leaves none of it; the successor's `claim` aborts what is open, and it starts from the offsets of the
last commit: an invalid record becomes one dead letter, however often the log is replayed. Starting a coordinator claims
the transactional.id, which fences whoever held it: its next commit, within about a second, raises Fenced. In between
both may write to `rollouts`, which harms nothing, because the log judges both alike (service.py).

Never claims twice in one process: a coordinator that lost its term must not take it back from its successor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, ProducerFenced
from aiokafka.structs import OffsetAndMetadata, RecordMetadata, TopicPartition

from fulgurite.consumers.committed import committed
from fulgurite.consumers.coordinator.log import Offsets
from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options, take_failure
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import Fenced
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import DEAD_LETTERS, ROLLOUTS

logger = logging.getLogger(__name__)

T = TypeVar("T")

TERM_SECONDS = 1.0
"""How often the term is proved. A transaction takes about 45 ms of waiting and little work."""

CONFIRMED_SECONDS = 3.0
"""A proof older than this is none: time-outs are not declared on it. Covers a slow commit, not a stopped process."""

_TRANSACTION_TIMEOUT_MS = 60_000
_ROOM_FOR_HEADERS_BYTES = 8_192


class Term:
    """Use: `await claim()`, then `renew` about every TERM_SECONDS; `close()`."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self.group = f"{kafka.topic_prefix}coordinator"
        self._topic = kafka.topic(ROLLOUTS)
        self._dead_letters = kafka.topic(DEAD_LETTERS)
        self._producer: AIOKafkaProducer | None = None
        self._confirmed = -float("inf")

    @property
    def is_confirmed(self) -> bool:
        """Whether the broker agreed a moment ago that this is the coordinator (and so is reachable)."""
        return time.monotonic() - self._confirmed < CONFIRMED_SECONDS

    async def claim(self) -> None:
        """Fences any predecessor. Waits for the broker, for ever."""
        backoff = Backoff(logger)
        while True:
            producer = AIOKafkaProducer(
                **connection_options(self._kafka),
                transactional_id=self.group,
                transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS,
                max_request_size=self._kafka.max_record_bytes + _ROOM_FOR_HEADERS_BYTES,
            )
            try:
                await producer.start()
            except (KafkaError, OSError) as error:
                await producer.stop()
                await backoff.wait(f"cannot claim {self.group}: {error!r}")
            except BaseException:
                await producer.stop()
                raise
            else:
                self._producer = producer
                return

    async def handled(self, partitions: Iterable[int]) -> Offsets:
        """The offsets of the last commit for these partitions; one is missing when it has none."""
        wanted = [TopicPartition(self._topic, partition) for partition in partitions]
        backoff = Backoff(logger)
        while True:
            admin = AIOKafkaAdminClient(**connection_options(self._kafka))
            try:
                await admin.start()
                found = await committed(admin, self.group, wanted)
            except (KafkaError, OSError) as error:
                await backoff.wait(f"cannot read the offsets of group {self.group}: {error!r}")
            else:
                return {tp.partition: at.offset for tp, at in found.items()}
            finally:
                await admin.close()

    async def renew(self, letters: Iterable[DeadLetter], handled: Mapping[int, int]) -> None:
        """Steps 1 to 3. Raises Fenced when another coordinator has taken over.

        Other errors travel up: what became of the transaction is unknown then, and only a new claim, by a new process,
        finds out.
        """
        assert self._producer is not None
        offsets = {
            TopicPartition(self._topic, partition): OffsetAndMetadata(at, "") for partition, at in handled.items()
        }
        started = time.monotonic()
        try:
            # No abort on the way out: with the broker away it would wait for ever; the next claim aborts.
            await self._producer.begin_transaction()
            sent: list[asyncio.Future[RecordMetadata]] = []
            for letter in letters:  # 1
                headers, value = self._fit(letter)
                sent.append(await self._producer.send(self._dead_letters, value, letter.key, headers=headers))
            await asyncio.gather(*sent)  # a letter that was refused must not be counted as handled
            await self._producer.send_offsets_to_transaction(offsets, self.group)  # 2
            await self._producer.commit_transaction()  # 3
        except ProducerFenced as error:
            raise Fenced(f"another coordinator has claimed {self.group}") from error
        self._confirmed = started

    def _fit(self, letter: DeadLetter) -> tuple[list[tuple[str, bytes]], bytes | None]:
        """A record at the size bound has no room left for headers: its value is cut, and the letter says so."""
        headers, value = letter.headers(), letter.value
        bound = self._kafka.max_record_bytes - _ROOM_FOR_HEADERS_BYTES - len(letter.key or b"")
        if value is not None and len(value) > bound:
            headers.append(("fulgurite.truncated_from_bytes", str(len(value)).encode()))
            value = value[: max(bound, 0)]
        return headers, value

    async def close(self, timeout_seconds: float = 2.0) -> None:
        if self._producer is not None:
            take_failure(self._producer)
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._producer.stop()
            except (TimeoutError, KafkaError) as error:
                logger.warning("the broker did not answer while closing: %r", error)
