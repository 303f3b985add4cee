"""The materialiser's side of ClickHouse: insert a block, ask what is there, fence, log what was inserted.

Promises: an insert that returns is in its tables; `Rejected` means that the server looked at these records, will never
take all of them and took none; `Fenced` that a partition has another owner, and nothing was taken; any other error is
`Unavailable`: the insert happened, or did not, or will, until the partitions are fenced anew. Knows nothing of batches,
groups or offsets' order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
import clickhouse_connect
from clickhouse_connect.driver import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError

from fulgurite.consumers.materialiser.blocks import (
    BOTH_TABLES,
    DEAD_LETTERS_TABLE,
    GIVEN_UP,
    OWN_TABLE,
    Letter,
    OffsetRange,
    Partition,
    Slice,
    Unreadable,
)
from fulgurite.consumers.materialiser.body import Pieces
from fulgurite.consumers.materialiser.contents import (
    Body,
    beginning,
    body,
    dead_body,
    refused,
    undecodable,
    unreadable,
)
from fulgurite.consumers.materialiser.errors import Rejected, TooLarge, Unavailable, first_line, meaning, of_a_question
from fulgurite.consumers.materialiser.fences import (
    RUNNING,
    Guard,
    fenced,
    greater_fence,
    marks_query,
    running_parameters,
)
from fulgurite.consumers.materialiser.questions import (
    NEWEST,
    log_line,
    logged_condition,
    missing_query,
    since_conditions,
    times_queries,
)
from fulgurite.producers.redaction import redactor
from fulgurite.schemas import topics
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.redaction import RedactionSettings
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.topics import Topic

TABLES: dict[Topic, str] = {
    topics.ROLLOUTS: "rollout_events",
    topics.SPANS: "spans",
    topics.OTLP_SPANS: "spans",
    topics.REWARDS: "rewards",
    topics.TRAJECTORIES: "trajectories",
    topics.RESOURCES: "resources",
    topics.TRAINING: "training_events",
    topics.WORKERS: "worker_heartbeats",
    topics.DEAD_LETTERS: "dead_letters",
}
"""Where a topic's records end, when they are not refused: the one table, beside dead_letters, to look for an offset
in."""

_IN_DEAD_LETTERS = "in_rejected"
"""Hands on to dead_letters by way of the view that redacts: nothing else may write there."""

OF_ALL = f"topic = _topic AND reason IN {GIVEN_UP}"
"""Holds for dead letters that are all of a record: no table has any of it, nor may get it beside this."""

_ONE_BLOCK = 2**40

ANSWER_SECONDS = 5.0
"""So much longer than an insert may take a client waits: the server ends it by itself, and the client is told so."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A finished range."""

    partition: Partition
    lo: int
    hi: int
    records: int
    gaps: Sequence[OffsetRange] = ()
    """Before `hi`, where no record came."""
    skipped: Sequence[OffsetRange] = ()
    """Before `hi`, where Kafka has none."""
    unasked: Sequence[OffsetRange] = ()
    """Before `hi`, where Kafka is still to be asked."""


