"""Sends dead letters to their topics again, so that a crash at any point neither loses one nor hides a double.

    dead_letters ──► plan ──► Kafka: the original topic, the original key, headers replay_of and replay_id
                       │                  ▲
    dead_letter_actions: intended ── 1    3    4 ──► sent, with the offset

The contract, for a chunk of letters. The code carries these numbers.

    0  settle    A replay of these letters that is only intended, for longer than INTENT_SECONDS, is of a process that
                 died. Its partition is read from the offset that the intent names, for the header with its replay_id:
                 found is recorded as sent, not found as withdrawn. A younger one may be at work: the letter is refused
                 until then. What was sent already is refused, unless --again.
    1  intend    One row a letter: its replay_id, the partition it will go to, the end of that partition as it is now.
    2  look      Read the replays of these letters again. Where there is one that step 0 did not see, withdraw: of two
                 at once both may withdraw, never both send.
    3  send      Idempotent producer, acks=all, within SEND_SECONDS; a record carries its replay_id.
    4  record    `sent`, with the offset that the broker gave.

A crash after
    0           nothing was begun.
    1, 2        intents without records: step 0 of a later run looks for them, finds none, withdraws them.
    3, partly   some records are there: step 0 finds them by their replay_id.
    3           all are there and nothing says so: the same.
    4           nothing to do.

What may still come twice: a record of a process that was frozen between looking at its clock and writing to its
connection, and woke after another run had settled its intent. And --again sends twice because it was told to. Neither
counts twice: a span is known by its span_id, a reward by its reward_id (one without gets its place as reward_id), a
rollout's events by their kind; the views group by these. Nor is anything lost: the dead letter itself stays.

What it does not do: headers of the original record, such as traceparent, are in no table and are not sent again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import RecordMetadata

from fulgurite.infra.dlq import actions
from fulgurite.infra.dlq.actions import INTENDED, SENT, WITHDRAWN, Replay, Step
from fulgurite.infra.dlq.letters import Place, topic_named
from fulgurite.infra.dlq.rules import Outgoing
from fulgurite.infra.kafka_config import BATCH_OVERHEAD_BYTES
from fulgurite.infra.topics import partitions_of
from fulgurite.producers.idempotent import abandon
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.reading import fetch
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.ids import new_id
from fulgurite.schemas.settings import KafkaSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

HEADER_REPLAY_OF = "fulgurite.replay_of"
HEADER_REPLAY_ID = "fulgurite.replay_id"

SEND_SECONDS = 10.0
"""Longest a record may take to be acknowledged; later it is left to the next run to say whether it came."""
INTENT_SECONDS = 30.0
"""After which an intent without an end is of a process that is gone. Well above SEND_SECONDS."""
CHUNK_LETTERS = 500
CHUNK_BYTES = 16 * 1024 * 1024

Checkpoint = Callable[[str], None]
"""Called after each step with its name: tests crash there."""


class Unfinished(FulguriteError):
    """Something was sent and the broker or ClickHouse did not say how it went: the next run settles it."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One letter that is in its topic again."""

    outgoing: Outgoing
    to: Place


@dataclass(frozen=True, slots=True)
class NotSent:
    outgoing: Outgoing
    why: str


def no_checkpoint(step: str) -> None:
    """Nothing to see."""


async def settle(kafka: KafkaSettings, client: Client, replays: Iterable[Replay]) -> None:
    """0: finds out what became of intents nobody ended. Give it only those older than INTENT_SECONDS."""
    open_replays = [replay for replay in replays if replay.state == INTENDED]
    if not open_replays:
        return
    found = await _find(kafka, open_replays)
    actions.write(
        client,
        [
            Step(
                r.place, SENT if r.replay_id in found else WITHDRAWN, r.replay_id, r.mend_id, to=found.get(r.replay_id)
            )
            for r in open_replays
        ],
    )


