"""The translator's loop; the flow and the contract are in the package's docstring."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from fulgurite.consumers.otlp.batches import otlp
from fulgurite.consumers.otlp.mend import mended
from fulgurite.consumers.otlp.spans import OtlpSpan, decode
from fulgurite.consumers.otlp.to_json import to_json
from fulgurite.consumers.otlp.wire import Malformed
from fulgurite.consumers.translator.rewards import TELL_TALES, Refused, rewards_of
from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.publisher import Acknowledgement, Publisher
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import fetch
from fulgurite.producers.redaction import Redactor
from fulgurite.producers.service import run_service
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, InvalidEvent, Undelivered
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.topics import OTLP_SPANS, REWARDS, TRANSLATOR_GROUP

logger = logging.getLogger(__name__)

Record = ConsumerRecord[bytes | None, bytes | None]
Checkpoint = Callable[[str], Awaitable[None]]
"""Awaited after each step with its name: tests crash there."""

STAGE: Final = "translator"
BATCH_RECORDS: Final = 500
"""Most records between two commits."""
FETCH_BYTES: Final = 8 * 1024 * 1024
"""Most bytes fetched ahead of a partition."""
POLL_MS: Final = 500
METADATA_MS: Final = 10_000
"""How soon partitions that were added to the topic are read: well within the assembler's otlp_wait_seconds."""


def main(settings: Settings) -> int:
    """`fulgurite translator`."""
    return run_service("translator", settings.log, lambda stop: serve(settings, stop))


async def no_checkpoint(step: str) -> None:
    """Nothing to see."""


async def serve(settings: Settings, stop: asyncio.Event, checkpoint: Checkpoint = no_checkpoint) -> None:
    """Until `stop`. Waits for the broker, for ever."""
    running = asyncio.create_task(_serve(settings, checkpoint))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if running.done():
        running.result()  # it never returns by itself: this raises what ended it
        return
    # Wherever it is, a crash there is allowed for.
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _serve(settings: Settings, checkpoint: Checkpoint) -> None:
    publisher = Publisher(settings.kafka, settings.producer, settings.redaction)
    await publisher.start()
    try:
        consumer = await _consumer(settings.kafka)
        try:
            logger.info("ready: rewards from %s to %s", settings.kafka.topic(OTLP_SPANS), settings.kafka.topic(REWARDS))
            committed: dict[TopicPartition, int] = {}
            while True:
                # 1
                batches = await fetch(settings.kafka, consumer, timeout_ms=POLL_MS, max_records=BATCH_RECORDS)
                if batches:
                    await checkpoint("read")
                # 2
                for records in batches.values():
                    await publish(publisher, records)
                if batches:
                    await checkpoint("published")
                # 3
                committed = await _commit(consumer, committed)
                if batches:
                    await checkpoint("committed")
        finally:
            await consumer.stop()
    finally:
        with contextlib.suppress(Undelivered):
            await publisher.close(0)


async def publish(publisher: Publisher, records: Iterable[Record | Undecodable]) -> None:
    """Returns when the broker has the rewards of all these records."""
    found: list[_Told] = []
    for record in records:
        if not isinstance(record, Undecodable):  # the materialiser's to tell, once
            found += _events(record, publisher.redactor)
    backoff = Backoff(logger)
    while found:
        try:
            sent: list[Acknowledgement] = [await _send(publisher, told) for told in found]
            await asyncio.gather(*sent)
        except (BufferFull, Undelivered) as error:
            # All of them again, in their order: under the same ids they count once.
            await backoff.wait(f"cannot publish rewards: {error}")
        else:
            return


@dataclass(frozen=True, slots=True)
class _Told:
    """A span's reward, or what is wrong with those that it says it has."""

    event: Reward | str
    record: Record
    value: bytes
    """The record's, readable."""
    index: int
    """Of the span in it."""


