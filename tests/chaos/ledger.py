"""What was produced, and whether the tables say the same: the chaos run's two witnesses.

    Producer ──► Kafka ──► materialiser ──► ClickHouse
       └ ledger    └──────── audit ───────────┘

The ledger has every acknowledged record's place and a hash of its bytes: it must be in the log as it was sent. The log,
read committed, is then the truth: a record whose acknowledgement nobody saw may or may not be in it. Each line of the
log must be in its table once, or among the dead letters once with its own bytes. Knows nothing of what was disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import clickhouse_connect
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import Topic

TABLES: dict[Topic, tuple[str, str]] = {topics.SPANS: ("spans", "span_id"), topics.REWARDS: ("rewards", "reward_id")}
"""Where good lines end, and the column with their name."""

POISON_SHARE = 0.05
DUPLICATE_SHARE = 0.03
OLD_RECORDS = 200
"""Duplicates are of one of so many last records."""
MAX_UNACKNOWLEDGED = 2_000
PUT_OFF_SECONDS = 600.0
"""So long the producer's client tries to deliver a record: longer than any broker is away."""

Row = tuple[str, bytes]
"""A line in a table: the table, and the name it has there or its bytes."""


class Producer:
    """Idempotent, acks=all; keeps the ledger. `run` it, set `stop`, then all it sent is acknowledged or unknown."""

    def __init__(self, settings: Settings, seed: int, records_per_second: float) -> None:
        self._settings = settings
        self._random = random.Random(f"records {seed}")
        self._per_second = records_per_second
        self.stop = asyncio.Event()
        self.places: dict[tuple[str, int, int], int] = {}
        """Of acknowledged records: topic, partition and offset -> hash of the bytes."""
        self.unknown = 0
        """Records whose acknowledgement did not come."""
        self._open = 0
        self._number = 0
        self._sent: list[tuple[Topic, bytes, bytes]] = []

    async def run(self) -> None:
        """Until `stop`, and until what was sent is answered."""
        client = AIOKafkaProducer(
            bootstrap_servers=self._settings.kafka.bootstrap_servers,
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            request_timeout_ms=int(PUT_OFF_SECONDS * 1000),
        )
        await client.start()
        try:
            answers: set[asyncio.Task[None]] = set()
            while not self.stop.is_set():
                for _ in range(max(1, round(self._per_second / 20))):
                    if self._open < MAX_UNACKNOWLEDGED:
                        task = asyncio.create_task(self._send(client, *self._record()))
                        answers.add(task)
                        task.add_done_callback(answers.discard)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self.stop.wait()
            await asyncio.gather(*answers)
        finally:
            await client.stop()

    async def _send(self, client: AIOKafkaProducer, topic: Topic, key: bytes, value: bytes) -> None:
        self._open += 1
        try:
            at = await (await client.send(self._settings.kafka.topic(topic), value, key=key))
        except KafkaError:
            self.unknown += 1
        else:
            self.places[at.topic, at.partition, at.offset] = hash(value)
        finally:
            self._open -= 1

    def _record(self) -> tuple[Topic, bytes, bytes]:
        rand = self._random
        if self._sent and rand.random() < DUPLICATE_SHARE:
            return rand.choice(self._sent)
        self._number += 1
        topic = topics.SPANS if rand.random() < 0.7 else topics.REWARDS
        rollout_id = f"r{self._number % 53}"
        count = 1 if rand.random() < 0.5 else rand.randint(2, 20)
        lines = [self._line(topic, rollout_id, f"{self._number}-{line}") for line in range(count)]
        record = topic, rollout_id.encode(), b"\n".join(lines) + rand.choice([b"", b"\n"])
        self._sent = [*self._sent[-OLD_RECORDS:], record]
        return record

    def _line(self, topic: Topic, rollout_id: str, name: str) -> bytes:
        if self._random.random() < POISON_SHARE:
            # No JSON, bytes that are no text, a field of the wrong type.
            kind = self._random.choice(
                [b'{"poison %s"}', b'{"poison": "\xff\xfe %s"}', b'{"rollout_id":7,"poison":"%s"}']
            )
            return kind % name.encode()
        if topic is topics.SPANS:
            return encode(Span(rollout_id=rollout_id, span_id=name, name="chaos", start_ns=1, end_ns=2))
        return encode(Reward(rollout_id=rollout_id, reward_id=name, value=0.5))