class Sender:
    """Use as `async with`; then `send` any number of letters. `known` are the replays that step 0 saw, by their ids."""

    def __init__(
        self, kafka: KafkaSettings, client: Client, known: Collection[str], checkpoint: Checkpoint = no_checkpoint
    ) -> None:
        self._kafka = kafka
        self._client = client
        self._known = known
        self._checkpoint = checkpoint
        self._partitions: dict[str, int] = {}
        self._abandoned = False
        options = connection_options(kafka)
        self._producer = AIOKafkaProducer(
            **options,
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            request_timeout_ms=int(SEND_SECONDS * 1000),
            max_request_size=kafka.max_record_bytes + BATCH_OVERHEAD_BYTES,
            client_id="fulgurite-dlq",
        )
        self._reader: AIOKafkaConsumer = AIOKafkaConsumer(**options, enable_auto_commit=False)

    async def __aenter__(self) -> Sender:
        try:
            await self._producer.start()
            await self._reader.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        # An idempotent producer would go on trying for ever: not after the intent's time.
        await (abandon(self._producer) if self._abandoned else self._producer.stop())
        await self._reader.stop()

    async def send(self, letters: Sequence[Outgoing], report: Callable[[Sequence[Sent | NotSent]], None]) -> None:
        """1 to 4 for these letters, chunk by chunk, each reported when it is done. Raises Unfinished."""
        for chunk in _chunks(letters):
            await self._send_chunk(chunk, report)

    async def _send_chunk(self, chunk: Sequence[Outgoing], report: Callable[[Sequence[Sent | NotSent]], None]) -> None:
        targets = await self._targets(chunk)
        ids = {out.letter.place: new_id() for out in chunk}
        started = time.monotonic()
        # 1
        self._write(INTENDED, chunk, ids, targets)
        self._checkpoint("intended")
        # 2
        rivals = actions.rivals(self._client, ids, self._known)
        losers = [out for out in chunk if out.letter.place in rivals]
        self._write(WITHDRAWN, losers, ids, targets)
        self._checkpoint("looked")
        if time.monotonic() - started > INTENT_SECONDS - 2 * SEND_SECONDS:
            raise Unfinished(f"ClickHouse took too long to take {len(chunk)} intents: run the same command again later")
        # 3
        sent, refused, unknown = await self._produce([out for out in chunk if out not in losers], ids, targets)
        self._checkpoint("sent")
        # 4
        self._record(sent, ids)
        self._write(WITHDRAWN, [item.outgoing for item in refused], ids, targets)
        self._checkpoint("recorded")
        lost = [NotSent(out, "another replay of it was begun at the same time: try again") for out in losers]
        report([*sent, *refused, *lost])
        if unknown:
            raise Unfinished(
                f"Kafka at {self._kafka.bootstrap_servers} did not acknowledge {unknown} of {len(chunk)} records "
                f"within {SEND_SECONDS:.0f} s. They may be there or not; run the same command again in "
                f"{INTENT_SECONDS:.0f} s: it finds out before it sends anything"
            )

    async def _targets(self, chunk: Sequence[Outgoing]) -> dict[Place, Place]:
        """For each letter the partition it goes to, and where that ends now."""
        partitions = {out.letter.place: await self._partition(out) for out in chunk}
        ends = await self._reader.end_offsets(sorted(set(partitions.values())))
        return {
            place: Place(partition.topic, partition.partition, ends[partition])
            for place, partition in partitions.items()
        }

    async def _partition(self, out: Outgoing) -> TopicPartition:
        topic = topic_named(self._kafka, out.topic)
        assert topic is not None, "rules.py lets no other through"
        if out.topic not in self._partitions:
            self._partitions[out.topic] = await partitions_of(self._kafka, topic)
        count = self._partitions[out.topic]
        if out.key is None:
            place = out.letter.place
            own = place.topic == out.topic and place.partition < count
            return TopicPartition(out.topic, place.partition if own else 0)
        numbers = list(range(count))
        return TopicPartition(out.topic, DefaultPartitioner()(out.key, numbers, numbers))

    async def _produce(
        self, letters: Sequence[Outgoing], ids: Mapping[Place, str], targets: Mapping[Place, Place]
    ) -> tuple[list[Sent], list[NotSent], int]:
        """What was acknowledged, what the client did not even take, and how many neither."""
        deadline = time.monotonic() + SEND_SECONDS
        futures: dict[asyncio.Future[RecordMetadata], Outgoing] = {}
        refused: list[NotSent] = []
        for out in letters:
            place = out.letter.place
            headers = [(HEADER_REPLAY_OF, place.header().encode()), (HEADER_REPLAY_ID, ids[place].encode())]
            if time.monotonic() > deadline:
                refused.append(NotSent(out, "Kafka takes nothing: try again"))
                continue
            try:
                future = await self._producer.send(
                    out.topic, out.value, key=out.key, partition=targets[place].partition, headers=headers
                )
            except KafkaError as error:  # too large, or no room in this partition's batch: not taken
                refused.append(NotSent(out, f"Kafka's client did not take it: {error!r}"))
            else:
                futures[future] = out
        if futures:
            await asyncio.wait(futures, timeout=max(0.0, deadline - time.monotonic()))
        sent = [
            Sent(out, Place(out.topic, future.result().partition, future.result().offset))
            for future, out in futures.items()
            if future.done() and not future.exception()
        ]
        self._abandoned = self._abandoned or len(sent) < len(futures)
        return sent, refused, len(futures) - len(sent)

    def _record(self, sent: Sequence[Sent], ids: Mapping[Place, str]) -> None:
        where = {item.outgoing.letter.place: item.to for item in sent}
        self._write(SENT, [item.outgoing for item in sent], ids, where)

    def _write(
        self, action: str, letters: Sequence[Outgoing], ids: Mapping[Place, str], to: Mapping[Place, Place]
    ) -> None:
        # The loop stands still meanwhile: nothing is on its way to the broker.
        if letters:
            steps = [
                Step(out.letter.place, action, ids[out.letter.place], out.mend_id, to=to[out.letter.place])
                for out in letters
            ]
            actions.write(self._client, steps)