def _events(record: Record, redactor: Redactor | None) -> list[_Told]:
    if record.value is None or not any(name in record.value for name in TELL_TALES):
        return []
    try:
        value = otlp(record.value)
        spans = spans_of(value)
    except Malformed:
        return []  # the materialiser's to tell, once
    events: list[_Told] = []
    for span in spans:
        found = rewards_of(span, redactor)
        events += [_Told(reward, record, value, span.index) for reward in found if isinstance(reward, Reward)]
        refused = [reward.message for reward in found if isinstance(reward, Refused)]
        if refused:
            events.append(_Told("; ".join(refused), record, value, span.index))
    return events


def spans_of(value: bytes) -> list[OtlpSpan]:
    """Of a record with broken spans all others, as the materialiser has them. Raises Malformed."""
    try:
        return decode(value)
    except Malformed:
        return decode(mended(value))


def _dead(told: _Told, reason: str, message: str) -> DeadLetter:
    """One span alone, in the form in which the materialiser keeps those that it refuses."""
    record, index = told.record, told.index
    logger.warning("%s-%d offset %d, span %d: %.2000s", record.topic, record.partition, record.offset, index, message)
    try:
        alone = to_json(told.value, index)
    except Malformed:  # another span of the record is broken
        alone = to_json(mended(told.value), index)
    return DeadLetter(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        stage=STAGE,
        reason=reason,
        message=message,
        key=record.key,
        value=alone,
        line=index,
    )


async def _send(publisher: Publisher, told: _Told) -> Acknowledgement:
    reward = told.event
    if isinstance(reward, str):
        return await _send_dead(publisher, _dead(told, "bad_field", reward))
    try:
        return await publisher.publish_reward(reward)
    except InvalidEvent:  # larger than a record may be: most often its texts are
        with contextlib.suppress(InvalidEvent):
            return await publisher.publish_reward(reward.model_copy(update={"metadata": {}}))
    # Names of dimensions, which cannot be left out: it would be another reward.
    what = (
        f"the reward {reward.reward_id} is larger than a record may be (kafka.max_record_bytes), also without metadata"
    )
    return await _send_dead(publisher, _dead(told, "too_large", what))


async def _send_dead(publisher: Publisher, letter: DeadLetter) -> Acknowledgement:
    try:
        return await publisher.publish_dead_letter(letter)
    except InvalidEvent:  # its key alone is larger than a record may be
        return await publisher.publish_dead_letter(replace(letter, key=None))


async def _commit(consumer: AIOKafkaConsumer, committed: dict[TopicPartition, int]) -> dict[TopicPartition, int]:
    """Commits where each partition stands, if that is not what `committed` has; gives what is committed then.

    Also where nothing was read: the start of a partition that was never read, and the place behind what is no record
    (markers of transactions, what retention deleted). The assembler waits until this has reached the ends of the logs.
    What cannot be committed is read again, by us or by the partition's next owner.
    """
    try:
        stands = {tp: await consumer.position(tp) for tp in consumer.assignment()}
        if changed := {tp: offset for tp, offset in stands.items() if committed.get(tp) != offset}:
            await consumer.commit(changed)
    except (CommitFailedError, IllegalStateError) as error:
        logger.info("the group was rebalanced: %s", error)
    except KafkaError as error:
        logger.warning("cannot commit: %r", error)
    else:
        return stands
    return committed


async def _consumer(kafka: KafkaSettings) -> AIOKafkaConsumer:
    """Connected and subscribed, as soon as the broker answers."""
    backoff = Backoff(logger)
    while True:
        consumer = AIOKafkaConsumer(
            kafka.topic(OTLP_SPANS),
            **connection_options(kafka),
            group_id=f"{kafka.topic_prefix}{TRANSLATOR_GROUP}",
            client_id="fulgurite-translator",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=FETCH_BYTES,
            metadata_max_age_ms=METADATA_MS,
        )
        try:
            await consumer.start()
        except (KafkaError, OSError) as error:
            await consumer.stop()
            await backoff.wait(f"Kafka at {kafka.bootstrap_servers} is not ready: {error!r}")
        except BaseException:
            await consumer.stop()
            raise
        else:
            return consumer