class Store:
    """One connection pool. `connect` first, `close` at the end."""

    def __init__(
        self,
        settings: ClickHouseSettings,
        insert_seconds: float,
        consumer: str,
        redaction: RedactionSettings | None = None,
    ) -> None:
        """`redaction`: the rules of the views, to find out which bytes they would spoil."""
        self._settings = settings
        self._redactor = redactor(redaction) if redaction is not None else None
        self._insert_seconds = insert_seconds
        self._consumer = consumer
        self._client: AsyncClient | None = None

    async def connect(self) -> None:
        """Raises Unavailable."""
        self._client = await self._new_client(self._insert_seconds)

    async def _new_client(self, seconds: float) -> AsyncClient:
        """For inserts of so many seconds. Raises Unavailable."""
        try:
            return await clickhouse_connect.get_async_client(
                **connection_options(self._settings),
                database=self._settings.database,
                connect_timeout=5,
                send_receive_timeout=seconds + ANSWER_SECONDS,
                compress=False,
            )
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(first_line(error)) from error

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def guard(self, slices: Sequence[Slice]) -> Guard:
        """Lets their insert through as long as their fences are the greatest."""
        return fenced(self._settings.database, slices)

    async def insert(self, slices: Sequence[Slice], guard: Guard, times: int = 1) -> None:
        """One block of one topic into in_<topic>, for the tables that lack it; a slice has only records that one lacks
        (`missing`). It may take `times` as long as inserts may. Raises Unreadable, Rejected, Fenced or Unavailable."""
        topic = slices[0].partition.topic
        into = f"in_{topic.name}"
        try:
            await self._insert(into, await asyncio.to_thread(body, slices), guard, times)
        except Rejected:
            if topic is not topics.OTLP_SPANS:
                raise
            # Nothing of it is in the tables: the same rows, written so that the server reads them.
            await self._insert(into, await asyncio.to_thread(body, slices, mend=True), guard, times)

    async def insert_dead(self, one: Slice, message: str, guard: Guard, reason: str = "rejected") -> None:
        """A record no table takes, as a dead letter. Raises Fenced or Unavailable."""
        await self._insert_letters(refused(one, message, reason), guard)

    async def insert_undecodable(self, part: Slice, guard: Guard) -> None:
        """Records that are `Undecodable`, as dead letters. Raises Fenced or Unavailable."""
        await self._insert_letters(undecodable(part), guard)

    async def insert_unreadable(self, dead: Sequence[Slice], error: Unreadable, guard: Guard) -> None:
        """Records that the error names, as dead letters. Raises Fenced or Unavailable."""
        await self._insert_letters(unreadable(dead, error), guard)

    async def _insert_letters(self, letters: Sequence[Letter], guard: Guard) -> None:
        body = await asyncio.to_thread(dead_body, letters, self._redactor)
        try:
            await self._insert(_IN_DEAD_LETTERS, body, guard)
        except TooLarge:
            if len(letters) > 1 or (kept := beginning(letters[0])) is None:
                raise
            # Its bytes alone are too many, and will ever be.
            await self._insert(_IN_DEAD_LETTERS, await asyncio.to_thread(dead_body, [kept], self._redactor), guard)

    async def _insert(self, into: str, body: Body, guard: Guard, times: int = 1) -> None:
        settings: dict[str, Any] = {
            "async_insert": 0,
            # Whatever the user's profile says: an insert whose view failed has not happened.
            "materialized_views_ignore_errors": 0,
            "max_execution_time": times * self._insert_seconds,
            "max_threads": 1,
            # One block in, one block to each table, whatever its size.
            "max_insert_block_size": _ONE_BLOCK,
            "min_insert_block_size_rows": _ONE_BLOCK,
            "min_insert_block_size_bytes": _ONE_BLOCK,
            # A batch read from the beginning of a topic may span more months than the server likes in one insert.
            "max_partitions_per_insert_block": 0,
            # The views are analysed anew by every insert, in tens of ms of CPU: what helps long queries is left
            # out. Their functions are all cheap and none raises, so nothing is gained by evaluating them for some rows.
            "query_plan_enable_optimizations": 0,
            "optimize_and_compare_chain": 0,
            "compile_expressions": 0,
            "short_circuit_function_evaluation": "disable",
            # Views write JSON of OTLP's arrays and maps: / as the producer and rules of redaction write it, not as \/.
            "output_format_json_escape_forward_slashes": 0,
            "log_comment": guard.comment,
            **guard.settings,
            **body.settings,
        }
        columns = ", ".join(f"`{name}`" for name in body.columns)
        guarded = f" SELECT {columns} FROM input() WHERE {guard.condition}" if guard.condition else ""
        statement = f"INSERT INTO {into} ({columns}){guarded} FORMAT {body.format}\n"
        # How long a client waits is its own: for an insert that may take longer there is one of its own.
        patient = await self._new_client(times * self._insert_seconds) if times > 1 else None
        try:
            # The client hands on to aiohttp what it does not know.
            pieces = cast(Any, Pieces([statement.encode(), *body.data]))
            client = patient or self._connected
            await client.raw_insert(insert_block=pieces, settings=settings, compression=None)
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise meaning(error, body.refusals) from error
        finally:
            if patient is not None:
                await patient.close()

    async def log(self, entries: Sequence[LogEntry]) -> None:
        """Says that these ranges are in. Raises Unavailable."""
        rows = [list(_row(entry, self._consumer).values()) for entry in entries]
        columns = list(_row(entries[0], self._consumer))
        try:
            await self._connected.insert("ingest_log", rows, column_names=columns, settings={"async_insert": 0})
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(first_line(error)) from error

    async def log_again(self, entries: Sequence[LogEntry]) -> None:
        """What became known of gaps since these, of one topic, were logged. Says nothing of a range that is not in the
        log any more, as where the database went back. Raises Unavailable."""
        condition = logged_condition([(entry.partition, entry.lo, entry.hi) for entry in entries])
        data = [log_line(_row(entry, self._consumer)) for entry in entries]
        body = Body(list(_row(entries[0], self._consumer)), data, "JSONEachRow", {}, frozenset())
        await self._insert("ingest_log", body, Guard("", condition))

    async def newest(self, partitions: Collection[Partition]) -> dict[Partition, LogEntry]:
        """Of those partitions of one topic that the log has one of, the newest entry with the highest offset, and what
        it leaves to be asked. Raises Unavailable."""
        found: dict[Partition, LogEntry] = {}
        by_number = {partition.number: partition for partition in partitions}
        for number, lo, hi, since, till in await self._rows(NEWEST, _named(partitions)):
            gaps = list(zip(map(int, since), map(int, till), strict=True))
            found[by_number[number]] = LogEntry(by_number[number], int(lo), int(hi), 0, unasked=gaps)
        return found

    async def logged(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        """One more than the highest offset the log knows of, 0 where it knows none. Raises Unavailable."""
        found = await self._query(
            "SELECT _partition, max(hi) + 1 FROM ingest_log WHERE _topic = {name:String} "
            "AND _partition IN {numbers:Array(UInt32)} GROUP BY _partition",
            _named(partitions),
        )
        ends = {row[0]: row[1] for row in found}
        return {partition: ends.get(partition.number, 0) for partition in partitions}

    async def marks(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        """Where the entry with the highest offset begins, of each partition that the log has one of. Raises
        Unavailable."""
        found = await self._query(
            "SELECT _partition, argMax(lo, hi) FROM ingest_log WHERE _topic = {name:String} "
            "AND _partition IN {numbers:Array(UInt32)} GROUP BY _partition",
            _named(partitions),
        )
        marks = {row[0]: row[1] for row in found}
        return {partition: marks[partition.number] for partition in partitions if partition.number in marks}

    async def lacking(self, marks: Mapping[Partition, int]) -> list[Partition]:
        """Those of one topic whose mark the log of inserts has no more. Raises Unavailable."""
        query = marks_query(next(iter(marks)).name, {partition.number: lo for partition, lo in marks.items()})
        found = {row[0] for row in await self._query(query, {})}
        return [partition for partition in marks if partition.number not in found]

    async def fence(self, partitions: Collection[Partition]) -> str:
        """Writes a fence greater than all that these partitions of one topic have, and returns it. Raises
        Unavailable: it may be there, and nobody will use it."""
        try:
            greatest = await self._connected.query(
                "SELECT max(fence) FROM ingest_fences WHERE _topic = {name:String} "
                "AND _partition IN {numbers:Array(UInt32)}",
                parameters=_named(partitions),
            )
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(first_line(error)) from error
        fence = greater_fence(str(greatest.result_rows[0][0]), self._consumer)
        await self.write_fence(partitions, fence)
        return fence

    async def write_fence(self, partitions: Collection[Partition], fence: str) -> None:
        """Raises Unavailable: it may be there."""
        rows = [[partition.name, partition.number, fence] for partition in partitions]
        try:
            await self._connected.insert(
                "ingest_fences", rows, column_names=["_topic", "_partition", "fence"], settings={"async_insert": 0}
            )
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(first_line(error)) from error

    async def running(self, partitions: Sequence[Partition]) -> bool:
        """Whether the server is at an insert that has one of these partitions, ours or anybody's. Raises
        Unavailable."""
        parameters = running_parameters(self._settings.database, partitions)
        return (await self._query(RUNNING, parameters))[0][0] > 0

    async def present(self, since: Mapping[Partition, int]) -> dict[Partition, dict[int, int]]:
        """Of each partition of one topic, the offsets from this one on that are in the tables, and in which
        (OWN_TABLE, DEAD_LETTERS_TABLE, their sum). Raises Unavailable."""
        found: dict[Partition, dict[int, int]] = {partition: {} for partition in since}
        by_number = {partition.number: partition for partition in since}
        first = next(iter(since))
        for table, bit, only in (
            (TABLES[first.topic], OWN_TABLE, ""),
            ("dead_letters", DEAD_LETTERS_TABLE, ""),
            ("dead_letters", BOTH_TABLES, f" AND {OF_ALL}"),
        ):
            query = f"SELECT DISTINCT _partition, _offset FROM {table} WHERE _topic = {{name:String}}{only} AND "
            for condition in since_conditions(since):
                for number, offset in await self._query(query + condition, {"name": first.name}):
                    tables = found[by_number[number]]
                    tables[offset] = tables.get(offset, 0) | bit
        return found

    async def times(self, offsets: Mapping[Partition, Collection[int]]) -> dict[Partition, dict[int, int]]:
        """Of those of these offsets of one topic's partitions that are in the tables, Kafka's times in ms. Raises
        Unavailable."""
        found: dict[Partition, dict[int, int]] = {partition: {} for partition in offsets}
        by_number = {partition.number: partition for partition in offsets}
        first = next(iter(offsets))
        for table in (TABLES[first.topic], "dead_letters"):
            for query in times_queries(table, offsets):
                for number, offset, time_ms in await self._query(query, {"name": first.name}):
                    found[by_number[number]][offset] = time_ms
        return found

    async def missing(self, partition: Partition, lo: int, hi: int) -> int:
        """How many offsets of lo..hi, a range of the log of inserts, are in no table and not known to have no record.
        Raises Unavailable."""
        query = missing_query((TABLES[partition.topic], "dead_letters"))
        found = await self._query(query, {"name": partition.name, "number": partition.number, "lo": lo, "hi": hi})
        return hi - lo + 1 - sum(found[0])

    async def dead_letters(self) -> dict[tuple[str, str], int]:
        """(reason, stage) -> rows. Raises Unavailable."""
        found = await self._rows("SELECT reason, stage, count() FROM dead_letters GROUP BY ALL", {})
        return {(str(reason), str(stage)): int(rows) for reason, stage, rows in found}

    async def _query(self, query: str, parameters: dict[str, object]) -> list[tuple[int, ...]]:
        return [tuple(int(value) for value in row) for row in await self._rows(query, parameters)]

    async def _rows(self, query: str, parameters: dict[str, object]) -> Sequence[Sequence[Any]]:
        try:
            result = await self._connected.query(query, parameters=parameters)
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise of_a_question(error) from error
        return result.result_rows

    @property
    def _connected(self) -> AsyncClient:
        assert self._client is not None, "connect() comes first"
        return self._client


def _row(entry: LogEntry, consumer: str) -> dict[str, object]:
    """Of ingest_log."""
    return {
        "_topic": entry.partition.name,
        "_partition": entry.partition.number,
        "lo": entry.lo,
        "hi": entry.hi,
        "records": entry.records,
        "consumer": consumer,
        "skipped": list(entry.skipped),
        "unasked": list(entry.unasked),
    }


def _named(partitions: Collection[Partition]) -> dict[str, object]:
    """Parameters: they are of one topic."""
    return {"name": next(iter(partitions)).name, "numbers": [partition.number for partition in partitions]}