def _chunks(letters: Sequence[Outgoing]) -> Iterable[Sequence[Outgoing]]:
    start, size = 0, 0
    for at, out in enumerate(letters):
        if at > start and (at - start >= CHUNK_LETTERS or size + len(out.value) > CHUNK_BYTES):
            yield letters[start:at]
            start, size = at, 0
        size += len(out.value)
    if start < len(letters):
        yield letters[start:]


async def _find(kafka: KafkaSettings, replays: Sequence[Replay]) -> dict[str, Place]:
    """Which of these replays have a record in Kafka, and where."""
    wanted = {replay.replay_id.encode(): replay.replay_id for replay in replays}
    found: dict[str, Place] = {}
    # Uncommitted too: ours are in no transaction, and somebody else's open one must not hide them.
    reader: AIOKafkaConsumer = AIOKafkaConsumer(
        **connection_options(kafka), enable_auto_commit=False, isolation_level="read_uncommitted"
    )
    await reader.start()
    try:
        starts: dict[TopicPartition, int] = {}
        for replay in replays:
            partition = TopicPartition(replay.to.topic, replay.to.partition)
            starts[partition] = min(replay.to.offset, starts.get(partition, replay.to.offset))
        begin, end = await reader.beginning_offsets(list(starts)), await reader.end_offsets(list(starts))
        for partition, start in starts.items():
            reader.assign([partition])
            reader.seek(partition, max(start, begin[partition]))
            while len(found) < len(wanted) and await reader.position(partition) < end[partition]:
                read = await fetch(kafka, reader, partition, timeout_ms=500, committed=False)
                for record in read.get(partition, ()):
                    name = wanted.get(dict(record.headers).get(HEADER_REPLAY_ID, b""))
                    if name is not None:
                        found[name] = Place(partition.topic, partition.partition, record.offset)
    finally:
        await reader.stop()
    return found
