"""One partition's replay, chunk by chunk: steps 1 to 5 of the contract (see the package).

Bounds: a chunk in records, bytes and lines; one that needs too much memory or time is halved, and those behind it begin
smaller. Both stores are waited for, for ever, and it says so; stop it whenever you like. Not for ever is waited for one
record of which alone no insert succeeds: the replay ends with a sentence. It makes no dead letter of it, which in a
rebuild would replace rows that are there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from clickhouse_connect.driver.exceptions import OperationalError

from fulgurite.consumers.materialiser.blocks import (
    LINE_TOPICS,
    Partition,
    Slice,
    Unreadable,
    halves,
    missing,
    parted,
    readable,
)
from fulgurite.consumers.materialiser.errors import Fenced, OtherLog, Rejected, TooLarge, TooSlow, Unavailable
from fulgurite.consumers.materialiser.lines import line_feeds
from fulgurite.consumers.materialiser.lone import SECONDS as LONE_SECONDS
from fulgurite.consumers.materialiser.lone import TRIES as LONE_TRIES
from fulgurite.consumers.materialiser.partition import BATCH_LINES
from fulgurite.infra.replay import marks
from fulgurite.infra.replay.begin import TAKEN, Refused
from fulgurite.infra.replay.marks import Mark
from fulgurite.infra.replay.store import Range, ReplayStore
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.reading import Fetched, fetch
from fulgurite.schemas.settings import KafkaSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

T = TypeVar("T")
Kafka = Fetched

CHUNK_RECORDS = 5_000
CHUNK_BYTES = 16 * 1024 * 1024
LEAST_CHUNK_BYTES = 64 * 1024
GROWS_AFTER_CHUNKS = 10
"""Those that were inserted whole: then twice as much is tried again."""
CHUNKS_PER_PART = 20
"""A delete rewrites a mask of every part of the table that has such rows: not for every chunk."""
POLL_MS = 500
RETRY_SECONDS = (0.2, 5.0)
COMPLAIN_SECONDS = 5.0


@dataclass(slots=True)
class Counts:
    """What was done; `records` of them are there + inserted."""

    offsets: int = 0
    """Of the range, those without a record too (markers of transactions, compaction)."""
    records: int = 0
    there: int = 0
    inserted: int = 0
    expired: int = 0
    """Offsets that Kafka forgot before they were read: their rows are left as they are."""
    rows: int = 0
    """Of the range in the topic's table, afterwards."""
    dead: int = 0

    def add(self, other: Counts) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told what happens: a terminal, a log, a test that crashes it."""

    advance: Callable[[int], None] = lambda offsets: None
    complain: Callable[[str], None] = lambda problem: None
    checkpoint: Callable[[str], None] = lambda step: None


@dataclass(slots=True)
class _Reading:
    """Where the reader stands in one partition."""

    tp: TopicPartition
    has_lines: bool
    buffer: deque[Kafka] = field(default_factory=lambda: deque[Kafka]())


class Replayer:
    """Use as `async with`; `run` for one partition after the other."""

    def __init__(self, kafka: KafkaSettings, client: Client, store: ReplayStore, watch: Watch) -> None:
        self._kafka = kafka
        self._client = client
        self._store = store
        self._watch = watch
        self._complained = 0.0
        self._limit_bytes = CHUNK_BYTES
        self._whole_chunks = 0
        self._consumer: AIOKafkaConsumer = AIOKafkaConsumer(
            **connection_options(kafka),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=max(1 << 20, kafka.max_record_bytes),
        )

    async def __aenter__(self) -> Replayer:
        await self._consumer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    async def run(self, mark: Mark, partition: Partition) -> Counts:
        """1 to 5 from where the mark says it stands, until its end. The store has its claim. Raises Refused."""
        counts = Counts(offsets=mark.hi - mark.lo)
        reading = _Reading(TopicPartition(partition.name, partition.number), partition.topic in LINE_TOPICS)
        self._consumer.assign([reading.tp])
        self._consumer.seek(reading.tp, mark.next)
        part = at = mark.next
        chunks = 0
        while at < mark.hi:
            at = await self._skip_expired(reading, at, mark.hi, counts)
            # 1
            records, end = await self._read(reading, at, mark.hi)
            if records:
                await self._insert_missing(mark, Range(partition, at, end), records, counts)
            self._watch.checkpoint("inserted")
            self._watch.advance(end - at)
            at, chunks = end, chunks + 1
            if chunks == CHUNKS_PER_PART or at >= mark.hi:
                await self._end_part(mark, Range(partition, part, at))
                part, chunks = at, 0
        await self._log(mark, marks.DONE)
        whole = Range(partition, mark.lo, mark.hi)
        counts.rows, counts.dead = await self._patiently("count rows", lambda: self._store.rows(whole))
        return counts

    async def _end_part(self, mark: Mark, part: Range) -> None:
        if mark.rebuild:
            # 4
            piece = [replace(mark, lo=part.lo, hi=part.hi)]
            topic = part.partition.topic
            await self._patiently("log", lambda: self._store.log_claimed(topic, piece, marks.WHOLE))
            self._watch.checkpoint("whole")
            await self._patiently("delete old rows", lambda: self._store.delete_old(part, mark.begun_ms))
        self._watch.checkpoint("deleted")
        # 5
        await self._log(replace(mark, lo=part.lo, hi=part.hi), marks.PART)
        self._watch.checkpoint("logged")

    async def _log(self, mark: Mark, state: str) -> None:
        await self._patiently("log", lambda: asyncio.to_thread(marks.write, self._client, [mark], state))

    async def _skip_expired(self, reading: _Reading, at: int, hi: int, counts: Counts) -> int:
        begin = (await self._consumer.beginning_offsets([reading.tp]))[reading.tp]
        if begin <= at:
            return at
        known = min(begin, hi)
        counts.expired += known - at
        self._watch.advance(known - at)
        while reading.buffer and reading.buffer[0].offset < known:
            reading.buffer.popleft()
        return known

    async def _read(self, reading: _Reading, lo: int, hi: int) -> tuple[list[Kafka], int]:
        """The records of a chunk, and the offset it goes up to, excluded."""
        chunk: list[Kafka] = []
        size = lines = 0
        waited = time.monotonic()
        while lo < hi:
            if not reading.buffer:
                if await self._consumer.position(reading.tp) >= hi:
                    return chunk, hi
                found = await fetch(self._kafka, self._consumer, reading.tp, timeout_ms=POLL_MS)
                reading.buffer.extend(record for record in found.get(reading.tp, []) if record.offset >= lo)
                if found:
                    waited = time.monotonic()
                elif time.monotonic() - waited > COMPLAIN_SECONDS:
                    self._complain(f"waiting for Kafka: {reading.tp.topic}-{reading.tp.partition} from offset {lo}")
                continue
            record = reading.buffer[0]
            size += len(record.value or b"") + len(record.key or b"")
            lines += line_feeds(record.value or b"") + 1 if reading.has_lines else 1
            if record.offset >= hi:
                return chunk, hi
            if chunk and (len(chunk) >= CHUNK_RECORDS or size > self._limit_bytes or lines > BATCH_LINES):
                return chunk, record.offset
            chunk.append(reading.buffer.popleft())
        return chunk, hi

    async def _insert_missing(self, mark: Mark, where: Range, records: Sequence[Kafka], counts: Counts) -> None:
        self._whole_chunks += 1
        first = await self._fill(mark, where, records)
        if self._whole_chunks >= GROWS_AFTER_CHUNKS:
            self._whole_chunks, self._limit_bytes = 0, min(2 * self._limit_bytes, CHUNK_BYTES)
        there = sum(1 for record in records if first.get(record.offset, 0))
        counts.records += len(records)
        counts.there += there
        counts.inserted += len(records) - there

    async def _fill(
        self, mark: Mark, where: Range, records: Sequence[Kafka], *, in_doubt: bool = False
    ) -> Mapping[int, int]:
        """2 and 3. What was there before. `in_doubt`: an insert of some of them may still come. Raises Refused."""
        since_ms = mark.begun_ms if mark.rebuild else None
        first: Mapping[int, int] | None = None
        failures: list[float] = []

        async def attempt() -> bool:
            """False: it must be made smaller."""
            nonlocal first, in_doubt
            # 2
            if in_doubt:
                await self._store.claim_anew(where.partition)
            in_doubt = True
            await self._store.when_quiet(where.partition)
            present = await self._store.present_in(where, since_ms, {r.offset: r.timestamp for r in records})
            first = present if first is None else first
            lacking = [r for r in records if missing(where.partition.topic, present.get(r.offset, 0))]
            self._watch.checkpoint("asked")
            # 3
            whole, lost = parted([Slice(where.partition, lacking, present)]) if lacking else ([], [])
            for part in lost:
                await self._store.insert_lost(part)
            for part in whole:
                try:
                    await self._insert(part)
                except (TooLarge, TooSlow) as error:
                    if len(records) == 1:
                        failures.append(time.monotonic())
                        if len(failures) >= LONE_TRIES and failures[-1] - failures[0] >= LONE_SECONDS:
                            raise _hopeless(where.partition, records[0], error, len(failures)) from error
                        raise
                    self._complain(f"ClickHouse: cannot insert {len(records)} records, trying fewer: {error}")
                    self._make_smaller(records)
                    return False
            return True

        if not await self._patiently("insert", attempt):
            # Of the whole, a table may have its part, or get it: each half asks again.
            for part, half in _halves(where, records):
                await self._fill(mark, part, half, in_doubt=True)
        assert first is not None
        return first

    def _make_smaller(self, records: Sequence[Kafka]) -> None:
        size = sum(len(record.value or b"") + len(record.key or b"") for record in records)
        self._whole_chunks = 0
        self._limit_bytes = max(LEAST_CHUNK_BYTES, min(self._limit_bytes, size) // 2)

    async def _insert(self, part: Slice) -> None:
        """What is not readable is left out and becomes dead letters; what ClickHouse will not take is halved, until the
        record that it refuses stands alone: a dead letter."""
        try:
            await self._store.insert_missing(part)
        except Unreadable as error:
            others, dead = readable([part], error)
            for one in dead:
                await self._store.insert_left_out(one, error)
            for one in others:
                await self._insert(one)
        except Rejected as error:
            if len(part.records) == 1:
                await self._store.insert_refused(part, str(error))
                return
            for (half,) in halves([part]):
                await self._insert(half)

    async def _patiently(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        pause = RETRY_SECONDS[0]
        while True:
            try:
                return await ask()
            except Fenced as error:
                raise Refused(TAKEN) from error
            except OtherLog as error:
                raise Refused(f"not replayed any further: {error}") from error
            except (Unavailable, OperationalError) as error:
                self._complain(f"ClickHouse: cannot {what}, trying again: {str(error).splitlines()[0][:200]}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])

    def _complain(self, problem: str) -> None:
        """At most once in some seconds."""
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            self._watch.complain(problem)


def _hopeless(partition: Partition, record: Kafka, error: TooLarge | TooSlow, tries: int) -> Refused:
    what, more = (
        ("memory than ClickHouse has for an insert", "Give ClickHouse more memory")
        if isinstance(error, TooLarge)
        else ("time than an insert may take", "Raise materialiser.insert_seconds")
    )
    return Refused(
        f"{partition}: the record at offset {record.offset} alone needs more {what} (tried {tries} times): {error}. "
        f"{more} and give the same command again, which goes on there; or end it with --abandon, and replay what "
        f"lies before it (--to-offset {record.offset}) and behind it (--from-offset {record.offset + 1})"
    )


def _halves(where: Range, records: Sequence[Kafka]) -> Iterator[tuple[Range, Sequence[Kafka]]]:
    """Of the range, those that have records."""
    middle = (where.lo + where.hi + 1) // 2
    for part in (Range(where.partition, where.lo, middle), Range(where.partition, middle, where.hi)):
        half = [record for record in records if part.lo <= record.offset < part.hi]
        if half:
            yield part, half
