"""What a reader of a topic fetches with: aiokafka's getmany, which no record's bytes can end.

aiokafka raises on a record that it cannot decode (a header's name that is not UTF-8), again at every attempt, and what
it had drained by then is gone. Here all partitions that may have lost something are read raw (raw.py) from where they
stood.

Promises: each record once and in order, or the error that getmany raised; a record that nobody can decode comes as
`Undecodable`, and is logged. A partition that cannot be read at all is tried again, and says so; the others go on.
Does not know what becomes of such a record: its reader does.

Whoever has to know all that is committed now reads up to `log_ends`, by `fetch_up_to`: the ends that a read_committed
consumer is told are those of the first transaction that is still open, and somebody else's hides what was committed
behind its records for as long as it is, up to its time-out where its writer is dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    ConsumerStoppedError,
    CorruptRecordException,
    IllegalStateError,
    KafkaError,
    RecordTooLargeError,
    UnsupportedCodecError,
)

from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Read, Undecodable, read
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.settings import KafkaSettings

logger = logging.getLogger(__name__)

Fetched = ConsumerRecord[Any, Any] | Undecodable
Records = dict[TopicPartition, Sequence[Fetched]]

RETRY_SECONDS: Final = 1.0
REPORT_SECONDS: Final = 5.0
_POLL_MS: Final = 200
_AT_ONCE: Final = 8
"""Partitions that are read raw at a time, each by a connection of its own."""
_OF_A_PARTITION: Final = (CorruptRecordException, UnsupportedCodecError, RecordTooLargeError)
"""Other errors of Kafka's are the connection's or the group's. Decoders raise what is none of Kafka's."""


async def fetch(
    settings: KafkaSettings,
    consumer: AIOKafkaConsumer,
    *partitions: TopicPartition,
    timeout_ms: int,
    max_records: int | None = None,
    committed: bool = True,
) -> Records:
    """Of these partitions, or of all that are assigned now. `max_records` bounds what is read raw by partition;
    `committed` says whether the consumer reads only that. Raises what getmany raises for another reason than a
    partition's bytes."""
    before = await _positions(consumer, partitions or consumer.assignment())
    if not before:  # nothing is drained whose place is not known
        await asyncio.sleep(timeout_ms / 1000)
        return {}
    try:
        return dict(await consumer.getmany(*before, timeout_ms=timeout_ms, max_records=max_records))
    except ConsumerStoppedError:
        raise
    except Exception as error:  # decoders raise errors of many kinds
        if isinstance(error, KafkaError) and not isinstance(error, _OF_A_PARTITION):
            raise
        logger.warning("a fetch failed, and is made again record by record: %r", error)
    places = asyncio.Semaphore(_AT_ONCE)

    async def look(tp: TopicPartition, offset: int) -> Read:
        async with places:
            return await read(settings, tp, offset, committed=committed)

    found = await asyncio.gather(*(_raw(look, consumer, tp, at, max_records) for tp, at in before.items()))
    if any(records is None for records in found):
        await asyncio.sleep(RETRY_SECONDS)
    return {tp: records for tp, records in zip(before, found, strict=True) if records}


async def log_ends(settings: KafkaSettings, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """Of the log as it is now, behind open transactions. Raises Kafka's errors."""
    consumer = AIOKafkaConsumer(**connection_options(settings), enable_auto_commit=False)
    try:
        await consumer.start()
        return await consumer.end_offsets(list(partitions))
    finally:
        await consumer.stop()


async def fetch_up_to(
    settings: KafkaSettings, consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]
) -> AsyncGenerator[Records]:
    """From where these partitions stand; what lies behind `ends` may come, too. Raises as `fetch`."""
    heard = time.monotonic()
    while any([await consumer.position(tp) < end for tp, end in ends.items()]):
        fetched = await fetch(settings, consumer, *ends, timeout_ms=_POLL_MS)
        now = time.monotonic()
        if fetched:
            heard = now
        elif now - heard >= REPORT_SECONDS:
            heard = now
            topics = ", ".join(sorted({tp.topic for tp in ends}))
            logger.info("%s: waiting for the end of another writer's open transaction", topics)
        yield fetched


def value_of(record: Fetched) -> bytes | None:
    """Raises InvalidEvent for a record that nobody can decode, as decoding its value would."""
    if isinstance(record, Undecodable):
        raise InvalidEvent("undecodable", record.why)
    return record.value


async def _positions(consumer: AIOKafkaConsumer, partitions: Any) -> dict[TopicPartition, int]:
    found: dict[TopicPartition, int] = {}
    for tp in partitions:
        try:
            found[tp] = await consumer.position(tp)
        except IllegalStateError:
            continue  # another owner's by now
    return found


async def _raw(
    look: Callable[[TopicPartition, int], Awaitable[Read]],
    consumer: AIOKafkaConsumer,
    tp: TopicPartition,
    offset: int,
    max_records: int | None,
) -> Sequence[Fetched] | None:
    """None where it cannot be read now."""
    try:
        if tp not in consumer.assignment() or (consumer.highwater(tp) or 0) <= offset:
            return ()  # there was nothing to lose
        try:
            found = await look(tp, offset)
        except Exception as error:  # as above; and the network's
            logger.error("%s-%d: offset %d cannot be read, trying again: %r", tp.topic, tp.partition, offset, error)
            consumer.seek(tp, offset)
            return None
        records, following = found.records, found.next
        if max_records is not None and len(records) > max_records:
            records, following = records[:max_records], records[max_records].offset
        consumer.seek(tp, following)
    except IllegalStateError:
        return ()  # not ours any more: whoever owns it begins where we committed
    for record in records:
        if isinstance(record, Undecodable):
            where = {"topic": tp.topic, "partition": tp.partition, "offset": record.offset}
            what = "%s-%d offset %d cannot be decoded: %s"
            logger.warning(what, tp.topic, tp.partition, record.offset, record.why, extra=where)
    return records