@dataclass(slots=True)
class Audit:
    """What the tables say of the log, in lines; and the log of the ledger, in records."""

    records: int = 0
    lines: int = 0
    dead_letters: int = 0
    lost: int = 0
    """Lines that are in no table."""
    lost_by_kafka: int = 0
    """Acknowledged records that are not in the log as they were sent."""
    duplicated: int = 0
    """Rows beyond the first of a line."""
    wrong: int = 0
    """Rows of another table, with other bytes, or of a line that never was."""
    examples: list[str] = field(default_factory=list[str])

    @property
    def clean(self) -> bool:
        return not (self.lost or self.lost_by_kafka or self.duplicated or self.wrong)


async def audit(settings: Settings, places: dict[tuple[str, int, int], int]) -> Audit:
    """Compares partition by partition: no more than one is in memory."""
    found = Audit()
    async with _reader(settings) as reader:
        for topic, (table, column) in TABLES.items():
            for number in range(settings.kafka.partitions):
                part = TopicPartition(settings.kafka.topic(topic), number)
                expected: dict[tuple[int, int], Row] = {}
                acknowledged = {place[2]: digest for place, digest in places.items() if place[:2] == tuple(part)}
                for offset, value in await _log(reader, part):
                    found.records += 1
                    found.lost_by_kafka += acknowledged.pop(offset, hash(value)) != hash(value)
                    expected |= {(offset, index): row for index, row in lines(table, column, value)}
                found.lost_by_kafka += len(acknowledged)
                rows = await asyncio.to_thread(_table_rows, settings, part, table, column)
                compare(found, part, expected, rows)
    return found


async def ends(settings: Settings) -> dict[TopicPartition, int]:
    """One more than the last offset of every partition."""
    async with _reader(settings) as reader:
        parts = [
            TopicPartition(settings.kafka.topic(t), number)
            for t in TABLES
            for number in range(settings.kafka.partitions)
        ]
        return await reader.end_offsets(parts)


def ask(settings: Settings, sql: str, parameters: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    with clickhouse_connect.get_client(
        **connection_options(settings.clickhouse), database=settings.clickhouse.database
    ) as client:
        return [tuple(row) for row in client.query(sql, parameters=parameters).result_rows]


def compare(found: Audit, part: TopicPartition, expected: dict[tuple[int, int], Row], rows: list[Any]) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for offset, index, table, content in rows:
        place = (int(offset), int(index))
        seen[place] += 1
        if seen[place] > 1:
            found.duplicated += 1
            _example(found, f"{part} {place}: twice, also in {table}")
        if expected.get(place) != (table, bytes.fromhex(content)):
            found.wrong += 1
            _example(found, f"{part} {place}: {table} has {content}, sent was {expected.get(place)}")
    for place in expected.keys() - seen.keys():
        found.lost += 1
        _example(found, f"{part} {place}: lost, {expected[place]}")
    found.lines += len(expected)
    found.dead_letters += sum(table == "dead_letters" for table, _ in expected.values())


def _example(found: Audit, text: str) -> None:
    if len(found.examples) < 20:
        found.examples.append(text)


def lines(table: str, column: str, value: bytes) -> list[tuple[int, Row]]:
    """A record's lines, where they belong, by what the producer wrote into them."""
    rows: list[tuple[int, Row]] = []
    for index, line in enumerate(value.split(b"\n")):
        if b"poison" in line:
            rows.append((index, ("dead_letters", line)))
        elif line:
            rows.append((index, (table, str(json.loads(line)[column]).encode())))
    return rows


def _table_rows(settings: Settings, part: TopicPartition, table: str, column: str) -> list[Any]:
    where = "_topic = {topic:String} AND _partition = {partition:UInt32}"
    sql = (
        f"SELECT _offset, _index, '{table}', hex({column}) FROM {table} WHERE {where} "
        f"UNION ALL SELECT _offset, _index, 'dead_letters', hex(value) FROM dead_letters WHERE {where}"
    )
    return ask(settings, sql, {"topic": part.topic, "partition": part.partition})


async def _log(reader: AIOKafkaConsumer, part: TopicPartition) -> list[tuple[int, bytes]]:
    """All of a partition."""
    reader.assign([part])
    await reader.seek_to_beginning()
    end = (await reader.end_offsets([part]))[part]
    found: list[tuple[int, bytes]] = []
    while await reader.position(part) < end:
        for records in (await reader.getmany(timeout_ms=200)).values():
            found += [(record.offset, record.value or b"") for record in records]
    return found


@contextlib.asynccontextmanager
async def _reader(settings: Settings) -> AsyncGenerator[AIOKafkaConsumer]:
    reader: AIOKafkaConsumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers, isolation_level="read_committed"
    )
    await reader.start()
    try:
        yield reader
    finally:
        await reader.stop()
