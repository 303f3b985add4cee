"""Step 0 of a replay: which offsets of which partitions, and whether it may begin, or goes on with one that died."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaConsumer, TopicPartition

from fulgurite.consumers.materialiser.agreement import another
from fulgurite.consumers.materialiser.blocks import Partition
from fulgurite.consumers.materialiser.history import NEAR, History
from fulgurite.infra.replay import marks
from fulgurite.infra.replay.marks import Mark
from fulgurite.infra.replay.store import ReplayStore
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.ids import new_id
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import Topic

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client


TAKEN = (
    "another `fulgurite replay` has gone on with this one or ended it (--abandon): it has inserted nothing since, and "
    "does not go on"
)


class Refused(FulguriteError):
    """Another replay of this topic is not finished, or Kafka's log is not the one of the tables."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the operator wants."""

    topic: Topic
    partitions: Sequence[int]
    rebuild: bool
    words: str
    """The options, in one order: who gives the same again goes on with what is unfinished."""
    from_offset: int | None = None
    from_time: datetime | None = None
    to_offset: int | None = None
    """Excluded."""
    to_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """What there is to do in one partition, and why not more."""

    partition: int
    lo: int
    hi: int
    expired: int
    """Offsets asked for that Kafka has forgotten."""
    ahead: int
    """Offsets asked for that the materialiser has not done yet: they are its own."""


async def of_the_same_log(kafka: KafkaSettings, store: ReplayStore, asked: Asked) -> None:
    """0.1. Raises Refused, Unavailable and KafkaError."""
    name = kafka.topic(asked.topic)
    partitions = {TopicPartition(name, number): Partition(asked.topic, name, number) for number in asked.partitions}
    history = History(kafka)
    try:
        logged = await store.logged(list(partitions.values()))
        async with _consumer(kafka) as consumer:
            begin, end = [await ask(list(partitions)) for ask in (consumer.beginning_offsets, consumer.end_offsets)]
        looks = await history.look({tp: max(begin[tp], logged[part] - NEAR) for tp, part in partitions.items()})
        times = await store.times({part: list(looks[tp].times) for tp, part in partitions.items()})
    finally:
        await history.close()
    for tp, part in partitions.items():
        why = another(part, logged[part], end[tp], looks[tp], times[part], looks[tp].incarnation.topic_id)
        if why is not None:
            raise Refused(f"nothing is replayed: {why}")


async def ranges(kafka: KafkaSettings, store: ReplayStore, asked: Asked) -> list[Span]:
    """Clipped to what Kafka still has and the materialiser has logged. Raises Unavailable and KafkaError."""
    name = kafka.topic(asked.topic)
    parts = [TopicPartition(name, number) for number in asked.partitions]
    async with _consumer(kafka) as consumer:
        begin, end = await consumer.beginning_offsets(parts), await consumer.end_offsets(parts)
        starts = await _offsets(consumer, parts, asked.from_offset, asked.from_time, end)
        stops = await _offsets(consumer, parts, asked.to_offset, asked.to_time, end)
    spans: list[Span] = []
    for part in parts:
        partition = Partition(asked.topic, name, part.partition)
        logged = (await store.logged([partition]))[partition]
        stop = min(stops[part], end[part])
        lo = max(starts[part], begin[part])
        expired = max(0, min(begin[part], stop) - starts[part])
        spans.append(Span(part.partition, lo, max(lo, min(stop, logged)), expired, max(0, stop - max(lo, logged))))
    return spans


def _consumer(kafka: KafkaSettings) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(**connection_options(kafka), isolation_level="read_committed", enable_auto_commit=False)


async def _offsets(
    consumer: AIOKafkaConsumer,
    parts: Sequence[TopicPartition],
    offset: int | None,
    time: datetime | None,
    end: dict[TopicPartition, int],
) -> dict[TopicPartition, int]:
    """The offset, or that of the first record at or after the time, or the end where neither is said or found."""
    if time is not None:
        found = await consumer.offsets_for_times({part: int(time.timestamp() * 1000) for part in parts})
        return {part: at.offset if (at := found.get(part)) else end[part] for part in parts}
    return {part: end[part] if offset is None else offset for part in parts}


def begin(
    client: Client, topic: str, asked: Asked, spans: Sequence[Span], checkpoint: Callable[[str], None]
) -> list[Mark]:
    """0.2, 0.3: one mark for every partition with something to do. Raises Refused."""
    own = new_id()
    fresh = [
        Mark(own, topic, span.partition, span.lo, span.hi, asked.rebuild, asked.words)
        for span in spans
        if span.lo < span.hi
    ]
    if not fresh:
        return []
    marks.write(client, fresh, marks.BEGUN)
    checkpoint("begun")
    found = marks.unfinished(client, topic)
    others = [mark for mark in found if mark.replay_id != own]
    if others:
        marks.write(client, fresh, marks.WITHDRAWN)
        raise Refused(refusal(others))
    return found


def adopted(client: Client, topic: str, asked: Asked) -> list[Mark]:
    """The unfinished marks of the same command; none where nothing is unfinished. Raises Refused."""
    found = marks.unfinished(client, topic)
    if any(mark.asked != asked.words or mark.ending_ms for mark in found):
        raise Refused(refusal(found))
    return found


async def taken(client: Client, store: ReplayStore, topic: Topic, found: Sequence[Mark]) -> list[Mark]:
    """0.4: claims the partitions of these marks of one topic, and gives those that nobody ended, as they are when
    nobody who claimed before writes any more. Raises Unavailable."""
    partitions = [Partition(topic, mark.topic, mark.partition) for mark in found]
    await store.claim(partitions)
    await store.when_quiet(*partitions)
    return marks.still_unfinished(client, found[0].topic, found)


def refusal(found: Sequence[Mark]) -> str:
    first = next((mark for mark in found if mark.ending_ms), found[0])
    if first.ending_ms:
        return (
            f"a replay of {first.topic} that {first.who} began at {first.begun} is being ended with --abandon, and is "
            f"not replayed any further. Where that does not run any more: fulgurite replay {first.topic} --abandon"
        )
    return (
        f"a replay of {first.topic} that {first.who} began at {first.begun} is not finished. Where it does not "
        f"run any more, finish it: fulgurite replay {first.asked}; or end it as it is: "
        f"fulgurite replay {first.topic} --abandon"
    )
